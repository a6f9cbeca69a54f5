"""The plans of distillation and preference tuning are those of the presets, and the page has what they print."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan
from fixtures.pages import DOCS
from torch.utils.flop_counter import FlopCounterMode

from loomvideo.jobs.command import job_config, preset_names
from loomvideo.jobs.training.config import job_schema
from loomvideo.jobs.training.plan import MACHINES, plan
from loomvideo.jobs.training.plan_commands import OF_JOBS, PlanConfig, print_plan
from loomvideo.jobs.training.plan_methods import plan_distill, plan_prefer
from loomvideo.jobs.training.planned_job import planned_job
from loomvideo.model.codec.wan import WAN_22_SIZES, decode_chunks, encode_chunks
from loomvideo.model.flops import relative_cost
from loomvideo.model.sizes import model_size
from loomvideo.platform.errors import UserError

PRESETS = [
    (method, preset)
    for method in ("distill", "prefer")
    for preset in preset_names(method)
    if model_size("5b").name == preset.split("-")[0]
]
H100 = MACHINES["h100"]
# Of a clip of 121 frames at 480x832 on an H100 (docs/benchmarks.md, the encoders).
ENCODER_S = 0.787


def estimate(job, ranks=8, hpz=False):
    recompute = job.config.training.activation_checkpointing
    return plan(job.size.dit, job.lengths, job.mllm_lengths, H100, ranks, recompute, hpz=hpz)


def prefer_seconds(job, generators=8, decode_s=0.0, scoring_s=0.0):
    return plan_prefer(estimate(job), job, generators, decode_s, scoring_s).total_s


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_the_plan_is_of_the_preset(method, preset):
    job = planned_job(method, "5b", preset)
    assert job.config == job_config(job_schema(method), method, [f"preset={preset}", "data.shards=[planned]"])
    assert set(job.lengths) == {12_090}
    # As full as edits can make it.
    tokens, edits = job.config.training.pack.tokens, len(job.lengths)
    one = relative_cost(job.size.dit, 12_090, job.mllm_lengths[0], 12_090)
    assert job.cost == pytest.approx(edits * one)
    assert edits * one <= tokens < (edits + 1) * one


def test_a_pack_of_more_than_the_budget_is_refused():
    with pytest.raises(UserError, match=r"lengths: count 38,665, more than training.pack.tokens=20000 of preset 5b"):
        planned_job("distill", "5b", lengths=[12_090, 12_090], mllm_lengths=[830, 830])
    wider = planned_job("distill", "5b", changes=["training.pack.tokens=40000"])
    assert wider.lengths == [12_090, 12_090]
    one, two = (plan_distill(estimate(job), job).total_s for job in (planned_job("distill", "5b"), wider))
    assert two == pytest.approx(2 * one, rel=0.01)
    with pytest.raises(UserError, match=r"does not fit training\.pack"):
        planned_job("distill", "5b", changes=["training.pack.max_context_tokens=800"])


@pytest.mark.parametrize("key", OF_JOBS)
def test_what_the_preset_says_is_not_asked_again(key):
    value = {"steps": 3, "packs_per_rank": 2, "recompute": "none", "hpz": True}[key]
    with pytest.raises(UserError, match=re.escape(f"changes=[{OF_JOBS[key]}=")):
        print_plan(PlanConfig(method="distill", **{key: value}))


def test_the_teachers_branches_follow_its_scales():
    guided = planned_job("distill", "5b")
    bare = planned_job("distill", "5b", changes=["distill.scale=1", "distill.visual_scale=1"])
    assert (guided.branches, bare.branches) == (3, 1)
    assert plan_distill(estimate(guided), guided).total_s > plan_distill(estimate(bare), bare).total_s


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ([], 20),
        (["prefer.nft.scale=2.5", "prefer.nft.visual_scale=1.5"], 60),
        (["prefer.nft.scale=2.5"], 40),
        # Half of the results without guidance.
        (["prefer.nft.scales=[1.0,2.0]"], 30),
        (["prefer.nft.sampler_steps=4"], 4),
    ],
)
def test_passes_of_a_result_follow_the_guidance_scales(changes, passes):
    job = planned_job("prefer", "5b", changes=changes)
    assert job.passes == passes
    denoising = prefer_seconds(job) - prefer_seconds(
        planned_job("prefer", "5b", changes=["prefer.nft.sampler_steps=1"])
    )
    # Eight rounds of eight prompts a GPU with eight results each; a pass is a third of a step's two samples.
    base = estimate(job)
    one = base.compute_s * base.train_flops / base.executed_flops / 3 / 2
    assert denoising == pytest.approx(512 * (passes - 1) * one)


def test_decoding_and_scoring_count_for_every_result():
    job = planned_job("prefer", "5b")
    without = prefer_seconds(job)
    # 64 prompts of 8 results over 8 GPUs, 8 rounds, on 4 cores; source and target are decoded too.
    assert prefer_seconds(job, scoring_s=28.0) - without == pytest.approx(8 * 8 * 2 * 28.0)
    assert prefer_seconds(job, decode_s=4.0) - without == pytest.approx(8 * 8 * 10 * 4.0)
    # 64 prompts over seven: one of them makes ten, one after another.
    assert prefer_seconds(job, 7, scoring_s=28.0) - prefer_seconds(job, 7) == pytest.approx(8 * 10 * 2 * 28.0)


def test_the_seconds_of_decoding_are_the_encoders_measured_ones_by_operations():
    operations = {}
    with torch.device("meta"), torch.no_grad():
        model = torch.nn.Module.to(AutoencoderKLWan(**WAN_22_SIZES), torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            list(encode_chunks(model, torch.empty(1, 3, 33, 128, 128, dtype=torch.bfloat16), 4))
        operations["encoder"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            list(decode_chunks(model, torch.empty(1, 48, 9, 8, 8, dtype=torch.bfloat16), 4))
        operations["decoder"] = counter.get_total_flops()
    assert PlanConfig().decode_s == pytest.approx(ENCODER_S * operations["decoder"] / operations["encoder"], rel=0.02)


@pytest.mark.parametrize(
    ("method", "preset", "copies"), [("distill", "5b", 3), ("distill", "5b-lora", 1), ("prefer", "5b-lora", 2)]
)
def test_second_copies_of_every_role_take_memory(method, preset, copies):
    job = planned_job(method, "5b", preset)
    adapters = 1_000_000 if job.config.lora.rank else 0

    def memory(hpz):
        base = estimate(job, 64, hpz)
        if method == "distill":
            return plan_distill(base, job, adapters).memory_bytes
        return plan_prefer(base, job, 64, 0.0, 0.0, adapters).memory_bytes

    whole = 2 * estimate(job).num_parameters
    # Of roles that do not share their weights, over the eight ranks of a node.
    assert memory(True) - memory(False) == pytest.approx(copies * whole / 8, rel=0.001)


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_presets_set_no_second_copies_and_the_plan_follows(method, preset, capsys):
    assert planned_job(method, "5b", preset).config.training.zero.hpz_partition_size == 1
    print_plan(PlanConfig(method=method, like=preset, ranks=[64]))
    plain = capsys.readouterr().out
    print_plan(PlanConfig(method=method, like=preset, ranks=[64], changes=["training.zero.hpz_partition_size=8"]))
    assert capsys.readouterr().out != plain


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_the_page_has_what_the_plan_prints(method, preset, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(PlanConfig(method=method, like=preset))
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    page = {" ".join(line.split()) for line in (DOCS / "distillation.md").read_text().splitlines()}
    table = [line for line in printed if line and not line.startswith(("preset", "nothing", "measured"))]
    assert len(table) >= 6
    assert [line for line in table if line not in page] == []


def test_preferring_without_rounds_is_not_planned():
    with pytest.raises(UserError, match=r"prefer.method=source: nothing is generated"):
        planned_job("prefer", "tiny")
