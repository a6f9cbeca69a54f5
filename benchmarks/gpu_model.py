"""The 5B transformer on one GPU in bf16: training step and sampling step, time, peak memory, MFU.

    python benchmarks/gpu_model.py --output results.json [--model 5b] [--only train sample deepspeed] [--quick]

Needs torch (and Triton for its kernels) alone: without an installed ``loomvideo`` the checkout is imported in place.
Weights are random. Every configuration is reported as it finishes; one that fails is reported with its error.

- train: forward and backward of an edit of 9,750 tokens (480x832, 97 frames) with 780 MLLM tokens, and of a mixed pack.
- sample: one denoising step of the same edit with three guidance branches, and the hoisted work before the first step.
- deepspeed: a whole ZeRO-3 step of as many blocks as memory allows, where DeepSpeed is installed.

Peak memory stands beside what ``loomvideo plan`` counts. ``--device cpu --model tiny --quick`` tries the script itself.

The dense reference is ``tests/fixtures/dense_dit.py``: modulation rows for every token, RoPE in eager PyTorch, one
sample at a time, the MLLM embedder and keys and values computed at every step.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("sample", "train", "deepspeed")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def make_importable() -> None:
    """Let ``import loomvideo`` find this checkout's rooms where nothing is installed."""
    sys.path.insert(0, str(ROOT / "tests"))
    if importlib.util.find_spec("loomvideo") is None:
        package = Path(tempfile.mkdtemp()) / "loomvideo"
        package.mkdir()
        for room in ("model", "platform"):
            os.symlink(ROOT / room, package / room)
        sys.path.insert(0, str(package.parent))


def make_sample(config, device, grid, mllm_tokens, references=(), source=False, generator=None):
    """A random bf16 sample on the device; ``grid`` is (frames, height, width) of the latents."""
    from loomvideo.model.packing import DiTSample

    def random(*shape):
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    return DiTSample(
        latents=random(config.in_channels, *grid),
        timestep=500.0,
        mllm_states=random(config.num_layers, mllm_tokens, config.mllm_dim),
        source=random(config.in_channels, *grid) if source else None,
        source_scale=0.5,
        references=[random(config.in_channels, 1, *size) for size in references],
    )


def workloads(config, device, quick):
    """Samples by workload name."""
    generator = torch.Generator(device).manual_seed(0)

    def sample(*arguments, **options):
        return make_sample(config, device, *arguments, generator=generator, **options)

    if quick:
        return {"edit": [sample((2, 4, 4), 8, source=True)]}
    edit = [sample((25, 30, 52), 780, source=True)]
    images = [sample((1, 40, 40), 420, source=True) for _ in range(12)]
    clips = [sample((9, 30, 40), 300), sample((9, 30, 40), 700, references=[(30, 40)], source=True)]
    return {"edit": edit, "mixed": [*images, *clips]}


def measure(function: Callable[[], None], repeats: int = 5, enough_ms: float = 8000.0) -> dict:
    """Median milliseconds after two warm-ups, seconds of the first call, and peak memory (on a GPU).

    Not repeated further once the repeats have taken ``enough_ms``.
    """
    started = time.perf_counter()
    if not torch.cuda.is_available():
        function()
        first_s = time.perf_counter() - started
        started = time.perf_counter()
        function()
        return {"ms": 1e3 * (time.perf_counter() - started), "first_call_s": first_s}
    function()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - started
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
        if sum(times) > enough_ms:
            break
    return {
        "ms": statistics.median(times),
        "ms_all": times,
        "first_call_s": first_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def reason(error: Exception) -> str:
    """What an error says in one line, and where it was raised: a bare assertion says nothing else."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]} ({Path(place.filename).name}:{place.lineno})"
    )


class Report:
    """Results so far, written after each configuration."""

    def __init__(self, path: Path, peak_flops: float, deadline: float) -> None:
        self.path, self.peak_flops, self.deadline = path, peak_flops, deadline
        on_gpu = torch.cuda.is_available()
        self.content = {
            "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else 0.0,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "peak_flops": peak_flops,
            "results": [],
        }

    def run(self, name: str, flops: float, function: Callable[[], None], **facts: object) -> None:
        """Measure one configuration unless the time is up."""
        entry = {"name": name, **facts, "tflop": flops / 1e12}
        if time.monotonic() > self.deadline:
            entry["skipped"] = "time limit"
        else:
            try:
                entry |= measure(function)
                entry["mfu"] = flops / (entry["ms"] / 1000) / self.peak_flops
            except Exception as error:
                entry["error"] = reason(error)
            gc.collect()
            torch.cuda.empty_cache()
        self.content["results"].append(entry)
        print(json.dumps(entry), flush=True)
        self.write()

    def write(self) -> None:
        """Write everything so far."""
        self.path.write_text(json.dumps(self.content, indent=2))


def usable_kernels(report: Report) -> list[str]:
    """Kernel back ends of this machine; what keeps one from use goes to the report."""
    from loomvideo.model import kernels

    usable = ["eager"]
    if not torch.cuda.is_available():
        kernels.set_backend("eager")
        return usable
    try:
        kernels.set_backend("triton", required=True)
        usable.append("triton")
    except Exception as error:
        report.content["triton_unusable"] = f"{type(error).__name__}: {error}"
    kernels.set_backend("eager")
    return usable


def runs_without_synchronisation(step: Callable[[], None]) -> bool | str:
    """Whether the host never waits for the device in a step; else the message of the first wait."""
    step()
    if not torch.cuda.is_available():
        return "no GPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return reason(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def train(report: Report, model, samples_by_name, kernel_backends) -> None:
    """Forward and backward."""
    from fixtures.dense_dit import dense_velocity

    from loomvideo.model import attention_choice, kernels
    from loomvideo.model.flops import pack_flops
    from loomvideo.model.packing import pack

    fast = kernel_backends[-1]
    # The most telling first: what time is left decides how many are run.
    modes = [
        (fast, True, "selective", "auto"),
        (fast, False, "selective", "auto"),
        (fast, True, "none", "auto"),
        (fast, False, "full", "auto"),
        (fast, False, "none", "auto"),
        *((fast, False, "selective", backend) for backend in attention_implementations()),
        ("eager", False, "full", "auto"),
        ("eager", True, "full", "auto"),
    ]
    static_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    for workload, samples in samples_by_name.items():
        batch = pack(samples, model.config.patch_size)
        flops = pack_flops(model.config, batch).total

        def step(batch=batch):
            model(batch).float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        model.set_activation_checkpointing("full")
        report.content.setdefault("step_without_synchronisation", {})[workload] = runs_without_synchronisation(step)
        for backend, compiled, checkpointing, attention in modes:
            if backend not in kernel_backends or (compiled and not torch.cuda.is_available()):
                continue
            kernels.set_backend(backend, required=True)
            model.set_activation_checkpointing(checkpointing)
            attention_choice.request_attention(attention)
            prepare(model, compiled)
            report.run(
                f"train {workload}",
                flops,
                step,
                kernels=backend,
                compiled=compiled,
                checkpointing=checkpointing,
                attention=attention_in_use(model, attention),
                planned_gib=planned_gib(model, batch, checkpointing, static_bytes),
                tokens=batch.num_tokens,
                mllm_tokens=batch.num_mllm_tokens,
                samples=batch.num_samples,
            )
        weights = dict(model.named_parameters())

        def dense_step(samples=samples, weights=weights):
            for sample in samples:
                dense_velocity(weights, model.config, sample, recompute=True).float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        report.run(f"train {workload}", flops, dense_step, kernels="dense reference", checkpointing="full")
    attention_choice.request_attention("auto")
    report.content["attention"] = attention_choice.report()


@torch.no_grad()
def sampling(report: Report, model, sample, kernel_backends) -> None:
    """One denoising step with three branches."""
    from fixtures.dense_dit import dense_velocity

    from loomvideo.model import kernels
    from loomvideo.model.flops import sequence_flops
    from loomvideo.model.guidance import FULL, UNCONDITIONAL, VISUAL
    from loomvideo.model.packing import DiTSample, pack
    from loomvideo.model.sampler import Branch, Denoiser

    config, states = model.config, sample.mllm_states
    branches = {
        FULL: Branch(states, sample.source),
        VISUAL: Branch(states[:, : -max(states.shape[1] // 16, 1)], sample.source),
        UNCONDITIONAL: Branch(states[:, :24]),
    }
    num_tokens = pack([sample], config.patch_size).num_tokens
    lengths = [branch.mllm_states.shape[1] for branch in branches.values()]
    flops = sequence_flops(config, [num_tokens] * 3, lengths).forward
    timesteps = torch.linspace(999, 1, 50)
    latents = sample.latents.float()
    for backend in reversed(kernel_backends):
        for compiled in (False, True) if torch.cuda.is_available() else (False,):
            for batched in (False, True):
                kernels.set_backend(backend, required=True)
                prepare(model, compiled)
                facts = {"kernels": backend, "compiled": compiled, "batch_branches": batched, "tokens": num_tokens}
                denoiser = Denoiser(model, latents, branches, timesteps, batched)
                report.run("sampling step, 3 branches", flops, lambda d=denoiser: d.velocities(latents, 10), **facts)
                del denoiser
    kernels.set_backend(kernel_backends[-1], required=True)
    prepare(model, False)
    report.run("before the first step", 0, lambda: Denoiser(model, latents, branches, timesteps))

    weights = dict(model.named_parameters())

    def dense_step():
        for branch in branches.values():
            step = DiTSample(sample.latents, 500.0, branch.mllm_states, branch.source, 0.5)
            dense_velocity(weights, config, step)

    report.run("sampling step, 3 branches", flops, dense_step, kernels="dense reference", tokens=num_tokens)


def attention_implementations() -> list[str]:
    """What may compute attention on this device, best first."""
    from loomvideo.model.attention_choice import Device, candidates

    if not torch.cuda.is_available():
        return []
    return [*candidates("auto", torch.bfloat16, Device.here(torch.device("cuda")), deterministic=False)[0], "sdpa"]


def attention_in_use(model, requested: str) -> str:
    """The name of what will compute attention, or why nothing can."""
    from loomvideo.model.attention import settled_attention

    try:
        return settled_attention(next(model.parameters()), model.config.attention_head_dim)
    except ValueError as error:
        return f"{requested}: {error}"


def planned_gib(model, batch, checkpointing: str, static_bytes: int) -> float:
    """What ``loomvideo plan`` counts for a pack, on top of what lies on the device before: weights, samples."""
    from loomvideo.model.memory import activation_bytes

    gradients = 2 * sum(parameter.numel() for parameter in model.parameters())
    own = activation_bytes(model.config, batch.num_tokens, batch.num_mllm_tokens, checkpointing)
    return (static_bytes + gradients + own) / 2**30


def deepspeed_step(report: Report, config, batch, memory_bytes: float) -> None:
    """A ZeRO-3 step as a run makes it, of as many blocks as fit: 22 bytes a parameter beside the activations."""
    from loomvideo.model.dit import LoomVideoDiT
    from loomvideo.model.flops import pack_flops
    from loomvideo.model.memory import activation_bytes
    from loomvideo.platform.training.config import TrainingConfig
    from loomvideo.platform.training.zero import deepspeed_config, import_deepspeed

    def needed(num_layers: int) -> float:
        part = dataclasses.replace(config, num_layers=num_layers)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in LoomVideoDiT(part).parameters())
        return 22 * parameters + activation_bytes(part, batch.num_tokens, batch.num_mllm_tokens, "selective")

    fitting = [n for n in range(config.num_layers, 0, -1) if not memory_bytes or needed(n) < 0.85 * memory_bytes]
    part = dataclasses.replace(config, num_layers=fitting[0])
    device = batch.patches.device
    model = LoomVideoDiT(part).to(device, torch.bfloat16)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    model.set_activation_checkpointing("selective")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        config=deepspeed_config(
            TrainingConfig(), sum(p.numel() for p in model.parameters()), 1, on_gpu=device.type == "cuda"
        ),
    )
    batch = dataclasses.replace(batch, mllm_states=batch.mllm_states[: part.num_layers])

    def step() -> None:
        engine.backward(engine(batch).float().square().mean())
        engine.step()

    report.run(
        "DeepSpeed ZeRO-3 step", pack_flops(part, batch).total, step, checkpointing="selective",
        blocks=part.num_layers, tokens=batch.num_tokens,
    )  # fmt: skip


def prepare(model, compiled: bool) -> None:
    """Compile the blocks, or undo it."""
    torch._dynamo.reset()
    if compiled:
        model.compile_blocks()
    else:
        model.run_blocks_eagerly()


def main() -> None:
    """Parse arguments, build the model, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_model.json")
    parser.add_argument("--model", default="5b")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sequences, to try the script itself")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script itself")
    parser.add_argument("--time-limit-s", type=float, default=540, help="start no configuration after this")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.time_limit_s
    make_importable()

    from loomvideo.model.dit import LoomVideoDiT
    from loomvideo.model.sizes import model_size

    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu"
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), float("nan"))
    report = Report(arguments.output, peak, deadline)
    with torch.device("meta"):
        model = LoomVideoDiT(model_size(arguments.model).dit)
    model = model.bfloat16().to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    report.content["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    kernel_backends = usable_kernels(report)
    samples_by_name = workloads(model.config, device, arguments.quick)
    if "sample" in arguments.only:
        sampling(report, model, samples_by_name["edit"][0], kernel_backends)
    if "train" in arguments.only:
        train(report, model, samples_by_name, kernel_backends)
    if "deepspeed" in arguments.only:
        from loomvideo.model.packing import pack

        batch, config = pack(samples_by_name["edit"], model.config.patch_size), model.config
        del model
        gc.collect()
        memory_bytes = 0.0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            memory_bytes = torch.cuda.mem_get_info()[0]
        try:
            deepspeed_step(report, config, batch, memory_bytes)
        except Exception as error:  # a part that cannot run here must not lose the others
            report.content["results"].append({"name": "DeepSpeed ZeRO-3 step", "error": reason(error)})
    report.write()


if __name__ == "__main__":
    main()
