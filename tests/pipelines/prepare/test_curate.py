"""Curation in the prepare job: decisions, scores in the index, accounts, duplicates, shots, reruns."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fixtures.media import moving_frames, write_picture, write_video
from fixtures.raw import prepare_config, without_ray

from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.prepare.config import LimitOptions
from loomvideo.pipelines.prepare.curation.options import QualityLimits, StageOptions
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.prepare.quarantine import retriable_work
from loomvideo.pipelines.prepare.staleness import stale_parts
from loomvideo.pipelines.sources.samples import Sample, write_jsonl
from loomvideo.platform.shards.reader import ShardDataset


def textured(num_frames, seed, size=96):
    """Frames of seeded texture that moves a pixel a frame."""
    pattern = np.random.default_rng(seed).integers(0, 255, (size // 8, size // 8, 3), np.uint8)
    picture = pattern.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, number, axis=1) for number in range(num_frames)])


@pytest.fixture
def curated(tmp_path, monkeypatch):
    """A raw dataset with one of each kind, and its configuration."""
    built = without_ray(monkeypatch)
    raw = tmp_path / "raw"
    first = textured(13, 1)
    write_video(raw / "a.mp4", first)
    write_video(raw / "inverted.mp4", 255 - first)
    write_video(raw / "black.mp4", np.zeros_like(first))
    write_picture(raw / "b.png", textured(1, 2)[0])
    samples = [
        Sample("edit", "video_edit", "set", "inverted.mp4", "a.mp4", instruction="invert it"),
        Sample("no-op", "video_edit", "set", "a.mp4", "a.mp4", instruction="invert it"),
        Sample("black", "t2v", "set", "black.mp4", caption="night"),
        Sample("picture", "t2i", "set", "b.png", caption="a texture"),
        Sample("picture-again", "t2i", "set", "b.png", caption="a texture"),
        Sample("gone", "t2i", "set", "gone.png", caption="a texture"),
    ]
    write_jsonl(samples, raw / "samples.jsonl")
    config = prepare_config(raw, tmp_path / "out", limits=LimitOptions(max_loss=0.5), curate=True)
    config.stages = StageOptions(quality=QualityLimits(min_sharpness=1.0, max_frozen_share=0.0))
    return config, built, samples


def outcomes(config):
    table = pq.read_table(f"{config.output}/quarantine.parquet").to_pylist()
    return {row["key"]: (row["outcome"], row["reason"]) for row in table}


def test_decisions_scores_and_accounts(curated):
    config, built, _ = curated
    result = prepare(config)
    assert outcomes(config)["no-op"] == ("filtered", "no_op")
    assert outcomes(config)["black"][0] == "filtered"
    assert outcomes(config)["picture-again"] == ("duplicates", "exact_duplicate")
    assert outcomes(config)["gone"] == ("quarantined", "missing_file")
    assert result.manifest.counts["set"] == {
        "inputs": 6, "written": 2, "filtered": 2, "duplicates": 1, "quarantined": 1,
    }  # fmt: skip
    dataset = ShardDataset.open(config.output)
    assert set(dataset.rows_by_key) == {"edit", "picture"}
    scores = [name for name in dataset.index.column_names if name.startswith("score_")]
    assert {"score_sharpness", "score_relation"} & set(scores)
    row = dataset.index.slice(dataset.rows_by_key["edit"], 1).to_pylist()[0]
    stored = dataset.read(dataset.rows_by_key["edit"]).metadata["scores"]
    assert stored
    assert all(row[f"score_{name}"] == pytest.approx(value) for name, value in stored.items())
    built.clear()
    assert prepare(config).reason == "up to date"
    assert built == []


def test_scoring_without_dropping(curated):
    config, _, _ = curated
    config.stages = dataclasses.replace(config.stages, score_only=True)
    result = prepare(config)
    assert result.summary()["written"] == 5
    dataset = ShardDataset.open(config.output)
    assert "no_op" in dataset.read(dataset.rows_by_key["no-op"]).metadata["reasons"]


def refuse(assessor, path, fps):
    raise DecodeError("missing_file", f"{path}: no such file")


def test_a_changed_threshold_assesses_again_and_encodes_nothing_twice(curated, monkeypatch):
    config, built, _ = curated
    prepare(config)
    built.clear()
    config.stages.pairs.min_change = 0.0
    monkeypatch.setattr("loomvideo.pipelines.prepare.encode.SampleEncoder._moments", None)
    monkeypatch.setattr("loomvideo.pipelines.prepare.encode.SampleEncoder._mllm_inputs", None)
    monkeypatch.setattr("loomvideo.pipelines.prepare.curate.SampleAssessor._clip", refuse)
    config.stages.keep_reasons = ["black"]
    result = prepare(config)
    assert "stages.keep_reasons" in result.reason
    assert any(name.startswith("assess") for name in built)
    # The one that cannot be decoded is tried again; the scores of the others are kept.
    assert (result.work["assessed"], result.work["decoded"]) == (6, 1)


def test_diff_knows_who_was_dropped(curated):
    config, built, _ = curated
    prepare(config)
    built.clear()
    assert stale_parts(config) == []
    config.stages.pairs.min_change = 0.0
    assert {(part.what, part.name) for part in stale_parts(config)} == {
        ("config", "stages.pairs.min_change"), ("assess", "assess-000000")}  # fmt: skip
    assert built == []


def test_what_could_not_be_assessed_is_retried(curated):
    config, built, _ = curated
    prepare(config)
    folder = Path(config.input).parent
    # The same stamp as before, which is none: only asking again finds the file.
    assert retriable_work(config.output) == {"assess-000000"}
    write_picture(folder / "gone.png", textured(1, 5)[0])
    built.clear()
    result = prepare(config, again=retriable_work(config.output))
    assert built[0] == "assess-000000"
    assert result.summary()["quarantined"] == 0
    assert retriable_work(config.output) == set()


def test_shifted_pairs_are_brought_in_step(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    steps = np.random.default_rng(3).integers(1, 4, 30).cumsum()
    take = np.stack([np.roll(textured(1, 6)[0], step, axis=1) for step in steps])
    write_video(tmp_path / "raw" / "source.mp4", take[4:])
    write_video(tmp_path / "raw" / "target.mp4", 255 - take[:-4])
    pair = Sample("pair", "video_edit", "set", "target.mp4", "source.mp4", instruction="invert it")
    write_jsonl([pair], tmp_path / "raw" / "samples.jsonl")
    config = prepare_config(tmp_path / "raw", tmp_path / "out", curate=True)
    config.stages.quality.enabled = False
    prepare(config)
    metadata = ShardDataset.open(config.output).read(0).metadata
    assert metadata["scores"]["pair_offset_frames"] == 4
    assert metadata["media"] == {"source": "source.mp4", "target": "target.mp4#frames=4,", "references": []}
    assert metadata["reasons"] == ["temporal_offset"]
    config.stages.pairs.realign = False
    config.input = str(tmp_path / "raw" / "samples.jsonl")
    prepare(config)
    assert outcomes(config)["pair"] == ("filtered", "temporal_offset")


def test_long_videos_become_shots(tmp_path, monkeypatch):
    pytest.importorskip("scenedetect")
    without_ray(monkeypatch)
    film = np.concatenate([textured(30, 3), 255 - textured(30, 4) // 3])
    write_video(tmp_path / "raw" / "film.mp4", film)
    write_jsonl([Sample("film", "t2v", "set", "film.mp4", caption="two scenes")], tmp_path / "raw" / "samples.jsonl")
    config = prepare_config(tmp_path / "raw", tmp_path / "out", curate=True)
    config.stages.quality.enabled = False
    config.stages.shots.detector = "scenedetect"
    config.stages.shots.min_duration_s = 0.5
    result = prepare(config)
    dataset = ShardDataset.open(config.output)
    assert sorted(dataset.rows_by_key) == ["film-shot000", "film-shot001"]
    assert set(dataset.index.column("group").to_pylist()) == {"film"}
    assert result.summary()["inputs"] == 2


def test_moving_bars_pass_as_they_are(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    write_video(tmp_path / "raw" / "a.mp4", moving_frames(13, 96, 96))
    write_jsonl([Sample("bars", "t2v", "set", "a.mp4", caption="bars")], tmp_path / "raw" / "samples.jsonl")
    config = prepare_config(tmp_path / "raw", tmp_path / "out", curate=True)
    config.stages.quality.min_brightness = 0.0
    assert prepare(config).summary()["written"] == 1
