"""Where a run starts, and what is planned for it."""

import json
import os
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from loomvideo.jobs.training.checkpoint_samples import sampling_tasks
from loomvideo.jobs.training.config import TrainingJobConfig
from loomvideo.jobs.training.plan import MACHINES, machine_named, plan
from loomvideo.jobs.training.setup import START_FILE, Start, check_folders, check_start, predictor, start_of
from loomvideo.model.sizes import PIPELINE_FILE, model_size, with_folders
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError


def finished(runs, name, time):
    folder = runs / "pretrain" / name
    (folder / "weights").mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    os.utime(folder / "result.json", (time, time))


def test_strips_without_samples_are_said_to_be_left_out():
    config, said = TrainingJobConfig(), []
    assert sampling_tasks(config, None, None, None, {"t2v"}, said.append) == said == []
    config.samples.every_steps = 200
    assert sampling_tasks(config, None, None, None, {"t2v"}, said.append) == []
    assert said == ["samples.every_steps=200: no strips are made; set evaluation.samples to a sample file"]
    config.evaluation.samples = "samples.jsonl"
    (task,) = sampling_tasks(config, None, None, None, {"t2v"}, said.append)
    assert (task.name, len(said)) == ("samples", 1)


def test_a_continued_run_keeps_its_start(tmp_path):
    config = TrainingJobConfig(runs=str(tmp_path), run="edit")
    with pytest.raises(UserError, match="no finished pretrain run in"):
        start_of(config, "finetune-edit", "pretrain")
    finished(tmp_path, "one", 1000)
    first = start_of(config, "finetune-edit", "pretrain")
    assert first == Start(str(tmp_path / "pretrain/one/weights"), "pretrain/one")
    folder = tmp_path / "finetune-edit" / "edit"
    folder.mkdir(parents=True)
    (folder / START_FILE).write_text(json.dumps({"weights": first.weights, "parent": first.parent}))
    finished(tmp_path, "two", 2000)
    assert start_of(config, "finetune-edit", "pretrain") == first
    config.run = "other"
    assert start_of(config, "finetune-edit", "pretrain").parent == "pretrain/two"
    config.run, config.from_run = "edit", "two"
    assert start_of(config, "finetune-edit", "pretrain").parent == "pretrain/two"
    config.from_run, config.from_weights = "", str(tmp_path / "absent")
    with pytest.raises(UserError, match="absent: no such weights"):
        start_of(config, "finetune-edit", "pretrain")


def test_weights_of_other_encoders_are_refused(tmp_path):
    dataset = SimpleNamespace(manifest=SimpleNamespace(encoders={"codec": "lapped-1", "mllm": "random-2"}))
    note = tmp_path / PIPELINE_FILE
    for stated in ({}, {"encoders": {"codec": "lapped-1", "mllm": "random-2"}}, {"encoders": {"codec": "lapped-1"}}):
        note.write_text(json.dumps({"model": "tiny"} | stated))
        check_start(str(tmp_path), "data/shards", dataset)
    check_start(str(tmp_path / "gen_model.pth"), "data/shards", dataset)
    note.write_text(json.dumps({"model": "tiny", "encoders": {"codec": "lapped-1", "mllm": "random-1"}}))
    with pytest.raises(UserError, match=r"data/shards: encoded by mllm random-2, but .* was trained with random-1"):
        check_start(str(tmp_path), "data/shards", dataset)


def test_validation_reads_the_split_that_prepare_writes():
    sample = Sample(key="a", task="t2i", dataset="d", target="a.png", caption="a", group="g")
    assert TrainingJobConfig().training.validation.split == sample.assigned_split(heldout_fraction=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora.rank": 4, "training.optimizer.trainable": ["blocks.*"]}, "name the patterns in lora.unfreeze"),
        ({"samples.every_steps": 30, "training.checkpoint.every_steps": 20}, "use a multiple of"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(change, message):
    config = TrainingJobConfig()
    config.data.shards = ["shards"]
    for key, value in change.items():
        *path, last = key.split(".")
        section = config
        for name in path:
            section = getattr(section, name)
        setattr(section, last, value)
    with pytest.raises(UserError, match=message):
        config.check()


def test_the_plan_of_the_5b_model():
    eight, many = (plan(model_size("5b").dit, [12_090], [1_030], MACHINES["h100"], ranks) for ranks in (8, 64))
    assert eight.num_parameters == pytest.approx(5.07e9, rel=0.01)
    # bf16 weights, float32 gradients, master weights, two moments and an average.
    assert eight.state_bytes == pytest.approx(eight.num_parameters * 22 / 8)
    assert many.state_bytes == pytest.approx(eight.state_bytes / 8)
    assert eight.memory_bytes < 80e9
    # Eight packs in flight, 240 KiB an MLLM token.
    assert eight.host_bytes == 8 * 1_030 * 240 * 1024
    assert eight.train_flops == many.train_flops
    assert machine_named("NVIDIA H100 80GB HBM3") is MACHINES["h100"]
    assert machine_named("") is None


def test_recomputing_less_keeps_more_and_executes_less():
    size = model_size("5b")
    modes = [plan(size.dit, [12_090], [1_030], MACHINES["h100"], 8, mode) for mode in ("none", "selective", "full")]
    kept, executed = [p.activation_bytes for p in modes], [p.executed_flops for p in modes]
    assert kept == sorted(kept, reverse=True)
    assert executed == sorted(executed)
    assert executed[0] == modes[0].train_flops
    assert executed[2] == pytest.approx(4 / 3 * modes[2].train_flops, rel=0.01)
    assert executed[1] < 1.12 * modes[1].train_flops
    with pytest.raises(UserError, match="recompute=some: use one of none, selective, full"):
        plan(size.dit, [12_090], [1_030], MACHINES["h100"], 8, "some")


def test_captions_of_stage_1_need_mllm_actors():
    size = model_size("5b")
    lengths, texts = [64] * 20 + [576] * 14, [150] * 34
    planned = plan(size.dit, lengths, texts, MACHINES["h100"], 64, mllm=size.mllm)
    # 13.9 GFLOP an MLLM token beside about 26 a token of the transformer and its share of attention.
    assert 8 < planned.mllm_actors < 24


def test_predictions_need_a_peak_and_scale_with_it():
    names = {"key": ["a", "b"], "task": ["t2v"] * 2, "dataset": ["d"] * 2, "split": ["train"] * 2}
    names |= {"width": [64] * 2, "height": [64] * 2, "num_frames": [9, 17]}
    table = pa.table(names | {"dit_tokens": [12, 20], "mllm_tokens": [9, 9]})
    shared = {"null": torch.zeros(4, 3, 128)}
    config, datasets = TrainingJobConfig(), [SimpleNamespace(index=table, shared=lambda: shared)]
    config.training.pack.tokens = 64
    ready = {"device_name": "", "world_size": 2, "packs_per_step": 2}
    assert predictor(config, model_size("tiny"), datasets)(ready) == {}
    config.training.peak_tflops = 0.1
    slow = predictor(config, model_size("tiny"), datasets)(ready)
    config.training.peak_tflops = 0.2
    assert predictor(config, model_size("tiny"), datasets)(ready)["step_s"] == pytest.approx(slow["step_s"] / 2)
    gpu = predictor(config, model_size("tiny"), datasets)(ready | {"device_name": "NVIDIA H200"})
    assert 0 < gpu["step_s"] < slow["step_s"]
    assert slow["memory_gib"] > 0


def test_missing_folders_are_refused_before_launch(tmp_path):
    streamed = SimpleNamespace(
        manifest=SimpleNamespace(features={"mode": "streamed"}), storage=SimpleNamespace(url="s")
    )
    config = TrainingJobConfig()

    def check(**folders):
        check_folders(
            config, with_folders(model_size("5b"), folders.get("codec", ""), folders.get("mllm", "")), [streamed]
        )

    with pytest.raises(UserError, match=r"mllm_folder: set it to a folder .* data.shards s \(its MLLM states"):
        check()
    with pytest.raises(UserError, match="mllm_folder=/absent: no such folder"):
        check(mllm="/absent")
    check(mllm=str(tmp_path))
    check_folders(config, model_size("tiny"), [streamed])
    config.evaluation.samples = "samples.jsonl"
    with pytest.raises(UserError, match=r"codec_folder: set it to a folder that every node sees; evaluation\.samples"):
        check(mllm=str(tmp_path))
    check(mllm=str(tmp_path), codec="s3://weights/vae")
