"""Work that fails as a whole: a GPU's own errors, a sample that takes its process with it, losses of one machine."""

import json
import os

import pytest
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.pipelines.prepare.attempts import ATTEMPT_FOLDER, Attempt, Watch, is_device_fault
from loomvideo.pipelines.prepare.config import LimitOptions
from loomvideo.pipelines.prepare.encode import SampleEncoder
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.storage import Storage

CUDA_ERROR = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def job(tmp_path, monkeypatch):
    built = without_ray(monkeypatch)
    samples = raw_samples(tmp_path / "raw", 8)
    return prepare_config(tmp_path / "raw", tmp_path / "out"), samples, built


def fail_with(monkeypatch, error, times):
    """Let encoding raise for the first calls; returns how often it was called."""
    original, calls = SampleEncoder.encode, []

    def encode(self, loaded, *rest):
        calls.append(loaded.sample.key)
        if len(calls) <= times:
            raise error
        return original(self, loaded, *rest)

    monkeypatch.setattr(SampleEncoder, "encode", encode)
    return calls


def note_exits(monkeypatch):
    """Let a worker that ends its process raise; returns the exit codes."""
    ended = []

    def end(code):
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    return ended


def test_which_errors_are_the_devices():
    assert is_device_fault(RuntimeError(CUDA_ERROR))
    assert is_device_fault(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    assert not is_device_fault(RuntimeError("The size of tensor a (3) must match"))
    assert not is_device_fault(ValueError(CUDA_ERROR))


def test_a_gpus_error_ends_the_process_and_costs_no_sample(job, monkeypatch):
    config, samples, built = job
    ended = note_exits(monkeypatch)
    fail_with(monkeypatch, RuntimeError(CUDA_ERROR), times=1)
    prepare(config)
    assert len(ShardDataset.open(config.output)) == len(samples)
    shards = [name for name in built if name != "shared"]
    assert len(shards) == len(set(shards)) + 1
    assert ended == [1]


def test_a_gpu_that_keeps_failing_ends_the_run_by_name(job, monkeypatch):
    config, _, _ = job
    note_exits(monkeypatch)
    monkeypatch.setattr("loomvideo.pipelines.prepare.builder.worker_place", lambda: "node-7 GPU 3")
    calls = fail_with(monkeypatch, RuntimeError(CUDA_ERROR), times=1000)
    config.limits = LimitOptions(device_faults=3)
    with pytest.raises(UserError, match=r"node-7 GPU 3 failed 3 times \(limits.device_faults=3\), last: .*illegal"):
        prepare(config)
    assert len(calls) == 3
    config.limits = LimitOptions(device_faults=100, attempts=2)
    with pytest.raises(UserError, match=r"its GPU failed in each of limits.attempts=2 attempts, last on node-7 GPU 3"):
        prepare(config)


def test_losses_of_one_reason_end_the_run_early_and_name_the_machine(job, monkeypatch):
    config, _, _ = job
    monkeypatch.setattr("loomvideo.pipelines.prepare.builder.worker_place", lambda: "node-7")
    monkeypatch.setattr("loomvideo.pipelines.prepare.attempts.FEW_SAMPLES", 0)
    calls = fail_with(monkeypatch, RuntimeError("shapes differ"), times=1000)
    with pytest.raises(UserError, match=r"lost to encode_error so far, .*max_loss=0.05 of 8; \d of them on node-7"):
        prepare(config)
    assert len(calls) < 8


@pytest.mark.parametrize("batch", [1, 4])
def test_a_sample_that_kills_its_process_is_left_out_at_the_third_attempt(job, monkeypatch, batch):
    config, _, _ = job
    original, deaths = SampleEncoder._described, []

    def described(self, loaded, *rest):
        if loaded.sample.key == "sample-003":
            deaths.append(loaded.sample.key)
            raise KeyboardInterrupt
        return original(self, loaded, *rest)

    monkeypatch.setattr(SampleEncoder, "_described", described)
    config.features.batch = batch
    monkeypatch.setattr("loomvideo.pipelines.prepare.job.os.urandom", lambda size: b"the same run")
    config.limits = LimitOptions(max_loss=0.5)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert prepare(config).summary()["quarantined"] == 1
    import pyarrow.parquet as pq

    (row,) = pq.read_table(f"{config.output}/quarantine.parquet").to_pylist()
    assert (row["key"], row["reason"], row["retriable"]) == ("sample-003", "repeated_crash", True)
    assert row["where"]
    assert len(deaths) == 2
    assert Storage(config.output).names(ATTEMPT_FOLDER) == []


def test_attempts_are_capped_and_those_of_another_run_do_not_count(tmp_path):
    storage = Storage(tmp_path)
    for _ in range(3):
        Attempt(storage, "train-000000", "run", 3)
    with pytest.raises(UserError, match=r"train-000000: its worker died 3 times \(limits.attempts=3\), last on"):
        Attempt(storage, "train-000000", "run", 3)
    attempt = Attempt(storage, "train-000000", "another", 3)
    assert json.loads(storage.read_bytes(f"{ATTEMPT_FOLDER}/train-000000.json"))["number"] == 1
    attempt.end()
    assert storage.names(ATTEMPT_FOLDER) == []


def test_counts_that_arrow_made_null_are_none():
    Watch(LimitOptions(), 10).see({"lost_by_reason": {"timeout": None}, "fault": "", "where": "a"})
