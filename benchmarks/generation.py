"""Denoising steps a second: the plain loop (every branch from scratch at every step) against ours, by task.

    python benchmarks/generation.py [--model small] [--steps 8] [--rounds 2] [--json results.json]

Plain is what a straightforward implementation does: at each step it packs each branch, embeds its MLLM states,
projects their keys and values, embeds the timestep and runs the blocks. Ours computes once a generation what does not
change; its first step holds that. Cases take turns for several rounds; medians are printed, wall time and processor
time, which other work on the machine changes little. All lossless cases must agree on the latents within 1e-4; of
shortcuts the error is printed, on random weights (docs/benchmarks.md has a trained model's). Several seeds count as
steps of one video each.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from loomvideo.model import kernels
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.guidance import FULL, UNCONDITIONAL, VISUAL, Guidance
from loomvideo.model.packing import DiTSample, pack
from loomvideo.model.sampler import Branch, SchedulerConfig, sample
from loomvideo.model.shortcuts import Shortcuts
from loomvideo.model.sizes import model_size

# Latents (frames, height, width) and MLLM tokens of the branches: 33 frames of 256x256 and a picture of 640x640.
TASKS = {
    "t2v": ((9, 16, 16), {FULL: 60, UNCONDITIONAL: 10}),
    "edit": ((9, 16, 16), {FULL: 780, VISUAL: 740, UNCONDITIONAL: 10}),
    "image": ((1, 40, 40), {FULL: 60, UNCONDITIONAL: 10}),
}
CASES = {
    "plain loop": {"kernels": "eager"},
    "plain loop, cpp kernels": {"kernels": "cpp"},
    "ours, eager kernels": {"kernels": "eager", "batch_branches": False},
    "ours, cpp kernels": {"kernels": "cpp", "batch_branches": False},
    "ours, cpp kernels, branches batched": {"kernels": "cpp", "batch_branches": True},
    "ours, cpp kernels, two seeds a pass": {"kernels": "cpp", "batch_branches": False, "seeds": 2},
} | {
    f"shortcuts.{next(iter(shortcuts.alone()))}": {"kernels": "cpp", "batch_branches": False, "shortcuts": shortcuts}
    for shortcuts in (
        Shortcuts(steps=4),
        Shortcuts(guidance_to=0.6),
        Shortcuts(branch_refresh=2),
        Shortcuts(branch_refresh=2, branch_order=1),
        Shortcuts(branch_refresh=3),
        Shortcuts(branch_refresh=3, branch_order=1),
        Shortcuts(step_cache=0.1),
    )
}


@torch.no_grad()
def plain_loop(
    model: LoomVideoDiT,
    latents: Tensor,
    branches: dict[str, Branch],
    guidance: Guidance,
    steps: int,
    on_step: Callable[[int, Tensor], None],
) -> Tensor:
    """Denoise with nothing kept between steps or branches."""
    solver, patch = SchedulerConfig().build(steps), model.config.patch_size
    for step, timestep in enumerate(solver.timesteps):
        t, velocities = timestep.item(), {}
        for name in guidance.weights():
            branch = branches[name]
            batch = pack([DiTSample(latents, t, branch.mllm_states, branch.source, t / 1000, branch.references)], patch)
            (velocities[name],) = batch.unpack(model(batch))
        latents = solver.step(guidance.combine(velocities), timestep, latents, return_dict=False)[0]
        on_step(step, latents)
    return latents


def conditions(task: str, model: LoomVideoDiT) -> tuple[Tensor, dict[str, Branch], Guidance]:
    """Random noise and branches of a task's sizes."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    grid, mllm_tokens = TASKS[task]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    source = random(config.in_channels, *grid) if VISUAL in mllm_tokens else None
    branches = {
        name: Branch(random(config.num_layers, tokens, config.mllm_dim), None if name == UNCONDITIONAL else source)
        for name, tokens in mllm_tokens.items()
    }
    guidance = Guidance(2.5, 1.5) if VISUAL in mllm_tokens else Guidance(5.0)
    return random(config.in_channels, *grid), branches, guidance


def run(case: dict, model: LoomVideoDiT, inputs: tuple, steps: int) -> tuple[Tensor, list[tuple[float, float]]]:
    """The latents of one case, and wall and processor time at its start and after every step."""
    noise, branches, guidance = inputs
    stamps = [(time.perf_counter(), time.process_time())]

    def stamp(step: int, latents: Tensor) -> None:
        stamps.append((time.perf_counter(), time.process_time()))

    with kernels.use_backend(case["kernels"]):
        if "batch_branches" not in case:
            return plain_loop(model, noise, branches, guidance, steps, stamp), stamps
        seeds, chosen = case.get("seeds", 1), case.get("shortcuts")
        noise = noise if seeds == 1 else torch.stack([noise, *(noise.roll(seed, 1) for seed in range(1, seeds))])
        made = sample(
            model, noise, branches, guidance, steps, batch_branches=case["batch_branches"], on_step=stamp,
            shortcuts=chosen,
        )  # fmt: skip
        return made if seeds == 1 else made[0], stamps


def figures(rounds: list[list[tuple[float, float]]], videos: int, steps: int) -> dict[str, float]:
    """Medians over rounds, seconds and processor seconds of a video: of the steps asked for, the first, a later one."""
    result = {}
    for clock, name in enumerate(("wall", "cpu")):
        columns = [[stamp[clock] / videos for stamp in stamps] for stamps in rounds]
        result[f"{name}_s"] = statistics.median((times[-1] - times[0]) / steps for times in columns)
        result[f"{name}_first_s"] = statistics.median(times[1] - times[0] for times in columns)
        result[f"{name}_later_s"] = statistics.median((times[-1] - times[1]) / (len(times) - 2) for times in columns)
    return result


def main() -> None:
    """Time every case of every task and print a table a task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = LoomVideoDiT(model_size(arguments.model).dit).eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    results = {}
    for task in arguments.tasks:
        inputs, latents = conditions(task, model), {}
        rounds: dict[str, list] = {name: [] for name in arguments.cases}
        for name in arguments.cases:  # builds and checks the kernels
            with kernels.use_backend(CASES[name]["kernels"]), torch.no_grad():
                noise, branches, _ = inputs
                model(
                    pack(
                        [DiTSample(noise[:, :1, :4, :4], 500.0, branches[FULL].mllm_states[:, :4])],
                        model.config.patch_size,
                    )
                )
        for _ in range(arguments.rounds):
            for name in arguments.cases:
                latents[name], stamps = run(CASES[name], model, inputs, arguments.steps)
                rounds[name].append(stamps)
        grid, mllm_tokens = TASKS[task]
        tokens = math.prod(grid) // math.prod(model.config.patch_size)
        print(f"\n{task}: {tokens} tokens, MLLM tokens {mllm_tokens}, {arguments.model}, {arguments.threads} threads")
        print("| implementation | steps/s | CPU s a step | faster | first step, CPU s | later step, CPU s | error |")
        print("|---|---|---|---|---|---|---|")
        results[task], expected = {}, latents[arguments.cases[0]]
        for name in arguments.cases:
            case, error = CASES[name], (latents[name] - expected).abs().max().item()
            if "shortcuts" not in case and error > 1e-4 * max(expected.abs().max().item(), 1):
                raise SystemExit(f"{task}, {name}: latents differ by {error}")
            made = figures(rounds[name], case.get("seeds", 1), arguments.steps)
            share = ((latents[name] - expected).square().mean() / expected.square().mean()).sqrt().item()
            results[task][name] = {**made, "error": error, "relative_error": share}
            base = results[task][arguments.cases[0]]["cpu_s"]
            print(
                f"| {name} | {1 / made['wall_s']:.2f} | {made['cpu_s']:.2f} | {base / made['cpu_s']:.2f}x "
                f"| {made['cpu_first_s']:.2f} | {made['cpu_later_s']:.2f} "
                f"| {f'{share:.2%}' if 'shortcuts' in case else ''} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
