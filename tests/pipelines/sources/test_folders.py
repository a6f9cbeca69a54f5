"""Sets without a table of their own kind: pairs by name, tars, media in Parquet, published columns."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures import media_corpus as corpus

from loomvideo.pipelines.sources import Rejected, open_source


def read(path, format="auto", **options):
    return list(open_source(str(path), format, **options))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize("words", [("src", "tgt"), ("source", "target"), ("Before", "After")])
@pytest.mark.parametrize("separator", ["_", "-"])
def test_pairs_by_name(tmp_path, words, separator):
    source, target = words
    touch(tmp_path, f"a{separator}{source}.mp4", f"a{separator}{target}.mp4", f"b{separator}{source}.png", "c.mp4")
    (tmp_path / "a.txt").write_text("make it red\n")
    found = read(tmp_path)
    (pair,) = [outcome for outcome in found if not isinstance(outcome, Rejected)]
    assert (pair.task, pair.instruction, pair.group) == ("video_edit", "make it red", "a")
    assert pair.source == f"{tmp_path}/a{separator}{source}.mp4"
    assert [entry.reason for entry in found if isinstance(entry, Rejected)] == ["unpaired", "unpaired"]


def test_pairs_in_two_folders_with_one_instruction(tmp_path):
    touch(tmp_path, "source/1.png", "target/1.jpg", "source/2.png")
    pair, lost = read(tmp_path, instruction="restore it")
    assert (pair.task, pair.instruction, lost.reason) == ("image_edit", "restore it", "unpaired")


def test_pairs_without_text_can_be_captioned(tmp_path):
    touch(tmp_path, "a_src.mp4", "a_tgt.mp4")
    (lost,) = read(tmp_path)
    assert (lost.reason, lost.unfinished.task) == ("no_text", "video_edit")


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_webdataset_tars(tmp_path):
    video = corpus.video(tmp_path / "v.mp4", corpus.numbered(3)).read_bytes()
    picture = b"\x89PNG" + b"0" * 20
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "0.tar", [
        ("a/0.mp4", video), ("a/0.json", json.dumps({"caption": "a dress", "score": 3}).encode()),
        ("1.png", picture), ("1.txt", "ein Kleid – rot".encode()),
        ("2.source.png", picture), ("2.target.png", picture + b"1"), ("2.json", b'{"instruction": "make it red"}'),
        ("3.json", b"{}"), ("4.png", picture), ("4.txt", b"\xff\xfe bad"), ("5.png", picture), ("5.json", b"{"),
        ("6.a.png", picture), ("6.b.png", picture),
    ])  # fmt: skip
    (shards / "1.tar").write_bytes((shards / "0.tar").read_bytes()[:1300])
    found = read(shards, extract=str(tmp_path / "media"))
    samples = [outcome for outcome in found if not isinstance(outcome, Rejected)]
    assert [(s.task, s.text) for s in samples[:3]] == [
        ("t2v", "a dress"), ("t2i", "ein Kleid – rot"), ("image_edit", "make it red"),
    ]  # fmt: skip
    assert samples[0].extra == {"score": 3, "source_id": "a/0"}
    assert Path(samples[0].target).read_bytes() == video
    reasons = [outcome.reason for outcome in found if isinstance(outcome, Rejected)]
    assert reasons[:4] == ["missing_media", "not_utf8", "invalid_field", "unpaired"]
    assert reasons[4:] == ["unreadable_table"]


def test_media_that_lie_in_parquet_keep_their_kind(tmp_path):
    video = corpus.video(tmp_path / "v.mp4", corpus.numbered(3)).read_bytes()
    rows = [
        {"video": {"bytes": video, "path": "x.mp4"}, "caption": "a film"},
        {"video": {"bytes": b"\x89PNG00", "path": None}, "caption": "a picture"},
        {"video": {"bytes": b"what is this", "path": "x.bin"}, "caption": "x"},
        {"video": {"bytes": None, "path": "there.mp4"}, "caption": "a path"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    film, picture, bad, path = read(tmp_path / "t.parquet", extract=str(tmp_path / "media"))
    assert (film.task, picture.task, path.target) == ("t2v", "t2i", f"{tmp_path}/there.mp4")
    assert film.target.endswith(".mp4")
    assert (bad.reason, bad.detail) == ("invalid_field", "bytes: 12 bytes that are no picture or video known here")


@pytest.mark.parametrize(
    "row",
    [
        {
            "original_image": "a.png",
            "edit_prompt": "make it red",
            "edited_image": "b.png",
            "original_prompt": "x",
        },
        {"source_img": "a.png", "instruction": "make it red", "target_img": "b.png", "turn_index": 1},
        {"task": "remove", "input_images": ["a.png"], "prompt": "make it red", "output_images": ["b.png"]},
    ],
)
def test_columns_of_published_picture_edits_need_no_map(tmp_path, row):
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = read(tmp_path / "t.jsonl")
    assert (sample.task, sample.instruction) == ("image_edit", "make it red")
    assert (sample.source, sample.target) == (f"{tmp_path}/a.png", f"{tmp_path}/b.png")
    assert sample.extra.get("task") == row.get("task")


def test_panda_is_no_koala(tmp_path):
    touch(tmp_path, "videos/abc.mp4")
    rows = [
        ["videoID", "url", "timestamp", "caption", "matching_score", "desirable_filtering", "shot_boundary_detection"],
        ["abc", "u", "[['0:00:02.002', '0:00:06.5'], ['0:01:00', '0:01:02']]", "['a cat', \"a dog's\"]", "[0.4, 0.5]"],
        ["abc", "u", "[['0:00:02', '0:00:06']]", "['a', 'b']", "[0.4]"],
        ["abc", "u", "later", "['a']", "[0.4]"],
        ["gone", "u", "[]", "[]", "[]"],
    ]
    with (tmp_path / "p.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([row + [""] * (7 - len(row)) for row in rows])
    found = read(tmp_path)
    assert [s.caption for s in found[:2]] == ["a cat", "a dog's"]
    assert [s.target for s in found[:2]] == [f"{tmp_path}/videos/abc.mp4#t={t}" for t in ("2.002,6.5", "60,62")]
    assert [entry.reason for entry in found[2:]] == ["invalid_field", "invalid_field", "missing_media"]
