"""The whole path on Ray: driver, workers, a killed worker, the record of steps, the resume audit."""

import functools
import json

import pytest
from helpers.toy_training import DeadlyRecipe, ToyDataset, ToyRecipe

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.training.audit import audit_resume
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.driver import train

pytestmark = pytest.mark.slow


class Metrics:
    """Keeps what a tracker would get."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=0):
        self.rows.append((step, metrics))


def config():
    result = TrainingConfig(steps=40, precision="fp32", log_every=2)
    result.pack.tokens = 200
    result.optimizer.learning_rate, result.optimizer.warmup_steps = 3e-3, 2
    result.ema.decay = 0.9
    result.checkpoint.every_steps, result.checkpoint.keep_last = 2, 100
    result.workers.max_failures = 1
    result.peak_tflops, result.profile_steps = 1e-3, [2]
    result.validation.every_steps, result.validation.beside = 10, True
    return result


@pytest.fixture(scope="module")
def run(ray_cluster, tmp_path_factory):
    """A run of the toy in which one worker is killed once."""
    root = tmp_path_factory.mktemp("runs")
    folder, metrics = RunFolder.open(root, "toy", "one"), Metrics()
    marker = root / "killed"
    result = train(
        config(),
        functools.partial(DeadlyRecipe, marker),
        ["toy://64"],
        folder,
        metrics,
        ToyDataset,
        last_step=20,
        predict=lambda ready: {"step_s": 0.01 * ready["world_size"]},
    )
    return folder, metrics, result, marker


def test_a_killed_worker_costs_no_recorded_step(run):
    folder, metrics, result, marker = run
    assert marker.exists()
    steps = [json.loads(line)["step"] for line in (folder.path / "steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))
    assert result["steps"] == 20
    assert result["first_step"] > 0
    tracked = [step for step, values in metrics.rows if "train/loss" in values]
    assert tracked == sorted(set(tracked))
    assert tracked[-1] == 20


def test_what_is_seen_of_a_run(run):
    folder, metrics, result, _ = run
    last = {name: value for _, values in metrics.rows for name, value in values.items()}
    assert last["run/restarts"] == result["restarts"] == 1
    assert last["plan/step_s"] == 0.02
    assert last["plan/achieved_over_predicted_speed"] > 0
    assert last["speed/mfu"] == pytest.approx(last["speed/tflops_per_worker"] / 1e-3)
    assert 0 <= last["checkpoint/age_s"] < 60
    node = next(name.split("/")[1] for name in last if name.startswith("system/"))
    assert last[f"system/{node}/memory_used_gib"] > 0.1
    assert (folder.path / "profile" / "step-00000002.json.gz").stat().st_size > 1000
    assert "aten::addmm" in (folder.path / "profile" / "step-00000002.txt").read_text()


def test_validation_ran_beside_training(run):
    rows = [json.loads(line) for line in (run[0].path / "validation.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20
    assert {"loss", "task/a", "task/b"} <= set(rows[-1]["ema"]) & set(rows[-1]["raw"])


def test_audit_finds_the_repetition_equal(run, tmp_path):
    rows = audit_resume(run[0].path, config(), ToyRecipe, ["toy://64"], tmp_path, 14, 6, ToyDataset)
    assert [row.step for row in rows] == list(range(15, 21))
    assert all(row.same_keys and row.same_bits for row in rows)


def test_audit_needs_recorded_steps(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 19 with 5 recorded steps after it"):
        audit_resume(run[0].path, config(), ToyRecipe, ["toy://64"], tmp_path, 19, 5, ToyDataset)


def test_mistakes_on_workers_are_user_errors_of_the_driver(run, tmp_path):
    folder = RunFolder.open(tmp_path, "toy", "missing")
    with pytest.raises(UserError, match="sample k5 of toy: FileNotFoundError"):
        train(config(), ToyRecipe, ["toy://64/missing=5"], folder, None, ToyDataset)
