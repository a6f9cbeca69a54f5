"""`data cut` as a whole: the sample file, what a second run does, and films that cannot be cut."""

import json

import pyarrow.parquet as pq
import pytest
from fixtures import media_corpus as corpus

from loomvideo.pipelines.clips import job
from loomvideo.pipelines.clips.config import CutConfig
from loomvideo.pipelines.clips.worker import FilmProcess
from loomvideo.pipelines.media.decode import open_media
from loomvideo.pipelines.media.media_info import DecodeError
from loomvideo.pipelines.sources import open_source
from loomvideo.platform.errors import UserError


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    """The pool's worker in this process."""

    def run(worker, arguments, work, pool):
        made = worker(*arguments)
        yield from map(made, work)
        made.close()

    monkeypatch.setattr(job, "map_on_actors", run)


def dataset(folder):
    corpus.video(folder / "film.mp4", corpus.numbered(24))
    row = {"task": "t2v", "dataset": "films", "caption": "a film"}
    parts = ["frames=2,9", "frames=10,20&xywh=percent:0,0,50,50"]
    rows = [row | {"key": f"a{i}", "target": f"film.mp4#{part}"} for i, part in enumerate(parts)]
    rows += [
        row | {"key": "edit", "task": "video_edit", "source": "film.mp4#frames=2,9", "target": "film.mp4#frames=3,10"},
        row | {"key": "with", "task": "mi2v", "target": "film.mp4#frames=2,9", "references": ["film.mp4#frame=4"]},
        row | {"key": "whole", "target": "film.mp4"},
        row | {"key": "gone", "target": "gone.mp4#frames=0,4"},
        row | {"key": "beyond", "target": "film.mp4#frames=90,99"},
    ]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return CutConfig(input=str(path), output=str(folder / "cut"))


def test_samples_of_films_become_samples_of_clips_and_a_second_run_reads_nothing(tmp_path):
    config = dataset(tmp_path)
    first = job.cut(config)
    assert (first.films, first.counts["samples"], first.counts["outside_file"], first.counts["missing_file"]) == (
        2,
        5,
        1,
        1,
    )
    samples = {s.key: s for s in open_source(f"{config.output}/samples.jsonl")}
    assert set(samples) == {"a0", "a1", "edit", "with", "whole"}
    assert samples["a0"].target == samples["edit"].source == samples["with"].target
    media = open_media(samples["edit"].target)
    assert corpus.numbers(next(media.read(range(media.info.num_frames)))) == list(range(3, 10))
    assert samples["a1"].target.endswith(".mp4#xywh=percent:0,0,50,50")
    assert samples["with"].references[0].endswith(".png")
    assert samples["whole"].target == str(tmp_path / "film.mp4")
    assert samples["a0"].extra["source_id"] == str(tmp_path / "film.mp4")
    ledger = pq.read_table(f"{config.output}/cut.parquet").to_pylist()
    assert {row["key"]: row["status"] for row in ledger} == {
        "a0": "cut", "a1": "cut", "edit": "cut", "with": "cut", "whole": "whole", "gone": "missing_file",
        "beyond": "outside_file",
    }  # fmt: skip
    written = (tmp_path / "cut" / "samples.jsonl").read_bytes()
    # The film that was missing is looked for again, the other is not opened.
    again = job.cut(config)
    assert (again.films, again.films_before, again.num_read) == (1, 1, 0)
    assert (tmp_path / "cut" / "samples.jsonl").read_bytes() == written


def test_a_part_more_is_cut_alone_and_a_clip_that_is_gone_again(tmp_path):
    config = dataset(tmp_path)
    job.cut(config)
    more = job.cut(_with_part(config, "frames=0,2"))
    assert (more.clips["copied"], more.clips["kept"]) == (1, 4)
    sample = next(s for s in open_source(f"{config.output}/samples.jsonl") if s.key == "a0")
    (tmp_path / "cut" / sample.target).unlink()
    assert job.cut(config).films == 2


def _with_part(config: CutConfig, part: str) -> CutConfig:
    with open(config.input, "a") as out:
        row = {"key": "more", "task": "t2v", "dataset": "films", "caption": "x", "target": f"film.mp4#{part}"}
        out.write(json.dumps(row) + "\n")
    return config


def test_a_film_that_hangs_loses_what_is_left_of_it_by_name(tmp_path, monkeypatch):
    config = dataset(tmp_path)
    whole = FilmProcess.cut

    def hangs(self, path, parts, shots, scratch):
        if path.endswith("film.mp4"):
            for number, found in enumerate(whole(self, path, parts, shots, scratch)):
                if number == 2:
                    raise DecodeError("timeout", f"{path}: no progress in 60 s")
                yield found
        else:
            yield from whole(self, path, parts, shots, scratch)

    monkeypatch.setattr(FilmProcess, "cut", hangs)
    found = job.cut(config)
    assert found.counts["timeout"] == 4
    assert found.counts["cut"] == 1


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [("height", 4, "at least 16"), ("crf", 60, "0..51"), ("shots.detector", "x", "choose one of")],
)
def test_what_cannot_be_is_said(tmp_path, key, value, fix):
    config = dataset(tmp_path)
    holder = config.shots if "." in key else config
    setattr(holder, key.rpartition(".")[2], value)
    with pytest.raises(UserError, match=fix):
        job.cut(config)
