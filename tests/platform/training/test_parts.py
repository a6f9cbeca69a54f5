"""Small parts of training: schedules, guard, validation triples, simulation, watchdog, loader."""

import json
import math
import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow as pa
import pytest
from helpers.toy_training import ToyDataset, ToyRecipe
from ray.exceptions import RpcError
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.training import ray_trainer
from loomvideo.platform.training.config import (
    EmaConfig,
    GuardConfig,
    MixtureConfig,
    OptimizerConfig,
    PackConfig,
    TrainingConfig,
    ValidationConfig,
)
from loomvideo.platform.training.driver import _worker_environment
from loomvideo.platform.training.guard import SpikeGuard
from loomvideo.platform.training.loader import SampleError, StepLoader, load_draw
from loomvideo.platform.training.mailbox import WRITE_CHECKPOINT, Mailbox
from loomvideo.platform.training.order import SampleSizes, build_sources, continued_data, data_entry
from loomvideo.platform.training.packing import packs_for, planner_of
from loomvideo.platform.training.progress import STEPS_FILE, TrainingProgress
from loomvideo.platform.training.recipe import BaseRecipe
from loomvideo.platform.training.schedule import ema_decay, learning_rate
from loomvideo.platform.training.simulate import simulate, suggest_budget
from loomvideo.platform.training.validation import fixed_triples, mean_losses, paired_change
from loomvideo.platform.training.watchdog import recorder_environment


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


def test_watchdog_leaves_stacks_and_collectives_of_a_hanging_process(tmp_path):
    program = (
        "import time, pathlib, pickle, torch, torch.distributed as dist\n"
        "from loomvideo.platform import time_limits\n"
        "from loomvideo.platform.training import watchdog\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "watchdog.DUMP_GRACE = time_limits.TimeLimit(0.1, 'test', scaled=False)\n"
        "store = dist.FileStore(str(folder / 'store'), 1)\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "dist.all_reduce(torch.ones(3))\n"
        "dog = watchdog.Watchdog(0.3, folder / 'hang.txt', folder / 'flight' / 'nccl_trace_rank_0')\n"
        "for _ in range(6):\n    dog.beat()\n    time.sleep(0.1)\n"
        "def stuck_here():\n    time.sleep(60)\n"
        "stuck_here()\n"
    )
    environment = os.environ | recorder_environment(tmp_path / "flight")
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=500, check=False, env=environment
    )
    assert ended.returncode == 75, ended.stderr
    assert "no progress for" in ended.stderr
    assert "stuck_here" in (tmp_path / "hang.txt").read_text()
    recorded = pickle.loads((tmp_path / "flight" / "nccl_trace_rank_0").read_bytes())
    assert any("reduce" in entry["profiling_name"] for entry in recorded["entries"])


def test_a_full_disk_delays_recorded_steps_and_loses_none(tmp_path, capsys):
    folder = RunFolder.open(tmp_path, "pretrain", "a")
    # What is written to this device is refused as by a full disk.
    (folder.path / STEPS_FILE).symlink_to("/dev/full")
    progress = TrainingProgress(TrainingConfig(), folder, None)
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
    progress = TrainingProgress(TrainingConfig(), folder, None)
    progress._world_size = 1
    progress.add({"event": "recorded", "steps": steps[1:]})
    progress.close()
    lines = (folder.path / STEPS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert progress.result()["train_s"] == 0


def test_warnings_of_ranks_are_kept_with_the_run_and_shown_once(tmp_path, capsys):
    folder = RunFolder.open(tmp_path, "pretrain", "a")
    progress = TrainingProgress(TrainingConfig(), folder, None)
    for rank in (0, 1):
        progress.add({"event": "steps", "rank": rank, "tags": [], "steps": [], "warnings": ["a kernel is replaced"]})
    progress.close()
    assert capsys.readouterr().err.count("warning: a kernel is replaced") == 1
    assert folder.read_json("warnings.json") == ["a kernel is replaced"]


@pytest.mark.parametrize(
    ("ranks", "packs", "tokens"),
    [(64, 64, 16384), (56, 56, 18725), (128, 128, 8192), (48, 96, 10923), (32, 64, 16384), (52, 52, 20165)],
)
def test_lost_workers_change_packs_and_not_the_tokens_of_a_step(ranks, packs, tokens):
    assert packs_for(64 * 16384, 16384, ranks, 1.25) == (packs, tokens)


def state_of(datasets, mixture, step):
    history = [data_entry(0, [dataset.digest for dataset in datasets], mixture)]
    return {"step": step, "data": history, "datasets": history[0]["datasets"]}


def named(url, name):
    dataset = ToyDataset(url)
    dataset.index = dataset.index.set_column(2, "dataset", [[name] * len(dataset.index)])
    return dataset


def test_datasets_join_and_weights_change_at_a_recorded_step():
    old, new, mixture = named("toy://64", "old"), named("toy://40", "new"), MixtureConfig()
    state = state_of([old], mixture, 12)
    assert continued_data("run", state, [old], mixture) == state["data"]
    joined = continued_data("run", state, [new, old], mixture)
    assert [entry["step"] for entry in joined] == [0, 12]
    assert joined[-1]["datasets"] == ["toy://40", "toy://64"]
    changed = continued_data("run", state, [old], MixtureConfig(tasks={"a": 3.0}))
    assert changed[-1]["mixture"]["tasks"] == {"a": 3.0}
    with pytest.raises(UserError, match="datasets of the run so far are missing"):
        continued_data("run", state, [new], mixture)
    with pytest.raises(UserError, match="named dataset=old, as the run"):
        continued_data("run", state, [old, named("toy://40", "old")], mixture)


def test_a_dataset_that_joins_leaves_the_order_of_the_others():
    recipe, config = ToyRecipe(), TrainingConfig(seed=3)
    config.pack.tokens = 100
    old, new = named("toy://64", "old"), named("toy://40", "new")
    planner = planner_of(recipe, [old], config, 2)
    before = [draw for _ in range(4) for pack in planner.next_step() for draw in pack]
    alone, both = planner_of(recipe, [old], config, 2), planner_of(recipe, [new, old], config, 2)
    for other in (alone, both):
        other.load_state(planner.state())
    after = {
        name: [draw for _ in range(30) for pack in p.next_step() for draw in pack]
        for name, p in (("alone", alone), ("both", both))
    }
    seen = {(draw.key, draw.visit) for draw in before}
    of_old = [(draw.key, draw.visit) for draw in after["both"] if draw.dataset == 1]
    assert {draw.dataset for draw in after["both"]} == {0, 1}
    assert not seen & set(of_old)
    expected = [(draw.key, draw.visit) for draw in after["alone"]]
    assert set(of_old) <= set(expected)


def test_deaths_are_counted_in_a_window(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ray_trainer.time, "monotonic", lambda: now[0])
    policy = ray_trainer.FailuresInWindow(FailureConfig(max_failures=2), 100.0)
    error = WorkerGroupError("died", {0: RuntimeError("x")})
    decisions = []
    for at in (0, 60, 120, 180, 181, 182):
        now[0] = float(at)
        decisions.append(policy.make_decision(error) is FailureDecision.RETRY)
    assert decisions == [True, True, True, True, False, False]


def test_mailbox_asks_once_for_a_checkpoint_and_knows_when_it_is_written():
    box = Mailbox.__ray_metadata__.modified_class()
    assert not box.is_running()
    box.put({"event": "steps"})
    assert box.is_running()
    request = box.request_checkpoint()
    assert box.put({"event": "alive"}) == WRITE_CHECKPOINT
    assert box.put({"event": "alive"}) == ""
    assert not box.is_written(request)
    box.put({"event": "checkpointed"})
    assert box.is_written(request)
    box.note_stopped()
    assert not box.is_running()
    box.request_stop("asked to stop")
    box.request_checkpoint()
    assert box.put({"event": "alive"}) == "asked to stop"


def test_gpu_workers_allocate_in_segments_that_grow(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    config, folder = TrainingConfig(), RunFolder(tmp_path, "job", "name")
    assert "PYTORCH_ALLOC_CONF" not in _worker_environment(config, folder)
    config.workers.gpus = 1
    assert _worker_environment(config, folder)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    assert _worker_environment(config, folder)["PYTORCH_ALLOC_CONF"] == "backend:native"


def test_a_busy_cluster_is_asked_again_whether_it_has_a_dashboard(monkeypatch):
    answers = [RpcError("Timed out while waiting for GCS to become available."), [], ConnectionError("no dashboard")]

    def ask(address, **options):
        assert address == "10.0.0.1:6379"
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray_trainer, "list_actors", ask)
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(ray_trainer.ray, "get_runtime_context", lambda: context)
    assert ray_trainer._has_state_api()
    assert not ray_trainer._has_state_api()
    assert answers == []


def test_seconds_of_reading_are_told_and_shown(tmp_path, capsys):
    class SlowRecipe(BaseRecipe):
        def read(self, dataset, row_number, row, random):
            time.sleep(0.02)
            return row_number

        def load_example(self, dataset_index, row, sample, random):
            return sample

    index = pa.table({"key": ["a", "b"], "dataset": ["d", "d"]})
    draw = SimpleNamespace(dataset=0, row=1, key="b", visit=0)
    taken = []
    assert load_draw(SlowRecipe(), [SimpleNamespace(index=index)], draw, 0, taken.append) == 1
    assert taken[0] >= 0.02
    progress = TrainingProgress(TrainingConfig(steps=1), RunFolder.open(tmp_path, "pretrain", "a"), None)
    progress._world_size = 1
    names = ("step_s", "data_wait_s", "compute_s", "update_s", "tokens", "flops", "samples", "fill", "imbalance")
    record = dict.fromkeys((*names, "loss", "elements", "grad_norm", "learning_rate"), 1.0) | {"updated": True}
    reading = {"requests": 3, "hedged": 1}
    report = {"event": "steps", "rank": 0, "tags": [], "steps": [record | {"step": 1, "read_s": 0.25}]}
    progress.add({"event": "steps", "rank": 1, "tags": [], "steps": [], "reading": reading})
    progress.add(report | {"reading": reading})
    metrics = progress._metrics(report["steps"])
    assert (metrics["speed/read_s"], metrics["reading/requests"], metrics["reading/hedged"]) == (0.25, 6, 2)
    progress.close()
    assert progress.result()["read_s"] == 0.25
    assert "read 0.25 s" in capsys.readouterr().err
