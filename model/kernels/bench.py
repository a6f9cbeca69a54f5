"""Timing the operations of a back end against eager, with the bytes they must move.

The floor of an operation counts every input read once and every result written once; its share of the measured copy
bandwidth says how much there is left to gain.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from loomvideo.model.kernels import eager
from loomvideo.model.kernels.backends import load_operations
from loomvideo.model.kernels.selfcheck import example_arguments

TIMED = ("scale_and_add", "qk_norm_rope", "layer_norm_modulate", "gated_residual", "residual_norm", "rms_norm")


@dataclass(frozen=True)
class Timing:
    """Medians of one operation in one dtype.

    Attributes:
        name: The name of the operation.
        dtype: The type of the activations.
        phase: ``forward`` (without autograd) or ``forward+backward``.
        eager_ms: The definition.
        fused_ms: The back end.
        floor_bytes: What must be read and written.
        fused_share: Floor bytes a second over the copy bandwidth.
    """

    name: str
    dtype: str
    phase: str
    eager_ms: float
    fused_ms: float
    floor_bytes: int
    fused_share: float

    @property
    def gain(self) -> float:
        """How many times faster than eager."""
        return self.eager_ms / self.fused_ms

    def row(self) -> dict:
        """As plain values."""
        return {**asdict(self), "gain": self.gain}


def time_backend(
    backend: str,
    tokens: int = 4096,
    dim: int = 3072,
    num_heads: int = 24,
    patch: int = 192,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    repeats: int = 9,
) -> Iterator[Timing]:
    """Time every operation of a CPU back end, one result at a time.

    Args:
        backend: ``cpp``.
        tokens: ``L``.
        dim: Model width.
        num_heads: The heads of the attention.
        patch: Values in a latent patch.
        dtypes: The types of the activations.
        repeats: Timed calls; the median counts.
    """
    operations = load_operations(backend)
    bandwidth = copy_bandwidth()
    for dtype in dtypes:
        for name in TIMED:
            arguments, keywords = model_arguments(name, tokens, dim, num_heads, patch, dtype)
            for phase, call in (("forward", forward), ("forward+backward", forward_and_backward)):
                times = [
                    median_ms(lambda f=f, call=call, a=arguments, k=keywords: call(f, a, k), repeats)
                    for f in (getattr(eager, name), getattr(operations, name))
                ]
                floor = floor_bytes(getattr(eager, name), arguments, keywords, backward=phase != "forward")
                share = floor / (times[1] / 1e3) / bandwidth
                yield Timing(name, str(dtype).removeprefix("torch."), phase, *times, floor, share)


def model_arguments(
    name: str, tokens: int, dim: int, num_heads: int, patch: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict]:
    """Arguments of an operation at a model's sizes; latent patches are data and need no gradient."""
    width = patch if name == "scale_and_add" else dim
    arguments, keywords = example_arguments(name, width, dtype, device, tokens, num_heads)
    if name == "scale_and_add":
        shapes = (dim, patch), (dim,), (dim, patch), (dim,)
        weights = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
        arguments = (*(a.detach() for a in arguments[:4]), *weights)
    return arguments, keywords


def forward(function: Callable, arguments: tuple, keywords: dict) -> None:
    """One call without autograd."""
    with torch.no_grad():
        function(*arguments, **keywords)


def forward_and_backward(function: Callable, arguments: tuple, keywords: dict) -> None:
    """One call and the gradients of everything that requires one."""
    results = function(*arguments, **keywords)
    results = [results] if isinstance(results, Tensor) else list(results)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    torch.autograd.grad(results, leaves, [r.detach() for r in results])


def floor_bytes(function: Callable, arguments: tuple, keywords: dict, backward: bool) -> int:
    """Bytes that a call must read and write; the backward reads the inputs and result gradients again."""
    with torch.no_grad():
        results = function(*arguments, **keywords)
    results = [results] if isinstance(results, Tensor) else list(results)
    inputs = [a for a in arguments if isinstance(a, Tensor)]
    once = sum(t.nbytes for t in inputs) + sum(r.nbytes for r in results)
    return once + (once + sum(t.nbytes for t in inputs if t.requires_grad) if backward else 0)


def median_ms(call: Callable[[], None], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median time of a call after a warm-up; ``time.process_time`` leaves out what other processes take."""
    call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times) * 1e3


def copy_bandwidth(num_bytes: int = 256 << 20, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second, read and written, of a large copy with all of PyTorch's threads."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    return 2 * num_bytes / (median_ms(lambda: target.copy_(source), 7, clock) / 1e3)
