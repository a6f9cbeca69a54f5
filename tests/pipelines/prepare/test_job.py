"""The prepare job: what is in a shard, accounts, reruns, resuming, changes."""

import dataclasses
import hashlib
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.model.codec import build_codec
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.prepare.config import ClipOptions, FeatureOptions, LimitOptions
from loomvideo.pipelines.prepare.encode import SampleEncoder
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.prepare.load import LoadedSample
from loomvideo.pipelines.prepare.loading import Decoder, mapped
from loomvideo.pipelines.sources.samples import write_jsonl
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset

CHANNELS = model_size("tiny").codec.latent_channels


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return folder, raw_samples(folder)


@pytest.fixture
def built(monkeypatch):
    return without_ray(monkeypatch)


def checksums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((Path(folder) / "shards").iterdir())}


def losses(folder):
    import pyarrow.parquet as pq

    return {row["key"]: row for row in pq.read_table(Path(folder) / "quarantine.parquet").to_pylist()}


@pytest.fixture(scope="module")
def finished(raw, tmp_path_factory):
    """A finished dataset that tests only read."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        output = tmp_path_factory.mktemp("finished")
        prepare(prepare_config(raw[0], output))
    return ShardDataset.open(output)


def test_every_task_is_complete(raw, finished):
    assert len(finished) == len(raw[1])
    for sample in raw[1]:
        stored = finished.read(finished.rows_by_key[sample.key])
        video = sample.task not in ("t2i", "image_edit")
        latents = (CHANNELS, 3 if video else 1, 8, 8)
        assert {name: tuple(t.shape) for name, t in stored.tensors["target"].items()} == {"mean.0": latents}
        assert ("source" in stored.tensors) == (sample.source is not None)
        assert ("refs" in stored.tensors) == bool(sample.references)
        features = stored.tensors["mllm"]
        assert ("visual.0" in features) == bool(sample.source or sample.references)
        assert features["full.0"].shape[1] == stored.metadata["mllm_tokens"]
        assert all(t.dtype == torch.bfloat16 for part in stored.tensors.values() for t in part.values())
        assert stored.metadata["text"] == sample.text
        assert stored.metadata["num_frames"] == (9 if video else 1)
        assert stored.metadata["deterministic"] is True
        row = finished.index.slice(finished.rows_by_key[sample.key], 1).to_pylist()[0]
        assert row["dit_tokens"] == (latents[1] + len(sample.references)) * 8 * 8
    assert finished.shared()["null"].shape[1] > 0


def test_latents_decode_to_the_target(raw, finished):
    sample = next(s for s in raw[1] if s.task == "t2i")
    stored = finished.read(finished.rows_by_key[sample.key])
    from PIL import Image

    picture = torch.from_numpy(np.array(Image.open(raw[0] / sample.target).convert("RGB")))
    shown = (
        build_codec(model_size("tiny").codec)
        .decode(stored.tensors["target"]["mean.0"][None].float())[0, :, 0]
        .permute(1, 2, 0)
    )
    error = (shown * 127.5 + 127.5 - picture).abs().mean()
    assert error < 25


def test_features_are_those_of_the_mllm(raw, finished):
    from loomvideo.model.conditioning.inputs import build_inputs
    from loomvideo.model.conditioning.mllm import FrozenMLLM

    mllm = FrozenMLLM.of_size(model_size("tiny"))
    sample = next(s for s in raw[1] if s.task == "t2v")
    inputs = build_inputs("t2v", sample.text, None, [], "full", mllm.tokenizer, mllm.processor)
    stored = finished.read(finished.rows_by_key[sample.key]).tensors["mllm"]["full.0"]
    torch.testing.assert_close(stored.float(), mllm.encode([inputs])[0], atol=0.02, rtol=0.02)


def test_groups_keep_to_one_split(raw, finished):
    splits = {}
    groups, named = finished.index.column("group").to_pylist(), finished.index.column("split").to_pylist()
    for group, split in zip(groups, named, strict=True):
        assert splits.setdefault(group, split) == split
    assert set(named) == {"train", "heldout"}


def test_counts_and_manifest(finished, raw):
    assert finished.manifest.counts["bars"] == {
        "inputs": 6, "written": 6, "filtered": 0, "duplicates": 0, "quarantined": 0,
    }  # fmt: skip
    assert set(finished.manifest.encoders) == {"codec", "mllm"}
    assert finished.manifest.devices == ["cpu"]
    assert finished.manifest.config["clips.num_frames"] == 9


def test_a_second_run_has_nothing_to_do(raw, tmp_path, built):
    config = prepare_config(raw[0], tmp_path)
    assert prepare(config).reason == "built"
    before = checksums(tmp_path)
    built.clear()
    again = prepare(config)
    assert (again.reason, again.built_shards, built) == ("up to date", 0, [])
    assert checksums(tmp_path) == before


def test_same_bytes_whatever_the_order_of_input_and_work(raw, tmp_path, built, finished):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "media").symlink_to(raw[0] / "media")
    write_jsonl(list(reversed(raw[1])), folder / "samples.jsonl")
    prepare(prepare_config(folder, tmp_path / "out"))
    assert checksums(tmp_path / "out") == checksums(finished.storage.root)
    for file in ("index.parquet", "manifest.json", "shared.safetensors", "quarantine.parquet"):
        assert (tmp_path / "out" / file).read_bytes() == Path(finished.storage.root, file).read_bytes(), file


def test_an_interrupted_run_resumes_to_the_same_bytes(raw, tmp_path, built, finished):
    config = prepare_config(raw[0], tmp_path)

    def interrupt(report, total):
        if report["unit"] != "shared":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, on_progress=interrupt)
    with pytest.raises(UserError, match="no finished dataset"):
        ShardDataset.open(tmp_path)
    first = set(built)
    built.clear()
    result = prepare(config)
    assert result.reused_shards == 1
    assert first.isdisjoint(built)
    assert checksums(tmp_path) == checksums(finished.storage.root)


def test_a_damaged_shard_is_rebuilt(raw, tmp_path, built):
    config = prepare_config(raw[0], tmp_path)
    prepare(config)
    before = checksums(tmp_path)
    victim = sorted(tmp_path.glob("shards/*.tar"))[0]
    victim.write_bytes(victim.read_bytes()[:-512])
    built.clear()
    assert "damaged" in prepare(config).reason
    assert built == [victim.stem]
    assert checksums(tmp_path) == before


def test_changed_text_redoes_one_shard_and_only_its_features(raw, tmp_path, built, monkeypatch):
    config = prepare_config(raw[0], tmp_path)
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "media").symlink_to(raw[0] / "media")
    config.input = str(folder / "samples.jsonl")
    write_jsonl(raw[1], folder / "samples.jsonl")
    prepare(config)
    before = ShardDataset.open(tmp_path)
    old = [before.read(row) for row in range(len(before))]
    changed = [dataclasses.replace(s, caption="a new caption") if s.key == "sample-003" else s for s in raw[1]]
    write_jsonl(changed, folder / "samples.jsonl")
    built.clear()

    def no_decoding(*arguments):
        raise AssertionError("pixels were decoded again")

    monkeypatch.setattr("loomvideo.pipelines.prepare.load.SampleLoader._windows", no_decoding)
    monkeypatch.setattr("loomvideo.pipelines.prepare.load.SampleLoader._picture", no_decoding)
    assert prepare(config).reason == "rebuilt: changed input"
    after = ShardDataset.open(tmp_path)
    assert built == [after.index.column("shard")[after.rows_by_key["sample-003"]].as_py()]
    for sample in old:
        new = after.read(after.rows_by_key[sample.key])
        assert torch.equal(new.tensors["target"]["mean.0"], sample.tensors["target"]["mean.0"])
        assert (new.metadata == sample.metadata) == (sample.key != "sample-003")


def test_changed_media_is_noticed(raw, tmp_path, built):
    folder = tmp_path / "raw"
    samples = raw_samples(folder, 6)
    config = prepare_config(folder, tmp_path / "out")
    prepare(config)
    target = folder / samples[1].target
    (folder / samples[4].target).replace(target)
    (folder / samples[4].target).write_bytes(target.read_bytes())
    built.clear()
    result = prepare(config)
    assert "media files changed" in result.reason
    assert 1 <= len(built) <= 2


def test_stale_configuration_says_why(raw, tmp_path, built):
    prepare(prepare_config(raw[0], tmp_path))
    result = prepare(prepare_config(raw[0], tmp_path, clips=ClipOptions(num_frames=5, buckets=[64])))
    assert result.reason == "rebuilt: changed config (clips.num_frames 9 -> 5)"
    assert result.reused_shards == 0
    # Worker settings change nothing that is written.
    config = prepare_config(raw[0], tmp_path, clips=ClipOptions(num_frames=5, buckets=[64]))
    config.workers.ready_bytes = 1
    assert prepare(config).reason == "up to date"


def test_windows(raw, tmp_path, built):
    prepare(prepare_config(raw[0], tmp_path, clips=ClipOptions(num_frames=5, buckets=[64], windows=3)))
    dataset = ShardDataset.open(tmp_path)
    edit = dataset.read(dataset.rows_by_key["sample-000"])
    assert edit.metadata["num_windows"] == 3
    assert set(edit.tensors["target"]) == set(edit.tensors["source"]) == {"mean.0", "mean.1", "mean.2"}
    assert edit.metadata["mllm_index"] == [0, 1, 2]
    assert {"full.2", "visual.2"} <= set(edit.tensors["mllm"])
    assert not torch.equal(edit.tensors["target"]["mean.0"], edit.tensors["target"]["mean.2"])
    generation = dataset.read(dataset.rows_by_key["sample-003"])
    assert generation.metadata["mllm_index"] == [0, 0, 0]
    assert set(generation.tensors["mllm"]) == {"full.0"}
    assert dataset.read(dataset.rows_by_key["sample-001"]).metadata["num_windows"] == 1


def test_every_loss_has_a_reason(raw, tmp_path, built):
    folder = tmp_path / "raw"
    samples = raw_samples(folder, 12)
    (folder / samples[0].source).unlink()
    (folder / samples[3].target).write_bytes(b"not a video at all" * 50)
    lines = (folder / "samples.jsonl").read_text().splitlines()
    lines += ["{broken", lines[5], json.dumps({**json.loads(lines[6]), "caption": "another"}), '{"key": "x"}']
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    config = prepare_config(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"1 of 16 samples were lost to \w+ \(limits.max_loss=0.05\)"):
        prepare(config)
    built.clear()
    config.limits = LimitOptions(max_loss=0.5)
    result = prepare(config)
    assert built == []  # the shards were committed before the check
    table = losses(tmp_path / "out")
    assert {key: row["reason"] for key, row in table.items()} == {
        "sample-000": "missing_file",
        "sample-003": "unreadable",
        "samples.jsonl:13": "invalid_json",
        "sample-005": "repeated_line",
        "sample-006": "repeated_key",
        "samples.jsonl:16": "invalid_sample",
    }
    assert table["sample-000"]["retriable"]
    assert not table["sample-003"]["retriable"]
    assert result.summary()["inputs"] == 16
    assert result.summary()["written"] == 10
    assert result.summary()["duplicates"] == 1
    # A file that appears is picked up by the next run.
    (folder / samples[0].source).write_bytes((folder / samples[0].target).read_bytes())
    assert prepare(config).summary()["written"] == 11


def test_short_clips_are_filtered(raw, tmp_path, built):
    config = prepare_config(raw[0], tmp_path, clips=ClipOptions(num_frames=17, buckets=[64], min_frames=13))
    prepare(config)
    reasons = {row["reason"] for row in losses(tmp_path).values()}
    assert reasons == {"too_short"}
    assert len(ShardDataset.open(tmp_path)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "/nowhere/samples.jsonl"}, "/nowhere/samples.jsonl: no such file or folder"),
        ({"model": "huge"}, "model=huge: choose one of"),
        ({"decoder": "x"}, "decoder=x: choose one of auto, decord, pyav"),
        ({"clips": ClipOptions(num_frames=10)}, "clips.num_frames=10: must be 4k.1, for example 9"),
        ({"features": FeatureOptions(batch=0)}, "features.batch=0: must be at least 1"),
        ({"clips": ClipOptions(windows=0)}, "clips.windows=0: must be at least 1"),
    ],
)
def test_mistakes_are_named(raw, tmp_path, built, change, message):
    with pytest.raises(UserError, match=message):
        prepare(prepare_config(raw[0], tmp_path, **change))


def test_a_decoder_that_is_not_installed_is_named(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"decoder=decord: decord is not installed; make setup EXTRAS=decord"):
        prepare_config(raw[0], tmp_path, decoder="decord").check()


def test_two_shards_at_a_time_and_decoders_elsewhere_change_no_byte(raw, tmp_path, monkeypatch, finished):
    places = []

    class InThisProcess(Decoder):
        def wait(self):
            places.append(self.place())

        def load(self, plan):
            # As through the object store: what comes back may not be written to.
            loaded = pickle.loads(pickle.dumps(super().load(pickle.loads(pickle.dumps(plan)))))
            return mapped(loaded, torch.from_numpy) if isinstance(loaded, LoadedSample) else loaded

        def close(self):
            self._loader.close()

    def run(stage, config, work):
        worker = stage.worker(config)
        with ThreadPoolExecutor(2) as threads:
            reports.extend(threads.map(worker, work))
        worker.close()
        return reports

    reports = []
    monkeypatch.setattr("loomvideo.pipelines.prepare.builder.DecoderHandle", InThisProcess)
    monkeypatch.setattr("loomvideo.pipelines.prepare.job.run_stage", run)
    config = prepare_config(raw[0], tmp_path)
    config.workers.decoders = 2
    prepare(config)
    assert len(places) == 2
    assert max(report["decoders"] for report in reports) >= 1
    assert sum(report["load_s"] for report in reports) > 0
    assert checksums(tmp_path) == checksums(finished.storage.root)


def test_batches_make_the_same_members_up_to_rounding(raw, tmp_path, built, monkeypatch, finished):
    from loomvideo.model.codec.learned import LearnedCodec

    original, sizes = LearnedCodec.encode, []
    monkeypatch.setattr(LearnedCodec, "encode", lambda self, video: sizes.append(len(video)) or original(self, video))
    config = prepare_config(raw[0], tmp_path)
    config.features.batch = 3
    prepare(config)
    assert max(sizes) > 1
    dataset = ShardDataset.open(tmp_path)
    assert dataset.index.column("key") == finished.index.column("key")
    for row in range(len(dataset)):
        stored, alone = dataset.read(row), finished.read(row)
        assert stored.metadata == alone.metadata
        for member, tensors in alone.tensors.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(stored.tensors[member][name], tensor, atol=0.02, rtol=0.02)
    assert prepare(prepare_config(raw[0], tmp_path)).reason == "up to date"


def test_a_batch_that_fails_costs_the_sample_that_fails(raw, tmp_path, built, monkeypatch):
    original = SampleEncoder.encode_together

    def encode_together(self, batch, split, ready=None):
        if any(loaded.sample.key == "sample-003" for loaded, _ in batch):
            raise RuntimeError("shapes differ")
        return original(self, batch, split)

    monkeypatch.setattr(SampleEncoder, "encode_together", encode_together)
    config = prepare_config(raw[0], tmp_path, limits=LimitOptions(max_loss=0.5))
    config.features.batch = 4
    assert prepare(config).summary()["written"] == 11
    assert {key: row["reason"] for key, row in losses(tmp_path).items()} == {"sample-003": "encode_error"}


def test_on_a_ray_cluster(raw, tmp_path, ray_cluster, finished):
    config = prepare_config(raw[0], tmp_path)
    config.workers.count, config.workers.decoders, config.workers.decoder_cpus = 1, 2, 0.0
    reports = []
    result = prepare(config, on_progress=lambda report, total: reports.append((report["unit"], total)))
    assert len(reports) == result.built_shards + 1 == reports[0][1]
    assert checksums(tmp_path) == checksums(finished.storage.root)
