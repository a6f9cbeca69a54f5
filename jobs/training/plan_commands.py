"""``loomvideo plan``: memory, operations, communication and time of a training run before launch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from loomvideo.jobs.command import config_command
from loomvideo.platform.config import option
from loomvideo.platform.console import console, table
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from loomvideo.jobs.training.plan import Machine


@dataclass
class PlanConfig:
    """A model, a pack and a cluster."""

    method: str = option("train", "train, distill or prefer; `loomvideo plan distill` is short for method=distill")
    model: str = option("5b", "model size: tiny, small or 5b")
    machine: str = option("h100", "h100, h200 or a100")
    ranks: list[int] = option([8, 64], "GPUs")
    lengths: list[int] = option(
        [],
        "tokens of each sample of a pack; empty: two edits of 121 frames and an edited picture, of distill and prefer "
        "as many such edits as training.pack of their preset holds",
    )
    mllm_lengths: list[int] = option([], "their MLLM tokens")
    like: str = option(
        "", "of distill and prefer: the preset that is planned, or a .yaml file; empty: 5b, for prefer 5b-lora"
    )
    changes: list[str] = option(
        [], "of distill and prefer: the job's own keys over its preset, such as [lora.rank=32,training.steps=3000]"
    )
    steps: int | None = option(None, "of train: optimiser steps, for the time of the whole run; null: 10000")
    stages: dict[str, int] = option(
        {}, "of train: steps by stage instead, {images: 20000, videos: 8000}; time, money and carbon of each and of all"
    )
    packs_per_rank: int | None = option(None, "of train: packs of a rank in a step; null: 1")
    recompute: str | None = option(
        None, "of train: training.activation_checkpointing: none, selective or full; null: selective"
    )
    prefetch_steps: int = option(3, "training.prefetch_steps: how many steps' MLLM states wait in host memory")
    efficiency: float = option(0.45, "share of the GPU's peak that executed operations reach; measure it")
    hpz: bool | None = option(
        None,
        "of train: gather weights inside the node (zero.hpz_partition_size=8) where there are several; null: true",
    )
    network_gb_per_s: float = option(
        0.0,
        "bandwidth of a GPU between nodes as loomvideo doctor measured it, GB/s; 0: what the machine's type reaches",
    )
    generators: int = option(0, "of prefer: GPUs that generate before the ranks train; 0: the ranks' own")
    decode_s: float = option(
        4.1,
        "of prefer: seconds of the codec for a clip of 121 frames of 480x832 on an H100; the default is estimated: the "
        "encoder's measured 0.79 s times the decoder's 891 over 169 TFLOP",
    )
    scoring_s: float = option(
        16.0,
        "of prefer: seconds of one CPU core for the metrics of such a result; the default was measured with the "
        "rewards of 5b-lora (benchmarks/scoring.py: 14 to 19 s); a judge or a server comes on top",
    )
    hourly_price: float = option(0.0, "price of a GPU hour, for the cost of the run; 0 leaves it out")
    watts: float = option(0.0, "power of a GPU with its share of node and cooling, for the energy of the run; 0: none")
    carbon_g_per_kwh: float = option(0.0, "grams of CO2 a kWh of the grid, for the carbon of the run; needs watts")


OF_JOBS = {
    "steps": "training.steps",
    "packs_per_rank": "training.pack.per_step",
    "recompute": "training.activation_checkpointing",
    "hpz": "training.zero.hpz_partition_size",
}
"""Keys of a plan of ``train`` that the other methods have from their presets, and what they are there."""


def register(app: typer.Typer) -> None:
    """Add the command."""

    words = {"distill": "method=distill", "prefer": "method=prefer", "train": "method=train"}

    @config_command(app, "plan", "plan", lambda: PlanConfig, words=words)
    def plan_command(config: PlanConfig) -> None:
        """Estimate memory, FLOPs, communication, step time and duration of training, `distill` or `prefer`."""
        print_plan(config)


def print_plan(config: PlanConfig) -> None:
    """Print one column for every number of ranks.

    Raises:
        UserError: for an unknown machine or lengths that do not match.
    """
    from loomvideo.jobs.training.plan import MACHINES, plan
    from loomvideo.model.flops import relative_cost
    from loomvideo.model.sizes import model_size

    if config.machine not in MACHINES:
        raise UserError(f"machine={config.machine}: use one of {', '.join(MACHINES)}")
    if len(config.lengths) != len(config.mllm_lengths):
        raise UserError("lengths and mllm_lengths: give one number for every sample of the pack")
    if config.generators < 0 or min(config.decode_s, config.scoring_s) < 0:
        raise UserError("generators, decode_s and scoring_s: at least 0")
    if config.method not in ("train", "distill", "prefer"):
        raise UserError(f"method={config.method}: use train, distill or prefer")
    if config.stages and config.method != "train":
        raise UserError(f"stages: only method=train has any; {config.method} takes steps or rounds")
    if config.carbon_g_per_kwh and not config.watts:
        raise UserError("carbon_g_per_kwh: needs the power of a GPU; set watts=1000, for example")
    machine = MACHINES[config.machine]
    if config.network_gb_per_s:
        machine = dataclasses.replace(machine, network_gbytes_per_s=config.network_gb_per_s)
    if config.method != "train":
        _print_method(config, machine)
        return
    size, recompute = model_size(config.model), config.recompute or "selective"
    lengths, mllm_lengths = config.lengths or [12090, 12090, 400], config.mllm_lengths or [830, 830, 450]
    dit = size.dit
    cost = sum(relative_cost(dit, n, m, n) for n, m in zip(lengths, mllm_lengths, strict=True))
    plans = [
        plan(
            dit,
            lengths,
            mllm_lengths,
            machine,
            ranks,
            recompute,
            config.efficiency,
            hpz=config.hpz is not False and ranks > machine.gpus_per_node,
            micro_steps=config.packs_per_rank or 1,
            prefetch_steps=config.prefetch_steps,
            mllm=size.mllm,
        )
        for ranks in config.ranks
    ]
    estimates = table("estimate, a GPU and step", *(f"{ranks} {config.machine}" for ranks in config.ranks))
    gib, tera = 2**30, 1e12
    rows = {
        "weights, gradients, optimiser, average": [f"{p.state_bytes / gib:.1f} GiB" for p in plans],
        "gathered layers": [f"{p.layer_bytes / gib:.1f} GiB" for p in plans],
        "activations": [f"{p.activation_bytes / gib:.1f} GiB" for p in plans],
        "MLLM states": [f"{p.states_bytes / gib:.1f} GiB" for p in plans],
        "buckets and runtime": [f"{p.buffer_bytes / gib:.1f} GiB" for p in plans],
        f"memory of {machine.memory_gib:.0f} GiB": [f"{p.memory_bytes / gib:.1f} GiB" for p in plans],
        "host memory of a node, packs in flight": [
            f"{min(p.num_ranks, machine.gpus_per_node) * p.host_bytes / gib:.0f} GiB" for p in plans
        ],
        "FLOPs, model": [f"{p.train_flops / tera:,.1f} T" for p in plans],
        "FLOPs, with recomputation": [f"{p.executed_flops / tera:,.1f} T" for p in plans],
        "communication": [f"{p.communication_bytes / 1e9:.1f} GB" for p in plans],
        "compute": [f"{p.compute_s:.2f} s" for p in plans],
        "communication, hidden up to compute": [f"{p.communication_s:.2f} s" for p in plans],
        "step": [f"{p.step_s:.2f} s" for p in plans],
        "MFU": [f"{p.train_flops / p.step_s / machine.peak_tflops / tera:.0%}" for p in plans],
        "MLLM actors on GPUs of their own (features.actors), all": [f"{math.ceil(p.mllm_actors)}" for p in plans],
        "tokens/s, all": [f"{p.tokens_per_s:,.0f}" for p in plans],
        "samples/day, all": [f"{p.samples_per_day:,.0f}" for p in plans],
    }
    stages = config.stages or {"": 10000 if config.steps is None else config.steps}
    for stage, steps in stages.items():
        hours = [steps * p.step_s / 3600 for p in plans]
        rows[f"{stage}: {steps:,} steps".removeprefix(": ")] = [f"{value:.1f} h" for value in hours]
        gpu_hours = [value * p.num_ranks for value, p in zip(hours, plans, strict=True)]
        rows |= cost_rows(config, gpu_hours, f"{stage}: " if config.stages else "")
    if len(stages) > 1:
        total = sum(stages.values())
        rows[f"all: {total:,} steps"] = [f"{total * p.step_s / 3600:.1f} h" for p in plans]
        rows |= cost_rows(config, [total * p.step_s / 3600 * p.num_ranks for p in plans], "all: ")
    for name, values in rows.items():
        estimates.add_row(name, *values)
    out = console()
    out.print(estimates)
    out.print(
        f"{plans[0].num_parameters / 1e9:.2f} G parameters; the pack counts {cost:,.0f} of training.pack.tokens and "
        f"{sum(mllm_lengths):,} of training.pack.max_context_tokens; nothing here is measured "
        f"(efficiency={config.efficiency})"
    )
    if any(p.memory_bytes > 0.92 * machine.memory_gib * gib for p in plans):
        out.print("memory is short: shorter packs, more GPUs, recompute=full or zero.offload_optimizer=true")


def cost_rows(config: PlanConfig, gpu_hours: list[float], prefix: str = "") -> dict[str, list[str]]:
    """GPU hours and what they come to in money, energy and carbon, as far as the configuration has prices."""
    rows = {"GPU hours": [f"{hours:,.0f}" for hours in gpu_hours]}
    if config.hourly_price:
        rows["cost"] = [f"{hours * config.hourly_price:,.0f}" for hours in gpu_hours]
    if config.watts:
        energy = [hours * config.watts / 1000 for hours in gpu_hours]
        rows["energy"] = [f"{value:,.0f} kWh" for value in energy]
        if config.carbon_g_per_kwh:
            rows["carbon"] = [f"{value * config.carbon_g_per_kwh / 1000:,.0f} kg CO2" for value in energy]
    return {prefix + name: values for name, values in rows.items()}


def _print_method(config: PlanConfig, machine: "Machine") -> None:
    from loomvideo.jobs.training.plan import plan
    from loomvideo.jobs.training.plan_methods import adapter_parameters, plan_distill, plan_prefer
    from loomvideo.jobs.training.planned_job import planned_job

    for key, of_job in OF_JOBS.items():
        if getattr(config, key) is not None:
            raise UserError(f"{key}: {config.method} has it from its preset; use 'changes=[{of_job}=…]'")
    job = planned_job(config.method, config.model, config.like, config.changes, config.lengths, config.mllm_lengths)
    training, dit = job.config.training, job.size.dit
    plans = [
        plan(
            dataclasses.replace(dit, use_source_embedding=job.config.objective.use_source_embedding),
            job.lengths,
            job.mllm_lengths,
            machine,
            ranks,
            training.activation_checkpointing,
            config.efficiency,
            average=training.ema.decay > 0,
            hpz=training.zero.hpz_partition_size > 1 and ranks > machine.gpus_per_node,
            micro_steps=max(1, -(-training.pack.per_step // ranks)),
        )
        for ranks in config.ranks
    ]
    rank, adapters = job.config.lora.rank, 0
    if rank:
        adapters = adapter_parameters(dit.inner_dim, dit.ffn_dim, dit.num_layers, rank)
    if config.method == "distill":
        methods = [plan_distill(base, job, adapters) for base in plans]
    else:
        methods = [
            plan_prefer(base, job, config.generators or base.num_ranks, config.decode_s, config.scoring_s, adapters)
            for base in plans
        ]
    estimates = table(f"estimate of {config.method}", *(f"{ranks} {config.machine}" for ranks in config.ranks))
    for name in methods[0].rows:
        estimates.add_row(name, *(method.rows[name] for method in methods))
    for name, values in cost_rows(config, [method.gpu_hours for method in methods]).items():
        estimates.add_row(name, *values)
    out = console()
    out.print(estimates)
    trained = f"adapters of rank {rank}, {adapters / 1e6:.0f} M" if adapters else "all weights trained"
    out.print(
        f"preset {job.name}: {plans[0].num_parameters / 1e9:.2f} G parameters, {trained}, "
        f"recompute {training.activation_checkpointing}; a pack of {len(job.lengths)} with {sum(job.lengths):,} tokens "
        f"counts {job.cost:,.0f} of training.pack.tokens={training.pack.tokens}; nothing here is measured"
        f"{' but scoring_s' if config.method == 'prefer' else ''} (efficiency={config.efficiency})"
    )
    if any(method.memory_bytes > 0.92 * machine.memory_gib * 2**30 for method in methods):
        out.print("memory is short: shorter packs, more GPUs, activation_checkpointing=full or lora.rank")
