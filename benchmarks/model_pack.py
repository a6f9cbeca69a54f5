"""Forward and backward of a pack of eight mixed samples against a dense, unpacked implementation, on CPU in fp32.

    python benchmarks/model_pack.py [--models tiny small] [--rounds 3] [--json results.json]

Every case runs in a process of its own, so that its peak memory is its own; cases take turns for several rounds, so
that a busy moment of the machine hits all of them. Memory is the peak resident set less that of the built model and
inputs; it holds gradients and activations. The dense implementation (``tests/fixtures/dense_dit.py``) runs the samples
one after the other; ``dense`` keeps the graph of all for one backward pass, ``dense, one by one`` runs a backward pass
a sample, which frees each graph but repeats work that packing shares.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "dense": {"implementation": "dense"},
    "dense, one by one": {"implementation": "dense", "one_by_one": True},
    "packed, eager kernels": {"implementation": "packed", "kernels": "eager"},
    "packed, cpp kernels": {"implementation": "packed", "kernels": "cpp"},
    "packed, cpp, selective": {"implementation": "packed", "kernels": "cpp", "checkpointing": "selective"},
    "packed, cpp, full": {"implementation": "packed", "kernels": "cpp", "checkpointing": "full"},
}
# (frames, height, width) of the latents, MLLM tokens, references, source: two of every kind but video edits.
SAMPLES = [
    ((1, 16, 16), 24, (), False),
    ((1, 16, 16), 31, (), False),
    ((1, 16, 16), 88, (), True),
    ((1, 20, 14), 92, (), True),
    ((5, 16, 16), 28, (), False),
    ((5, 14, 18), 150, (), True),
    ((5, 16, 16), 214, ((16, 16),), True),
    ((5, 16, 16), 156, ((16, 16), (18, 14)), False),
]


def run_case(preset_name: str, case: str, seconds: float, threads: int) -> dict:
    """Repeat one case for about ``seconds`` in this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from fixtures.dense_dit import dense_velocity
    from fixtures.dit_samples import random_model, random_sample

    from loomvideo.model import kernels
    from loomvideo.model.packing import pack
    from loomvideo.model.sizes import model_size

    options = CASES[case]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = model_size(preset_name).dit
    model = random_model(config)
    samples = [
        random_sample(config, grid, tokens, references, source, seed)
        for seed, (grid, tokens, references, source) in enumerate(SAMPLES)
    ]
    targets = [torch.randn_like(sample.latents) for sample in samples]
    weights = dict(model.named_parameters())
    num_elements = sum(target.numel() for target in targets)

    def packed_step() -> float:
        batch = pack(samples, config.patch_size)
        loss = (model(batch) - batch.pack_targets(targets)).square().sum() / num_elements
        loss.backward()
        return loss.item()

    def dense_step() -> float:
        total = torch.zeros(())
        for sample, target in zip(samples, targets, strict=True):
            loss = (dense_velocity(weights, config, sample) - target).square().sum() / num_elements
            if options.get("one_by_one"):
                loss.backward()
                loss = loss.detach()
            total = total + loss
        if not options.get("one_by_one"):
            total.backward()
        return total.item()

    if options["implementation"] == "packed":
        kernels.set_backend(options["kernels"], required=True)
        model.set_activation_checkpointing(options.get("checkpointing", "none"))
    step = packed_step if options["implementation"] == "packed" else dense_step
    if options.get("kernels") == "cpp":  # build or load the library and check it before memory is counted
        small = pack([random_sample(config, (1, 2, 2), 2, [(2, 2)])])
        model(small).sum().backward()
        model.zero_grad(set_to_none=True)

    before = _resident_bytes()
    wall, cpu = [], []
    started = time.perf_counter()
    while not wall or time.perf_counter() - started < seconds:
        model.zero_grad(set_to_none=True)
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        loss = step()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "memory_bytes": peak - before,
        "loss": loss,
        "tokens": pack(samples).num_tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run every case in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "small"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of repetitions a case and round")
    parser.add_argument("--threads", type=int, default=1, help="of each case; 1 is least disturbed by other work")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=2, metavar=("PRESET", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run_case(*arguments.run, arguments.seconds, arguments.threads)))
        return

    results: dict[str, dict[str, list[dict]]] = {}
    for preset_name in arguments.models:
        by_case = results[preset_name] = {case: [] for case in arguments.cases}
        for _ in range(arguments.rounds):
            for case in arguments.cases:
                command = [sys.executable, __file__, "--run", preset_name, case]
                command += ["--seconds", str(arguments.seconds), "--threads", str(arguments.threads)]
                completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
                by_case[case].append(json.loads(completed.stdout.splitlines()[-1]))
        _print_table(preset_name, by_case)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def _print_table(preset_name: str, by_case: dict[str, list[dict]]) -> None:
    first = next(iter(by_case.values()))[0]
    print(f"\n{preset_name}: {first['tokens']} tokens, {first['threads']} threads, torch {first['torch']}")
    print("| implementation | median ms | CPU ms | peak MiB | time | memory | loss |")
    print("|---|---|---|---|---|---|---|")
    baseline = None
    for case, rounds in by_case.items():
        wall = statistics.median(value for result in rounds for value in result["wall_s"])
        cpu = statistics.median(value for result in rounds for value in result["cpu_s"])
        memory = statistics.median(result["memory_bytes"] for result in rounds)
        baseline = baseline or (wall, memory)
        print(
            f"| {case} | {wall * 1e3:.0f} | {cpu * 1e3:.0f} | {memory / 2**20:.0f} "
            f"| {baseline[0] / wall:.2f}x | {baseline[1] / memory:.2f}x | {rounds[0]['loss']:.6f} |",
            flush=True,
        )
        losses = [result["loss"] for result in rounds]
        if max(abs(loss - first["loss"]) for loss in losses) > 1e-3 * abs(first["loss"]):
            raise SystemExit(f"{case}: loss {losses} differs from {first['loss']}")


if __name__ == "__main__":
    main()
