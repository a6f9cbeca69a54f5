"""A back end against the definition on small made-up inputs, forward and backward."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from loomvideo.model.kernels import eager
from loomvideo.model.kernels.fused import OPERATIONS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
"""Largest relative error ``|out - ref| / |ref|`` (Frobenius norms) of any result or gradient."""


def example_arguments(
    name: str,
    width: int,
    dtype: torch.dtype,
    device: str | torch.device,
    tokens: int = 33,
    num_heads: int | None = None,
    seed: int = 0,
) -> tuple[tuple, dict]:
    """Random arguments of an operation: several rows, one of them empty, a one-token segment, negative positions.

    Args:
        name: The name of the operation.
        width: Size of the last dimension of its first argument.
        dtype: The type of the activations.
        device: The device of all tensors.
        tokens: ``L``, at least 4.
        num_heads: The heads of ``qk_norm_rope``; by default heads of 128, or one.
        seed: The seed of the values.

    Returns:
        Positional and keyword arguments; float tensors that training differentiates require gradients.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, as_dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=as_dtype).requires_grad_()

    row_dtype = eager.compute_dtype(dtype)
    num_rows = 4
    lengths = [tokens // 2, 0, 1, tokens - tokens // 2 - 1]  # row 1 is empty, row 2 holds one token
    row_ids = torch.repeat_interleave(torch.arange(num_rows), torch.tensor(lengths)).int().to(device)
    x = normal(tokens, width)
    if name == "scale_and_add":
        scale = torch.rand(num_rows - 1, generator=generator).to(device=device, dtype=row_dtype)
        out = 48
        weights = normal(out, width), normal(out), normal(out, width), normal(out)
        return (x, normal(tokens, width), scale, row_ids, *weights), {}
    if name == "qk_norm_rope":
        positions = torch.randint(0, 60, (tokens, 3), generator=generator)
        positions[-3:, 0] = torch.tensor([-10, -20, -30])
        num_heads = num_heads or (width // 128 if width % 128 == 0 else 1)
        weights = normal(width), normal(width)
        return (x, normal(tokens, width), *weights, positions.int().to(device), num_heads, 1e-6), {"round_norm": False}
    if name == "rms_norm":
        return (x, normal(width), 1e-6), {}
    if name == "layer_norm":
        return (x, normal(width), normal(width), 1e-6), {}
    rows = [normal(num_rows, width, as_dtype=row_dtype) for _ in range(3)]
    if name == "layer_norm_modulate":
        return (x, *rows[:2], row_ids, 1e-6), {}
    if name == "gated_residual":
        return (x, normal(tokens, width), rows[0], row_ids), {}
    if name == "residual_norm":
        return (x, normal(tokens, width), *rows, row_ids, 1e-6), {}
    raise KeyError(name)


def training_calls(
    width: int, num_heads: int, dtype: torch.dtype, device: str | torch.device, tokens: int = 33, patch: int = 192
) -> Iterator[tuple[str, tuple, dict]]:
    """Every operation in every form that a training step uses: ``(name, arguments, keywords)``."""
    for name in OPERATIONS:
        size = patch if name == "scale_and_add" else width
        arguments, keywords = example_arguments(name, size, dtype, device, tokens, num_heads)
        if name == "qk_norm_rope":
            yield name, arguments, {"round_norm": True}
        yield name, arguments, keywords
        if name == "residual_norm":
            x, y, gate, shift, scale, *rest = arguments
            yield name, (x, y, None, shift, scale, *rest), {}
            own = [rows[0].detach().requires_grad_() for rows in (shift, scale)]
            yield name, (x, y, gate, *own, *rest), {"affine": True}


def results_and_gradients(function: Callable, arguments: tuple, keywords: dict) -> list[Tensor]:
    """Results of a call, then the gradients of its float arguments under fixed random result gradients."""
    with torch.enable_grad():
        copies = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments]
        results = function(*copies, **keywords)
        results = [results] if isinstance(results, Tensor) else list(results)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(r.shape, generator=generator).to(r.device, r.dtype) for r in results]
        leaves = [a for a in copies if isinstance(a, Tensor) and a.requires_grad]
        gradients = torch.autograd.grad(results, leaves, weights)
    return [value.detach() for value in (*results, *gradients)]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``|value - reference| / |reference|`` in float64; infinite if anything is not a number."""
    error = (value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def disagreement(function: Callable, name: str, dtype: torch.dtype, device: str, width: int) -> str | None:
    """How a back end's operation differs from the definition by more than :data:`TOLERANCE`, or None.

    The comparison has a thread of its own: the caller's saved-tensor hooks, dispatch modes and inference mode, which
    are thread-local, must not touch its tensors (activation checkpointing would take them for the model's).
    """
    cuda_device = torch.cuda.current_device() if device == "cuda" else None

    def compare() -> str | None:
        if cuda_device is not None:
            torch.cuda.set_device(cuda_device)
        return _disagreement(function, name, dtype, device, width)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(compare).result()


def _disagreement(function: Callable, name: str, dtype: torch.dtype, device: str, width: int) -> str | None:
    arguments, keywords = example_arguments(name, width, dtype, device)
    values = results_and_gradients(function, arguments, keywords)
    references = results_and_gradients(getattr(eager, name), arguments, keywords)
    for index, (value, reference) in enumerate(zip(values, references, strict=True)):
        if value.shape != reference.shape or value.dtype != reference.dtype:
            return (
                f"value {index} is {value.dtype} {tuple(value.shape)}, not {reference.dtype} {tuple(reference.shape)}"
            )
        error = relative_error(value, reference)
        if not error <= TOLERANCE[dtype]:
            return f"value {index} has relative error {error:.1e}, over {TOLERANCE[dtype]:.1e}"
    return None
