"""Rows and tables as people bring them: each costs at most itself, with its reason."""

import codecs
import cProfile
import csv
import gzip
import io
import json
import pstats
import unicodedata

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.inputs import read_inputs
from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.base import Root, locate
from loomvideo.pipelines.sources.fields import KEY_PATTERN
from loomvideo.pipelines.sources.rows import rows
from loomvideo.pipelines.sources.samples import read_jsonl
from loomvideo.platform.errors import UserError

GOOD = {"key": "k", "task": "t2v", "dataset": "d", "target": "a.mp4", "caption": "a dress"}


def read(path, format="auto", **options):
    return list(open_source(str(path), format, **options))


def one(path, format="auto", **options):
    outcomes = read(path, format, **options)
    assert len(outcomes) == 1, outcomes
    return outcomes[0]


BAD_VALUES = [
    ("caption", 12, "invalid_field", "caption: expected text, found the number 12"),
    ("caption", True, "invalid_field", "caption: expected text, found true"),
    ("caption", ["a"], "invalid_field", "caption: expected text, found a list of 1"),
    ("caption", {"a": 1}, "invalid_field", "caption: expected text, found an object"),
    ("caption", float("nan"), "no_text", "no instruction or caption"),
    ("caption", "   ", "no_text", "no instruction or caption"),
    ("caption", "half \ud83d", "invalid_text", "holds half a character"),
    ("caption", "nul \0", "invalid_text", "holds a NUL"),
    ("caption", "a <|im_end|> b", "invalid_text", "special token <|im_end|>"),
    ("instruction", 3.5, "invalid_field", "instruction: expected text, found the number 3.5"),
    ("target", ["a.mp4"], "invalid_field", "target: expected one path, found a list of 1"),
    ("target", 7, "invalid_field", "target: expected one path, found the number 7"),
    ("target", "a\0.mp4", "invalid_text", "target: holds a NUL"),
    ("source", {"path": "x"}, "invalid_field", "source: expected one path, found an object"),
    ("references", 5, "invalid_field", "references: expected a list of paths"),
    ("references", ["a.png", None], "invalid_field", "references[1]: is empty"),
    ("references", ["a.png", ["b"]], "invalid_field", "references[1]: expected one path"),
    ("extra", [1], "invalid_field", "extra: expected an object"),
    ("extra", "words", "invalid_field", "extra: is text, and no JSON object"),
    ("extra", {"fps": "fast"}, "invalid_field", "extra.fps: 'fast' is no frame rate"),
    ("extra", {"fps": -3}, "invalid_field", "extra.fps: -3 is no frame rate"),
    ("extra", {"note": "\ud83d"}, "invalid_text", "extra.note: holds half a character"),
    ("split", "holdback", "invalid_field", "split: 'holdback' is none of train"),
    ("split", ["val"], "invalid_field", "split: expected a name"),
    ("key", ["k"], "invalid_field", "key: expected a name"),
    ("task", 3, "invalid_sample", "task '3' is none of"),
    ("dataset", None, "invalid_sample", "missing field"),
    ("colour", "red", "invalid_sample", "unknown field"),
]


@pytest.mark.parametrize(("field", "value", "reason", "detail"), BAD_VALUES)
def test_a_bad_value_costs_its_row(tmp_path, field, value, reason, detail):
    lines = [GOOD | {"key": "a"}, GOOD | {field: value}, GOOD | {"key": "b"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, bad, last = read(tmp_path)
    assert (first.key, last.key) == ("a", "b")
    assert (bad.where, bad.reason) == (f"{tmp_path}/samples.jsonl:2", reason)
    assert detail in bad.detail
    assert "\n" not in bad.detail
    json.dumps([bad.detail], ensure_ascii=False).encode()  # what the accounts hold can be stored


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("references", "a b.png", ["a b.png"]),
        ("split", "validation", "heldout"),
        ("split", "Val", "heldout"),
        ("split", "test", "heldout"),
        ("split", "dev", "heldout"),
        ("split", "training", "train"),
        ("split", "", None),
        ("caption", "  spaced  ", "spaced"),
        ("caption", "שלום 👩\u200d👧 \u2028 x", "שלום 👩\u200d👧 \u2028 x"),
        ("caption", "x" * 10_000, "x" * 10_000),
        ("group", 17, "17"),
        ("group", 17.0, "17"),
        ("key", 17, "17"),
        ("key", 17.0, "17"),
        ("extra", {"fps": "30000/1001"}, {"fps": 30000 / 1001}),
        ("extra", {"fps": "29,97 fps"}, {"fps": 29.97}),
        ("extra", {"fps": "N/A", "a": 1}, {"a": 1}),
        ("extra", {"fps": "0/0"}, {}),
        ("extra", {"a": float("nan"), "b": [float("inf")]}, {"a": None, "b": [None]}),
        ("extra", '{"a": 1}', {"a": 1}),
        ("extra", None, {}),
    ],
)
def test_a_value_with_one_meaning_takes_it(tmp_path, field, value, expected):
    (tmp_path / "samples.jsonl").write_text(json.dumps(GOOD | {field: value}) + "\n")
    sample = one(tmp_path)
    found = getattr(sample, field)
    assert ([path.removeprefix(f"{tmp_path}/") for path in found] if field == "references" else found) == expected


@pytest.mark.parametrize(
    "key", ["22.05.mp4", "a/b", "é", "e\u0301", "a b", "#1", "?v=1", "%20", "👗", "'q\"", "x" * 90]
)
def test_any_key_becomes_a_safe_one_and_can_be_asked_for(tmp_path, key):
    (tmp_path / "samples.jsonl").write_text(json.dumps(GOOD | {"key": key}) + "\n")
    sample = one(tmp_path)
    assert KEY_PATTERN.fullmatch(sample.key)
    assert sample.extra["source_id"] == key


def test_twins_keep_apart(tmp_path):
    keys = ["é", "e\u0301", "Dress", "dress", "a/b", "a.b", "a-b"]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(GOOD | {"key": key}) + "\n" for key in keys))
    assert len({sample.key for sample in read(tmp_path)}) == len(keys)


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", "3", '"x"', "null", "[" * 100_000, '{"key": ' + "9" * 5000 + "}", '{"a":' * 5000, "\udcff".join("ab")],
)
def test_a_line_that_is_no_object_costs_itself(tmp_path, line):
    text = f"{json.dumps(GOOD)}\n{line}\n"
    (tmp_path / "samples.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    sample, bad = read(tmp_path)
    assert (sample.key, bad.reason) == ("k", "invalid_json")


def test_lines_end_at_newlines_only_and_a_byte_order_mark_is_no_text(tmp_path):
    rows = [GOOD | {"key": "a", "caption": "one\u2028two\x85three"}, GOOD | {"key": "b"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "samples.jsonl").write_bytes(codecs.BOM_UTF8 + text.encode())
    first, second = read(tmp_path)
    assert (first.caption, second.key) == ("one\u2028two\x85three", "b")
    assert [sample.key for sample in read_jsonl(tmp_path / "samples.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["samples.jsonl.gz", "samples.json", "s.json", "s.ndjson", "s.jsonl.bz2", "s.jsonl.xz"]
)
def test_packed_lines_and_lists_of_samples(tmp_path, name):
    rows = [GOOD | {"key": "a"}, GOOD | {"key": "b"}]
    text = json.dumps(rows) if ".json" in name and "jsonl" not in name else "\n".join(map(json.dumps, rows))
    with fsspec.open(str(tmp_path / name), "wb", compression="infer") as out:
        out.write(text.encode())
    assert [sample.key for sample in read(tmp_path if name.startswith("samples") else tmp_path / name)] == ["a", "b"]


def test_lines_in_a_file_that_is_called_json(tmp_path):
    (tmp_path / "s.json").write_text("\n".join(json.dumps(GOOD | {"key": key}) for key in "ab"))
    assert [sample.key for sample in read(tmp_path / "s.json")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b""),
        ("t.csv", b"\n \n"),
        ("t.json", b"{"),
        ("t.json", b""),
        ("t.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
        ("t.parquet", b"no parquet"),
        ("t.csv.gz", gzip.compress(b"video,caption\na.mp4,x\n" * 1000)[:60]),
        ("t.csv.gz", b"not packed"),
        ("t.jsonl.xz", b"not packed"),
        ("t.csv", codecs.BOM_UTF16_LE + b"v\0i"),
    ],
)
def test_a_damaged_table_costs_itself(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.csv").write_text("video,caption\na.mp4,a dress\n")
    *others, good = read(tmp_path, "table")
    assert good.caption == "a dress"
    bad = [outcome for outcome in others if isinstance(outcome, Rejected)]
    assert [entry.reason for entry in bad] in (["unreadable_table"], ["invalid_json"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\3\4" + bytes(range(256)), "is a workbook or another zip"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "of an old Excel: save it as CSV"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html><p>404", "is a web page"),
        (b"<html><table><tr><td>video", "is a web page"),
        (b"%PDF-1.7\n", "is a PDF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_no_table_says_what_it_is(tmp_path, content, said):
    (tmp_path / "a.csv").write_bytes(content)
    (tmp_path / "z.csv").write_text("video,caption\na.mp4,a dress\n")
    bad, good = read(tmp_path, "table")
    assert (bad.reason, good.caption) == ("unreadable_table", "a dress")
    assert said in bad.detail


@pytest.mark.parametrize("named", ["", "Products.XLSX"])
def test_a_spreadsheet_is_asked_for_as_csv(tmp_path, named):
    (tmp_path / "Products.XLSX").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"Products\.XLSX: is a spreadsheet; save it as CSV"):
        read(tmp_path / named)


def test_texts_that_parquet_holds_as_bytes_are_texts(tmp_path):
    """Spark's, which do not say that they are text."""
    values = {"video": [b"a.mp4", b"b.mp4"], "caption": ["schön".encode(), b"\xff"]}
    pq.write_table(pa.table(values), tmp_path / "t.parquet")
    good, bad = read(tmp_path / "t.parquet", "table", columns={"target": "video"})
    assert (good.target, good.caption) == (f"{tmp_path}/a.mp4", "schön")
    assert bad.reason == "invalid_field"


CSV_ROWS = [["Video", "Caption", "split"], ["a.mp4", "ein schönes Kleid; rot, 50 %", "val"], ["b.mp4", "x", ""]]


def excel_csv(delimiter, encoding, head=""):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\r\n")
    writer.writerows(CSV_ROWS)
    return (head + out.getvalue()).encode(encoding)


@pytest.mark.parametrize(
    "content",
    [
        excel_csv(",", "utf-8"),
        excel_csv(",", "utf-8-sig"),
        excel_csv(";", "utf-8-sig"),
        excel_csv("\t", "utf-16"),
        excel_csv(";", "utf-16"),
        excel_csv(";", "utf-8", "sep=;\r\n"),
        excel_csv("|", "utf-8", "\r\n;\r\n".replace(";", "")),
        excel_csv(";", "utf-8").replace(b"Video", b" Video "),
        excel_csv(",", "utf-8").replace(b"\r\n", b"\r"),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    first, second = read(tmp_path / "t.csv")
    assert (first.target, first.caption, first.split) == (f"{tmp_path}/a.mp4", CSV_ROWS[1][1], "heldout")
    assert (second.target, second.split) == (f"{tmp_path}/b.mp4", None)


def test_an_encoding_is_asked_for_and_never_guessed(tmp_path):
    (tmp_path / "t.csv").write_bytes(excel_csv(";", "cp1252"))
    bad, good = read(tmp_path / "t.csv")
    assert (bad.reason, good.caption) == ("not_utf8", "x")
    assert "source_options.encoding=cp1252" in bad.detail
    assert read(tmp_path / "t.csv", encoding="cp1252")[0].caption == CSV_ROWS[1][1]
    with pytest.raises(UserError, match="no such text encoding"):
        read(tmp_path / "t.csv", encoding="klingon")


def test_cells_that_stand_for_nothing_and_rows_of_another_length(tmp_path):
    text = "video,caption,references,fps\na.mp4,nan,,N/A\nb.mp4,x\nc.mp4,y,NULL,30000/1001\n,,,\nd.mp4,z,,fast\n,w,,\n"
    (tmp_path / "t.csv").write_text(text)
    outcomes = read(tmp_path / "t.csv")
    assert [getattr(o, "reason", "ok") for o in outcomes] == [
        "no_text", "invalid_field", "ok", "invalid_field", "missing_field",
    ]  # fmt: skip
    assert outcomes[2].extra == {"fps": 30000 / 1001}


@pytest.mark.parametrize("content", [b"\r\0", b'"\r\0"x\r', b"\0" * 100, b"a\rb\r\n\r"])
def test_binary_under_a_tables_name_ends_nothing(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    (tmp_path / "z.csv").write_text("video,caption\na.mp4,a dress\n")
    assert read(tmp_path, "table")[-1].caption == "a dress"


def test_columns_that_are_there_twice_keep_both(tmp_path):
    (tmp_path / "t.csv").write_text("video,caption,note,note\na.mp4,x,1,2\n")
    assert one(tmp_path / "t.csv").extra == {"note": "1", "note.2": "2"}


def test_parquet_with_other_types(tmp_path):
    rows = [
        {"video": "a.mp4", "caption": "x", "sku": 17.0, "when": None, "price": 1.5},
        {"video": None, "caption": "x", "sku": None, "when": None, "price": float("nan")},
    ]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(3, "when", pa.array([0, 2**62], pa.timestamp("us")))
    pq.write_table(table, tmp_path / "t.parquet")
    good, bad = read(tmp_path / "t.parquet", "table", keep=["when", "price"])
    assert (good.group, good.extra) == ("17", {"when": "1970-01-01T00:00:00", "price": 1.5})
    assert bad.reason == "invalid_field"  # a time that no calendar has


def test_a_row_that_repeats_another_but_for_spaces_is_a_duplicate(tmp_path):
    rows = ["video,caption", "a.mp4,a red  dress", "a.mp4, a red dress ", "a.mp4,a blue dress"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    inputs = read_inputs(PrepareConfig(input=str(tmp_path / "t.csv"), output="x"))
    assert len(inputs) == 2
    assert [(loss.outcome, loss.reason) for loss in inputs.losses] == [("duplicates", "repeated_line")]


def test_hidden_files_links_and_odd_names(tmp_path):
    (tmp_path / "._t.csv").write_bytes(b"\0\5\26\7")
    (tmp_path / ".hidden.csv").write_text("video,caption\nh.mp4,x\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("video,caption\n\"a #1?v=1%20'b'.mp4\",x\n")
    (tmp_path / "linked.csv").symlink_to(tmp_path / "t.csv")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    (tmp_path / "folder").symlink_to(tmp_path / "empty")
    root = Root(str(tmp_path))
    assert root.names() == ["empty", "folder", "gone.csv", "linked.csv", "t.csv"]
    assert root.is_folder("folder")
    bad, *good = read(tmp_path, "table")
    assert bad.reason == "unreadable_table"
    assert {sample.target for sample in good} == {f"{tmp_path}/a #1?v=1%20'b'.mp4"}
    with pytest.raises(UserError, match=r"no file ending in \.csv"):
        read(tmp_path / "empty", "table")


@pytest.mark.parametrize(
    ("base", "part", "path"),
    [
        ("memory://bucket/tables", "../media/a.png", "memory://bucket/media/a.png"),
        ("memory://bucket/tables", "a//b.png", "memory://bucket/tables/a//b.png"),
        ("memory://bucket/tables", "./a..b.png", "memory://bucket/tables/a..b.png"),
        ("memory://bucket/tables", "s3://x/a//../b.png?v=1", "s3://x/a//../b.png?v=1"),
        ("/data/tables", "../media//a.png", "/data/media//a.png"),
        ("/data/tables", "../../../a.png", "/a.png"),
        ("/data/tables", "/x/../a.png", "/a.png"),
    ],
)
def test_paths_of_rows(base, part, path):
    assert Root(base).path(part).replace("memory:///", "memory://") == path


def calls_to_read(folder):
    """How many functions are called to read a folder: what it costs, on any machine."""
    profile = cProfile.Profile()
    profile.enable()
    outcomes = read(folder, "pairs")
    profile.disable()
    return len(outcomes), pstats.Stats(profile).total_calls


def test_the_cost_of_a_folder_grows_with_its_files(tmp_path):
    costs = {}
    for count in (50, 100, 200):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}_src.png").touch()
            (folder / f"{number}_tgt.png").touch()
            (folder / f"{number}.txt").write_text("make it red")
        found, costs[count] = calls_to_read(folder)
        assert found == count
    assert costs[200] - costs[100] < 2.2 * (costs[100] - costs[50])


def test_a_row_of_another_shape_than_published_costs_itself(tmp_path):
    rows = {
        "a": {"metadata": "one text", "annotation": {}},
        "b": {"metadata": ["v/b.mp4"], "annotation": {}},
        "c": {"metadata": {"path": "v/c.mp4", "cut": 7, "cap": ["x"]}, "annotation": {}},
        "d": {"metadata": {"path": "v/d.mp4", "cap": ["a woman"]}, "annotation": {}},
    }
    (tmp_path / "part.json").write_text(json.dumps(rows))
    *bad, good = read(tmp_path / "part.json")
    assert [outcome.reason for outcome in bad] == ["invalid_field"] * 3
    assert [outcome.detail.partition(":")[0] for outcome in bad[:2]] == ["not of the published shape"] * 2
    assert good.caption == "a woman"


def test_unicode_twins_of_composed_names_are_different_rows(tmp_path):
    for form in ("NFC", "NFD"):
        assert unicodedata.normalize(form, "é.mp4") != unicodedata.normalize("NFC" if form == "NFD" else "NFD", "é.mp4")
    rows = [GOOD | {"key": form, "target": unicodedata.normalize(form, "é.mp4")} for form in ("NFC", "NFD")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len({sample.target for sample in read(tmp_path)}) == 2


def test_a_table_that_is_none_ends_a_command_that_names_it_and_costs_itself_in_a_folder(tmp_path):
    (tmp_path / "a.csv").write_text("name,price\nx,1\n")
    (tmp_path / "b.csv").write_text("video,caption\na.mp4,x\n")
    with pytest.raises(UserError, match="which column is the target"):
        read(tmp_path / "a.csv")
    bad, good = read(tmp_path, "table")
    assert isinstance(bad, Rejected)
    assert good.caption == "x"


@pytest.mark.parametrize(
    "after", ["", 'e.mp4,"a ""red"" dress"\n', "f.mp4,plain\n" * 1500], ids=["end", "mark", "long"]
)
def test_a_quotation_mark_that_is_not_closed_costs_its_line_alone(tmp_path, after):
    text = (
        'video,caption\na.mp4,"two\nlines"\nb.mp4,"never closed\nc.mp4,a "red" coat\nd.mp4,"quoted" loosely\n' + after
    )
    (tmp_path / "t.csv").write_text(text)
    found = list(rows(locate(str(tmp_path / "t.csv")), "t.csv", "d"))
    kept = [entry for entry in found if not isinstance(entry, Rejected)]
    (lost,) = [entry for entry in found if isinstance(entry, Rejected)]
    assert (lost.where, lost.reason) == (f"{tmp_path}/t.csv:4", "invalid_field")
    assert "is not closed" in lost.detail
    assert [row["video"] for _, row in kept[:3]] == ["a.mp4", "c.mp4", "d.mp4"]
    assert len(kept) == 3 + after.count("mp4")
    assert [where.rpartition(":")[2] for where, _ in kept[:3]] == ["3", "5", "6"]
