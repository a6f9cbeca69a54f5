"""Captioning a dataset: any layout in, a sample file with texts out, every sample accounted for."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from loomvideo.jobs.data.caption import write
from loomvideo.pipelines.captions import Captioner, CaptionOptions
from loomvideo.pipelines.captions.dataset import CaptionActor, CaptionDatasetConfig, caption_dataset
from loomvideo.pipelines.captions.frames import FrameReader
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.sample_data.media import write_clip, write_picture
from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.samples import Sample, read_jsonl
from loomvideo.pipelines.vlm.clients import Reply
from loomvideo.pipelines.vlm.requests import decode_frames
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.storage import Storage


class Model:
    """Says how bright the picture is."""

    def identity(self):
        return {"model": "m"}

    def complete(self, request):
        level = round(decode_frames(request.media[-1]).mean() / 10) * 10
        name = "instruction" if request.mode == "instruction" else "sentence"
        return Reply(json.dumps({"id": request.code, name: f"brightness is {level}"}), "m", 1, 1, 0.0)


@pytest.fixture
def raw(tmp_path) -> Path:
    """Videos without a word about them, as a table, and one that is no video."""
    for number in (1, 2):
        write_clip(tmp_path / f"{number}.mp4", [np.full((64, 64, 3), 40 * number, np.uint8)] * 9)
    write_picture(tmp_path / "3.png", np.full((48, 48, 3), 200, np.uint8))
    (tmp_path / "4.mp4").write_bytes(b"?")
    rows = [{"video": "1.mp4"}, {"video": "2.mp4", "caption": "known"}, {"video": "3.png"}, {"video": "4.mp4"},
            {"video": "2.mp4", "source": "1.mp4"}]  # fmt: skip
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
    return tmp_path / "table.jsonl"


def config(raw: Path, **captions) -> CaptionDatasetConfig:
    options = CaptionOptions(
        backend="openai", mode="caption", cache=str(raw.parent / "cache"), num_frames=3, max_side=32
    )
    return CaptionDatasetConfig(str(raw), str(raw.parent / "out"), captions=dataclasses.replace(options, **captions))


def ask_model(options, samples):
    reader = FrameReader(options.num_frames, options.max_side)
    yield from Captioner(options, Model()).run(samples, reader)
    reader.close()


def test_samples_that_lack_only_a_text_are_told_from_mistakes(raw):
    outcomes = [o for o in open_source(str(raw)) if isinstance(o, Rejected)]
    assert [(o.reason, o.unfinished is not None) for o in outcomes] == [("no_text", True)] * 4 + [
        ("invalid_json", False)
    ]
    own = raw.parent / "own.jsonl"
    lines = [{"key": "a", "task": "t2v", "dataset": "d", "target": "1.mp4"},
             {"key": "b", "task": "video_edit", "dataset": "d", "target": "1.mp4"}]  # fmt: skip
    own.write_text("\n".join(map(json.dumps, lines)))
    first, second = open_source(str(own))
    assert first.unfinished == Sample("a", "t2v", "d", str(raw.parent / "1.mp4"))
    assert (second.reason, second.unfinished) == ("invalid_sample", None)


def test_texts_are_written_and_every_input_is_in_the_ledger(raw):
    result = caption_dataset(config(raw), ask_model)
    write(result, Storage(raw.parent / "out"))
    samples = list(read_jsonl(raw.parent / "out" / "samples.jsonl"))
    assert [s.caption for s in samples] == ["brightness is 40", "known", "brightness is 200"]
    ledger = pq.read_table(raw.parent / "out" / "captions.parquet").to_pylist()
    assert [(r["status"], r["written"]) for r in ledger] == [
        ("made", True), ("existing", True), ("made", True), ("unreadable", False), ("existing", False),
        ("invalid_json", False)]  # fmt: skip


def test_instructions_for_pairs(raw):
    result = caption_dataset(config(raw, mode="instruction"), ask_model)
    assert [(s.task, s.text) for s in result.samples] == [("t2v", "known"), ("video_edit", "brightness is 80")]


def test_nothing_at_the_end_is_a_mistake(raw):
    raw.write_text('{"video": "4.mp4"}\n')
    with pytest.raises(UserError, match=r"no sample has a text at the end; first: .*4\.mp4"):
        caption_dataset(config(raw), ask_model)


def test_frames_are_few_small_and_spread(tmp_path):
    write_clip(tmp_path / "a.mp4", [np.full((64, 96, 3), 10 * i, np.uint8) for i in range(21)])
    reader = FrameReader(3, 48, base=str(tmp_path))
    write_picture(tmp_path / "dress.png", np.full((96, 64, 3), 200, np.uint8))
    assert reader(Sample("a", "t2v", "d", "a.mp4", caption="x"))[1:] == (None, ())
    target, source, references = reader(Sample("a", "mi2v", "d", "a.mp4", references=["dress.png"] * 2))
    assert source is None
    assert [picture.shape for picture in references] == [(1, 48, 32, 3)] * 2
    assert target.shape == (3, 32, 48, 3)
    assert np.abs(target.mean((1, 2, 3)) - [0, 100, 200]).max() < 4
    with pytest.raises(DecodeError):
        reader(Sample("a", "t2v", "d", "gone.mp4", caption="x"))
    reader.close()


def test_an_actor_takes_and_gives_rows_of_text(raw):
    # Its own backend needs a model's weights: existing texts go the same way.
    actor = CaptionActor(CaptionOptions(backend="existing"))
    for sample, status in ((Sample("a", "t2v", "d", "1.mp4"), "no_text"),
                           (Sample("b", "t2v", "d", "1.mp4", caption="x"), "existing")):  # fmt: skip
        row = actor({"sample": sample.to_json()})
        assert Sample(**json.loads(row["sample"])) == sample
        assert (json.loads(row["result"])["key"], json.loads(row["result"])["status"]) == (sample.key, status)
