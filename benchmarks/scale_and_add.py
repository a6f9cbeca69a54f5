"""What Scale-and-Add saves: a denoising step of an edit against the same network with the source as extra tokens.

    python benchmarks/scale_and_add.py [--model small] [--frames 2 4 8 16 32] [--chart curve.png] [--json results.json]

Concatenation appends the source's patches to the sequence (as the references' are), so every block works on twice
the tokens; the weights are the same, the source embedding's are not used. Both keep keys, values and timestep
embeddings over the steps, as generation does. Memory is the peak of live tensors in a step, weights and what is kept
not counted. The theoretical ratio is that of the exact operation counts (``model/flops.py``), for the measured preset
and for 5b. Processor time is what to compare on a machine that does other work.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("scale-and-add", "concatenation")
MLLM_TOKENS = 780
SIDE = 16
"""Latent rows and columns of a frame: 64 tokens."""


def run_case(preset_name: str, method: str, frames: int, seconds: float, threads: int) -> dict:
    """Repeat one denoising step for about ``seconds`` in this process."""
    import torch

    from loomvideo.model import kernels
    from loomvideo.model.codec.live_bytes import PeakLiveBytes
    from loomvideo.model.dit import LoomVideoDiT
    from loomvideo.model.packing import DiTSample, pack
    from loomvideo.model.sizes import model_size

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kernels.set_backend("auto")
    config = model_size(preset_name).dit
    model = LoomVideoDiT(config).eval()
    if method == "concatenation":
        model.config = dataclasses.replace(config, use_source_embedding=False)
    latents, source = torch.randn(2, config.in_channels, frames, SIDE, SIDE)
    states = torch.randn(config.num_layers, MLLM_TOKENS, config.mllm_dim)
    sample = DiTSample(latents, 500.0, states, source, 0.5)
    with torch.no_grad():
        model(pack([dataclasses.replace(sample, latents=latents[:, :1], source=source[:, :1])]))  # checks the kernels
        contexts = model.keys_values(states)
        batch = pack([sample]) if method == "scale-and-add" else concatenated(sample, config.patch_size)
        step_time = model.embed_time(batch.timesteps, torch.float32)
        with PeakLiveBytes() as live:
            model(batch, contexts=contexts, time=step_time)
        wall, cpu, started = [], [], time.perf_counter()
        while not wall or time.perf_counter() - started < seconds:
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            model(batch, contexts=contexts, time=step_time)
            wall.append(time.perf_counter() - wall_start)
            cpu.append(time.process_time() - cpu_start)
    return {"wall_s": statistics.median(wall), "cpu_s": statistics.median(cpu), "memory_bytes": live.peak}


def concatenated(sample, patch_size):
    """The pack of an edit whose source is tokens behind the video's, at the same positions, without modulation."""
    import torch

    from loomvideo.model.attention import AttentionPlan
    from loomvideo.model.packing import pack, to_patches

    alone = pack([dataclasses.replace(sample, source=None)], patch_size)
    length = alone.num_tokens
    patches = torch.cat([alone.patches, to_patches(sample.source, patch_size)])
    return dataclasses.replace(
        alone,
        patches=patches,
        source_patches=torch.zeros_like(patches),
        positions=alone.positions.repeat(2, 1),
        row_ids=torch.cat([alone.row_ids, torch.full_like(alone.row_ids, alone.num_samples)]),
        video_index=torch.arange(length),
        self_plan=AttentionPlan.build([2 * length]),
        cross_plan=AttentionPlan.build([2 * length], [sample.mllm_states.shape[1]]),
    )


def step_flops(preset_name: str, tokens: int, method: str) -> int:
    """Operations of a denoising step of one branch, without what is kept over the steps."""
    from loomvideo.model.flops import sequence_flops
    from loomvideo.model.sizes import model_size

    config = model_size(preset_name).dit
    if method == "concatenation":
        config = dataclasses.replace(config, use_source_embedding=False)
    length = tokens if method == "scale-and-add" else 2 * tokens
    kept = sequence_flops(config, [0], [MLLM_TOKENS], 0).forward
    return sequence_flops(config, [length], [MLLM_TOKENS], tokens).forward - kept


def flops_ratio(preset_name: str, tokens: int) -> float:
    """Operations of concatenation over those of Scale-and-Add."""
    return step_flops(preset_name, tokens, "concatenation") / step_flops(preset_name, tokens, "scale-and-add")


def draw(path: Path, preset_name: str, measured: dict[int, float]) -> None:
    """The ratio over the sequence length, measured and theoretical."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    lengths = np.geomspace(64, 40_000, 60).astype(int)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    for name, colour in ((preset_name, "#185ca8"), ("5b", "#b3541e")):
        ratios = [flops_ratio(name, int(length)) for length in lengths]
        axes.plot(lengths, ratios, color=colour, label=f"{name}: operations")
    axes.plot(
        list(measured), list(measured.values()), "o", color="#185ca8", label=f"{preset_name}: processor time, measured"
    )
    axes.set(xscale="log", xlabel="video tokens", ylabel="concatenation / Scale-and-Add", title="A step of an edit")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument(
        "--frames", nargs="+", type=int, default=[2, 4, 8, 16, 32], help="latent frames, 64 tokens each"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of repetitions a case and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "FRAMES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        method, frames = arguments.run
        print(json.dumps(run_case(arguments.model, method, int(frames), arguments.seconds, arguments.threads)))
        return
    print(f"{arguments.model}, {MLLM_TOKENS} MLLM tokens, {arguments.threads} threads")
    print(
        "| tokens | CPU ms | concatenation | CPU time | wall time | MiB | concatenation | memory | operations | 5b's |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    results, curve = [], {}
    for frames in arguments.frames:
        row: dict[str, dict[str, float]] = {}
        for method in METHODS:
            rounds = [_measure(arguments, method, frames) for _ in range(arguments.rounds)]
            row[method] = {key: min(result[key] for result in rounds) for key in rounds[0]}
        added, appended = (row[method] for method in METHODS)
        tokens = frames * SIDE * SIDE // 4
        ratios = {key: appended[key] / added[key] for key in added}
        curve[tokens] = ratios["cpu_s"]
        results.append({"tokens": tokens, **row, "flops_ratio": flops_ratio(arguments.model, tokens)})
        print(
            f"| {tokens} | {added['cpu_s'] * 1e3:.0f} | {appended['cpu_s'] * 1e3:.0f} "
            f"| {ratios['cpu_s']:.2f}x | {ratios['wall_s']:.2f}x "
            f"| {added['memory_bytes'] / 2**20:.1f} | {appended['memory_bytes'] / 2**20:.1f} "
            f"| {ratios['memory_bytes']:.2f}x "
            f"| {flops_ratio(arguments.model, tokens):.2f}x | {flops_ratio('5b', tokens):.2f}x |",
            flush=True,
        )
    for tokens in (9_750, 12_090, 27_280):
        print(f"5b, {tokens} tokens: {flops_ratio('5b', tokens):.2f}x the operations")
    if arguments.chart:
        draw(arguments.chart, arguments.model, curve)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def _measure(arguments: argparse.Namespace, method: str, frames: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", arguments.model, "--run", method, str(frames)]
    command += ["--seconds", str(arguments.seconds), "--threads", str(arguments.threads)]
    completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(completed.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
