"""Small parts of training: schedules, guard, validation triples, simulation, watchdog, loader."""

import json
import math
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from helpers.toy_training import ToyDataset, ToyRecipe

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.training.config import (
    EmaConfig,
    GuardConfig,
    MixtureConfig,
    OptimizerConfig,
    PackConfig,
    TrainingConfig,
    ValidationConfig,
)
from loomvideo.platform.training.guard import SpikeGuard
from loomvideo.platform.training.loader import SampleError, StepLoader
from loomvideo.platform.training.order import SampleSizes, build_sources
from loomvideo.platform.training.packing import planner_of
from loomvideo.platform.training.progress import STEPS_FILE, Progress
from loomvideo.platform.training.schedule import ema_decay, learning_rate
from loomvideo.platform.training.simulate import simulate, suggest_budget
from loomvideo.platform.training.validation import fixed_triples, mean_losses, paired_change


def test_learning_rate_warms_up_and_ends_where_it_says():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_ratio=0.1)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=0)
    assert {learning_rate(constant, step, 20) for step in range(20)} == {1.0}


def test_ema_decay_grows_to_its_value():
    assert ema_decay(EmaConfig(0.99), 0) == pytest.approx(0.1)
    assert ema_decay(EmaConfig(0.99), 10**6) == 0.99
    assert ema_decay(EmaConfig(0.99, warmup=False), 0) == 0.99
    # The published constant, where the warm-up alone would still be at 0.9991.
    assert ema_decay(EmaConfig(0.9999), 9_999) < 0.9992
    assert ema_decay(EmaConfig(0.9999), 10_000) == 0.9999


def test_guard_skips_spikes_and_what_is_not_finite_and_continues_from_its_state():
    guard = SpikeGuard(GuardConfig(sigmas=6.0, warmup_steps=20))
    losses = [1.0 + 0.1 * math.sin(number) for number in range(60)]
    assert not any(guard.is_bad(loss) for loss in losses)
    assert guard.is_bad(float("nan"))
    assert guard.is_bad(5.0)
    assert guard.consecutive_skips == 2
    resumed = SpikeGuard(guard.config)
    resumed.load_state(guard.state())
    assert resumed.is_bad(5.0)
    assert not resumed.is_bad(1.0)
    assert resumed.consecutive_skips == 0
    guard.quarantine(["a"], from_step=10)
    assert guard.excluded(9) == set()
    assert guard.excluded(10) == {"a"}


def test_validation_triples_are_fixed_and_held_out():
    datasets, config = [ToyDataset("toy://64")], ValidationConfig(samples_per_task=3, levels=4)
    triples = fixed_triples(datasets, config)
    assert triples == fixed_triples(datasets, config)
    assert len(triples) == 2 * 3 * 4
    splits = datasets[0].index.column("split").to_pylist()
    assert {splits[triple.row] for triple in triples} == {"heldout"}
    assert sorted({triple.level for triple in triples}) == [0.125, 0.375, 0.625, 0.875]
    with pytest.raises(UserError, match=r"validation\.split=test: the shards have no such sample, only heldout, train"):
        fixed_triples(datasets, ValidationConfig(split="test"))


def test_mean_losses_weigh_samples_equally():
    rows = [("a", 0.5, 10.0, 10.0), ("a", 0.25, 600.0, 200.0), ("b", 0.5, 5.0, 1.0)]
    assert mean_losses(rows) == {
        "loss": 3.0, "task/a": 2.0, "task/b": 5.0, "level/0.25": 3.0, "level/0.50": 3.0,
    }  # fmt: skip


def test_paired_changes_carry_no_sampling_noise():
    before = [1.0, 9.0, 4.0, 6.0, 2.0, 2.0]
    after = [loss - 0.1 for loss in before]
    assert paired_change(before, after, 2) == pytest.approx((-0.1, 0.0))
    after[0] += 0.6
    assert paired_change(before, after, 2) == pytest.approx((0.0, 0.1))
    assert paired_change(before[:4], after, 2) is None
    assert paired_change([], after, 2) is None


def sources(lengths):
    names = ("key", "task", "dataset", "split")
    columns = zip(*((f"k{n}", "t2v", "x", "train") for n in range(len(lengths))), strict=True)
    return build_sources(
        [pa.table(dict(zip(names, map(list, columns), strict=True)))],
        [SampleSizes.plain(lengths)],
        "train",
        MixtureConfig(),
    )


def test_simulation_counts_and_suggests_a_budget_that_lengths_add_up_to():
    lengths = [600] * 40
    result = simulate(sources(lengths), PackConfig(tokens=1000), num_packs=4, num_steps=10)
    assert result.fill == pytest.approx(0.6)
    assert result.imbalance == 0
    assert result.draws == {"t2v/x": 40}
    assert result.epochs == {"t2v/x": 1.0}
    better = suggest_budget(sources(lengths), PackConfig(tokens=1000), 4)
    assert simulate(sources(lengths), PackConfig(tokens=better), 4, 10).fill >= 0.97


def loader(url, rank=0, world_size=1, num_steps=5):
    dataset, recipe, config = ToyDataset(url), ToyRecipe(), TrainingConfig()
    config.pack.tokens = 100
    planner = planner_of(recipe, [dataset], config, 4)
    return StepLoader(planner, recipe, [dataset], 0, rank, world_size, num_steps)


def test_ranks_load_the_packs_of_one_plan():
    whole, parts = loader("toy://64"), [loader("toy://64", rank, 3) for rank in range(3)]
    for _ in range(5):
        step, others = whole.next(), [part.next() for part in parts]
        assert all(other.draws == step.draws and other.state == step.state for other in others)
        keys = [pack.keys for pack, _ in step.packs]
        counted = [[pack.keys for pack, counts in other.packs if counts] for other in others]
        assert sorted(keys) == sorted(keys_of_pack for part in counted for keys_of_pack in part)
    for one in (whole, *parts):
        assert one.next() is None
        one.close()


def test_loader_names_the_sample_that_fails():
    failing = loader("toy://64/missing=5", num_steps=50)
    with pytest.raises(SampleError, match="sample k5 of toy: FileNotFoundError"):
        list(iter(failing.next, None))
    failing.close()


def test_watchdog_writes_stacks_and_ends_a_hanging_process(tmp_path):
    program = (
        "import time, pathlib\n"
        "from loomvideo.platform.training.watchdog import Watchdog\n"
        f"watchdog = Watchdog(0.3, pathlib.Path({str(tmp_path / 'hang.txt')!r}))\n"
        "for _ in range(6):\n    watchdog.beat()\n    time.sleep(0.1)\n"
        "def stuck_here():\n    time.sleep(60)\n"
        "stuck_here()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 75
    assert "no progress for" in ended.stderr
    assert "stuck_here" in (tmp_path / "hang.txt").read_text()


def test_a_full_disk_delays_recorded_steps_and_loses_none(tmp_path, capsys):
    folder = RunFolder.open(tmp_path, "pretrain", "a")
    # What is written to this device is refused as by a full disk.
    (folder.path / STEPS_FILE).symlink_to("/dev/full")
    progress = Progress(TrainingConfig(), folder, None)
    ready = {"rank": 0, "step": 0, "world_size": 1, "num_parameters": 1, "num_trainable": 1, "packs_per_step": 1}
    progress.add(ready | {"event": "ready"})
    names = ("step_s", "data_wait_s", "compute_s", "update_s", "tokens", "flops", "samples", "fill", "imbalance")
    record = dict.fromkeys((*names, "loss", "elements", "grad_norm", "learning_rate"), 1.0) | {"updated": True}
    for step in (1, 2):
        progress.add({"event": "steps", "rank": 0, "tags": [], "steps": [record | {"step": step}]})
    assert capsys.readouterr().err.count("No space left on device; steps are kept") == 1
    with (tmp_path / "room").open("ab") as room:
        os.dup2(room.fileno(), progress._file.fileno())
    progress.add({"event": "steps", "rank": 0, "tags": [], "steps": [record | {"step": 3}]})
    progress.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "room").read_text().splitlines()] == [1, 2, 3]


def test_steps_that_only_a_checkpoint_knows_are_recorded(tmp_path):
    folder = RunFolder.open(tmp_path, "toy", "one")
    names = ("loss", "grad_norm", "learning_rate", "tokens", "elements", "flops", "step_s", "data_wait_s", "samples")
    steps = [dict.fromkeys((*names, "fill", "imbalance"), 1.0) | {"step": n, "updated": True} for n in range(1, 7)]
    (folder.path / STEPS_FILE).write_text("".join(json.dumps(step) + "\n" for step in steps[:3]))
    progress = Progress(TrainingConfig(), folder, None)
    progress._world_size = 1
    progress.add({"event": "recorded", "steps": steps[1:]})
    progress.close()
    lines = (folder.path / STEPS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert progress.result()["train_s"] == 0


def test_warnings_of_ranks_are_kept_with_the_run_and_shown_once(tmp_path, capsys):
    folder = RunFolder.open(tmp_path, "pretrain", "a")
    progress = Progress(TrainingConfig(), folder, None)
    for rank in (0, 1):
        progress.add({"event": "steps", "rank": rank, "tags": [], "steps": [], "warnings": ["a kernel is replaced"]})
    progress.close()
    assert capsys.readouterr().err.count("warning: a kernel is replaced") == 1
    assert folder.read_json("warnings.json") == ["a kernel is replaced"]
