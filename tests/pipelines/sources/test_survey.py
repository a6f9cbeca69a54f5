"""What is understood of a dataset before anything runs, and what is asked."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures import media_corpus as corpus

from loomvideo.pipelines.sources import open_source
from loomvideo.pipelines.sources.survey import looked_at_media, survey
from loomvideo.platform.errors import UserError


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_table_says_which_column_gives_what(tmp_path):
    rows = [{"Video": f"{i}.mp4", "text": f"take {i}", "score": i} for i in range(30)] + [{"text": "no video"}]
    found = survey(write_rows(tmp_path / "t.jsonl", rows), "auto", {}, 10, 25)
    assert (found.format, found.complete, found.questions) == ("table", False, [])
    assert ("target", "Video", "0.mp4") in found.fields
    assert found.unused == ["score"]
    assert [sample.caption for sample in found.samples] == [f"take {int(2.5 * i)}" for i in range(10)]
    whole = survey(write_rows(tmp_path / "t.jsonl", rows), "auto", {}, 10, 100)
    assert whole.complete
    assert whole.rejected["missing_field"][0] == 1


def test_columns_that_could_both_be_meant_are_asked_about(tmp_path):
    rows = [{"video": f"{i}.mp4", "caption": f"a {i}", "prompt": f"b {i}"} for i in range(3)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    (question,) = survey(path, "auto", {}, 3, 10).questions
    assert question == "which column is the caption: caption or prompt? set source_options.columns.caption=caption"
    assert survey(path, "auto", {"columns": {"caption": "prompt"}}, 3, 10).questions == []
    # Pictures here and videos there are no question, nor are two columns that say the same.
    mixed = [{"video": "a.mp4", "caption": "x", "text": "x"}, {"image_path": "b.png", "caption": "y", "text": "y"}]
    assert survey(write_rows(tmp_path / "m.jsonl", mixed), "auto", {}, 3, 10).questions == []


def test_a_layout_that_fits_two_formats_is_asked_about(tmp_path):
    for name in ("a_src.png", "a_tgt.png", "x.tar"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="fits pairs and webdataset; set format"):
        list(open_source(str(tmp_path)))


def test_a_folder_of_pictures_with_its_metadata_and_a_folder_of_parquet(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write_rows(pictures / "metadata.jsonl", [{"file_name": "a.png", "text": "a coat"}])
    (sample,) = open_source(str(pictures))
    assert (sample.target, sample.caption, sample.task) == (f"{pictures}/a.png", "a coat", "t2i")
    video = corpus.video(tmp_path / "v.mp4", corpus.numbered(4)).read_bytes()
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    table = pa.Table.from_pylist([{"video": {"bytes": video, "path": "v.mp4"}, "caption": "grey"}])
    pq.write_table(table, data / "train-00000-of-00001.parquet")
    found = survey(str(tmp_path / "hub"), "auto", {}, 10, 10, str(tmp_path / "shared"))
    assert ("target", "video", f"{len(video)} bytes (v.mp4)") in found.fields
    (sample,) = found.samples
    assert sample.task == "t2v"
    assert sample.target.startswith(f"{tmp_path}/shared/")
    assert looked_at_media(found.samples) == {sample.target: "video 96x64, 4 frames at 24 fps"}


def test_media_that_are_not_there_are_said(tmp_path):
    found = survey(write_rows(tmp_path / "t.jsonl", [{"video": "gone.mp4", "caption": "x"}]), "auto", {}, 1, 10)
    assert looked_at_media(found.samples) == {f"{tmp_path}/gone.mp4": "missing_file: no such file"}
