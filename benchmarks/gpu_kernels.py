"""Check and time the Triton kernels on one GPU: every operation, forward and backward, bf16.

    python benchmarks/gpu_kernels.py --output results.json [--tokens 9750 32768] [--no-compile]

Needs torch and Triton alone: without an installed ``loomvideo`` the checkout is imported in place.

- correctness: every operation in every form that training uses, against the definition in float64 on the same rounded
  inputs; the error of eager in the same dtype stands beside it.
- time: medians between device events, with the L2 cache overwritten before each call, of the Triton kernels, eager and
  torch.compile; bytes that must move and their share of the measured copy bandwidth.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch._dynamo
import torch._functorch.config
from gpu_model import make_importable, reason
from torch import Tensor

FLUSH_BYTES = 256 << 20


def median_ms(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call. The cache flush before it also lets the host run ahead of the device."""
    call()
    times = []
    if device == "cpu":
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        for _ in range(3):
            flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def copy_bandwidth(device: str, repeats: int) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.randn((2 << 30) // 4 if device == "cuda" else 1 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device, repeats) * 1e3


def leaves(arguments: tuple) -> list[Tensor]:
    """The arguments that training differentiates."""
    return [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]


def as_list(results: Tensor | tuple) -> list[Tensor]:
    """The results of an operation."""
    return [results] if isinstance(results, Tensor) else list(results)


def check(options: argparse.Namespace) -> list[dict]:
    """Largest relative error of any result or gradient of each operation."""
    from loomvideo.model.kernels import eager
    from loomvideo.model.kernels.backends import load_operations
    from loomvideo.model.kernels.selfcheck import TOLERANCE, relative_error, results_and_gradients, training_calls

    operations = load_operations("triton")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        calls = training_calls(options.dim, options.heads, dtype, options.device, options.check_tokens, patch=192)
        for name, arguments, keywords in calls:
            exact = [
                a.detach().double().requires_grad_(a.requires_grad)
                if isinstance(a, Tensor) and a.is_floating_point()
                else a
                for a in arguments
            ]
            # The exact reference has no rounding of the norm, so that mode is compared with eager in its own dtype.
            rounds = keywords.get("round_norm", False) and dtype != torch.float32
            function = getattr(eager, name)
            reference = results_and_gradients(function, arguments if rounds else tuple(exact), keywords)
            row = {"operation": name, "dtype": str(dtype), "form": {k: str(v) for k, v in keywords.items()}}
            for label, candidate in (("triton", getattr(operations, name)), ("eager", function)):
                values = results_and_gradients(candidate, arguments, keywords)
                row[label] = max(relative_error(v, r) for v, r in zip(values, reference, strict=True))
            row["ok"] = row["triton"] <= TOLERANCE[dtype]
            # The same inputs twice: a difference would be a race.
            values = results_and_gradients(getattr(operations, name), arguments, keywords)
            again = results_and_gradients(getattr(operations, name), arguments, keywords)
            row["reproducible"] = all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
            rows.append(row)
            print(f"{name:<22}{dtype!s:<16}triton {row['triton']:.1e}  eager {row['eager']:.1e}  ok {row['ok']}"
                  f"  reproducible {row['reproducible']}", flush=True)  # fmt: skip
    return rows


def measure(options: argparse.Namespace, tokens: int, bandwidth: float) -> list[dict]:
    """Time every operation at one length."""
    from loomvideo.model.kernels import bench, eager
    from loomvideo.model.kernels.backends import load_operations

    operations = load_operations("triton")
    rows = []
    for name in bench.TIMED:
        arguments, keywords = bench.model_arguments(
            name, tokens, options.dim, options.heads, 192, torch.bfloat16, options.device
        )
        definition = getattr(eager, name)
        candidates = {"triton": getattr(operations, name), "eager": definition}
        if not options.no_compile:
            candidates["compile"] = torch.compile(definition, dynamic=False)
        forward_bytes = bench.floor_bytes(definition, arguments, keywords, backward=False)
        both_bytes = bench.floor_bytes(definition, arguments, keywords, backward=True)
        for phase, size in (("forward", forward_bytes), ("backward", both_bytes - forward_bytes)):
            row = {"operation": name, "tokens": tokens, "phase": phase, "floor_bytes": size}
            for label, function in candidates.items():
                try:
                    row[label] = time_phase(function, phase, arguments, keywords, options)
                except (RuntimeError, torch._dynamo.exc.BackendCompilerFailed) as error:
                    row[f"{label}_error"] = reason(error)
            if "triton" in row:
                row["share"] = size / row["triton"] * 1e3 / bandwidth
            rows.append(row)
            times = "  ".join(f"{label} {row[label]:8.3f} ms" for label in candidates if label in row)
            print(f"{name:<22}{tokens:>6} {phase:<9} {times}  {row.get('share', 0):.0%} of copy", flush=True)
    return rows


def time_phase(function: Callable, phase: str, arguments: tuple, keywords: dict, options: argparse.Namespace) -> float:
    """Median of one forward without autograd, or of one backward of a graph that is kept."""
    if phase == "forward":
        with torch.no_grad():
            return median_ms(lambda: function(*arguments, **keywords), options.device, options.repeats)
    results = as_list(function(*arguments, **keywords))
    gradients = [torch.randn_like(r) for r in results]
    inputs = leaves(arguments)
    return median_ms(
        lambda: torch.autograd.grad(results, inputs, gradients, retain_graph=True), options.device, options.repeats
    )


def main() -> None:
    """Check, then time, then write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[9750, 32768])
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--check-tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu: with TRITON_INTERPRET=1, for tests")
    options = parser.parse_args()
    make_importable()
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # compiled backwards run many times on one graph

    import triton

    bandwidth = copy_bandwidth(options.device, options.repeats)
    result = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": bandwidth,
    }
    print(f"{result['device']}, torch {result['torch']}, triton {result['triton']}, copy {bandwidth / 1e9:.0f} GB/s")
    result["correctness"] = check(options)
    result["timings"] = [row for tokens in options.tokens for row in measure(options, tokens, bandwidth)]
    with open(options.output, "w") as file:
        json.dump(result, file, indent=1)
    wrong = [row["operation"] for row in result["correctness"] if not row["ok"]]
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
