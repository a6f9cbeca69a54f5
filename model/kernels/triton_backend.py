"""The Triton back end: raw kernels on CUDA tensors, without autograd (see :mod:`~loomvideo.model.kernels.fused`).

With ``TRITON_INTERPRET=1`` set before the first import of Triton they run on CPU tensors, slowly, for tests.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import triton
from torch import Tensor

from loomvideo.model.kernels import triton_kernels as kernels
from loomvideo.model.kernels.rope import MAX_POSITION, axis_sizes, rope_tables

NAME = "triton"
_recorder: Callable[..., None] | None = None
PROGRAMS_PER_MULTIPROCESSOR = 4
"""Spans of the backward kernels: enough warps in flight to hide memory latency, few enough partial sums."""


def norm_rope_forward(
    xs: list[Tensor],
    weights: list[Tensor],
    positions: Tensor | None,
    num_heads: int,
    eps: float,
    theta: float,
    round_norm: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """RMS norm of one or two tensors ``[L, D]`` and their rotation: results and reciprocal root mean squares."""
    xs = [_rows(x) for x in xs]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    rstds = [_float_tokens(x) for x in xs]
    positions, options = _rope_options(xs[0], positions, num_heads)
    tables = _tables(xs[0], positions, num_heads, theta)
    _launch(
        kernels.norm_rope_forward,
        (len(xs[0]),),
        xs[0],
        *_pairs(xs, weights, outs, rstds),
        positions,
        tables,
        *_strides(xs),
        eps,
        TWO=len(xs) == 2,
        ROUND=round_norm,
        **options,
    )
    return outs, rstds


def norm_rope_backward(
    grads: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    rstds: list[Tensor],
    positions: Tensor | None,
    num_heads: int,
    theta: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the tensors and of their weights."""
    xs, grads = [_rows(x) for x in xs], [_rows(g) for g in grads]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    programs, span = _spans(xs[0])
    partials = [torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device) for x in xs]
    positions, options = _rope_options(xs[0], positions, num_heads)
    tables = _tables(xs[0], positions, num_heads, theta)
    _launch(
        kernels.norm_rope_backward,
        (programs, len(xs)),
        xs[0],
        *_pairs(xs, grads, weights, rstds, outs, partials),
        positions,
        tables,
        *_strides(xs),
        *_strides(grads),
        len(xs[0]),
        span,
        **options,
    )
    return outs, [partial.sum(0) for partial in partials]


def layer_norm_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_ids: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    norm_ids: Tensor | None,
    scale_offset: float,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Optional residual ``x + y * gate[row]``, then its layer norm times ``scale_offset + scale[row]`` plus shift."""
    x, y = _rows(x), None if y is None else _rows(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden = None if y is None else torch.empty_like(out)
    mean, rstd = _float_tokens(x), _float_tokens(x)
    gate, gate_ids, shift, scale, norm_ids = _contiguous(gate, gate_ids, shift, scale, norm_ids)
    _launch(
        kernels.layer_norm_forward,
        (len(x),),
        x,
        x,
        *_or(x, y),
        *_or(scale, gate),
        shift,
        scale,
        *_or(mean, gate_ids, norm_ids),
        *_or(out, hidden),
        out,
        mean,
        rstd,
        x.stride(0),
        x.stride(0) if y is None else y.stride(0),
        scale_offset,
        eps,
        HAS_Y=y is not None,
        HAS_GATE=gate is not None,
        HAS_IDS=norm_ids is not None,
        **_row_options(x.shape[1]),
    )
    return hidden, out, mean, rstd


def layer_norm_backward(
    grad_hidden: Tensor | None,
    grad_out: Tensor,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_ids: Tensor | None,
    scale: Tensor,
    norm_ids: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale_offset: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of x, y, gate (None without a gate; then y's is x's), shift and scale; ``x`` is the norm's input."""
    x, grad_out = _rows(x), _rows(grad_out)
    grad_hidden = None if grad_hidden is None else _rows(grad_hidden)
    y = None if gate is None else _rows(y)
    gate, gate_ids, scale, norm_ids = _contiguous(gate, gate_ids, scale, norm_ids)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_y = None if gate is None else torch.empty_like(grad_x)
    grad_gate = None if gate is None else torch.zeros_like(gate)
    grad_shift, grad_scale = torch.zeros_like(scale), torch.zeros_like(scale)
    parts = 2 if gate is None else 3
    programs, span = _spans(x)
    slots = torch.empty(programs, 2, parts, x.shape[1], dtype=torch.float32, device=x.device)
    norm_rows, gate_rows = torch.full((2, programs, 2), -1, dtype=torch.int32, device=x.device)
    _launch(
        kernels.layer_norm_backward,
        (programs,),
        x,
        *_or(x, grad_hidden),
        grad_out,
        x,
        *_or(x, y),
        *_or(scale, gate),
        scale,
        *_or(mean, gate_ids, norm_ids),
        mean,
        rstd,
        grad_x,
        *_or(grad_x, grad_y),
        grad_shift,
        grad_scale,
        *_or(grad_scale, grad_gate),
        slots,
        norm_rows,
        gate_rows,
        x.stride(0) if grad_hidden is None else grad_hidden.stride(0),
        grad_out.stride(0),
        x.stride(0),
        x.stride(0) if y is None else y.stride(0),
        len(x),
        span,
        scale_offset,
        HAS_HIDDEN=grad_hidden is not None,
        HAS_GATE=gate is not None,
        HAS_IDS=norm_ids is not None,
        PARTS=parts,
        **_row_options(x.shape[1]),
    )
    _reduce(slots, 0, norm_rows, grad_shift)
    _reduce(slots, 1, norm_rows, grad_scale)
    if gate is not None:
        _reduce(slots, 2, gate_rows, grad_gate)
    return grad_x, grad_y, grad_gate, grad_shift, grad_scale


def residual_forward(x: Tensor, y: Tensor, gate: Tensor, row_ids: Tensor) -> Tensor:
    """``x + y * gate[row]``."""
    x, y = _rows(x), _rows(y)
    gate, row_ids = _contiguous(gate, row_ids)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides = _strides([x, y])
    _launch(kernels.residual_forward, (len(x),), x, x, y, gate, row_ids, out, *strides, **_row_options(x.shape[1]))
    return out


def residual_backward(grad: Tensor, y: Tensor, gate: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the gate."""
    grad, y = _rows(grad), _rows(y)
    gate, row_ids = _contiguous(gate, row_ids)
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grad_gate = torch.zeros_like(gate)
    programs, span = _spans(y)
    slots = torch.empty(programs, 2, 1, y.shape[1], dtype=torch.float32, device=y.device)
    slot_rows = torch.full((programs, 2), -1, dtype=torch.int32, device=y.device)
    _launch(
        kernels.residual_backward,
        (programs,),
        y,
        grad,
        y,
        gate,
        row_ids,
        grad_y,
        grad_gate,
        slots,
        slot_rows,
        *_strides([grad, y]),
        len(y),
        span,
        **_row_options(y.shape[1]),
    )
    _reduce(slots, 0, slot_rows, grad_gate)
    return grad_y, grad_gate


def join_patches(patches: Tensor, source: Tensor, scale: Tensor, row_ids: Tensor, width: int) -> Tensor:
    """``[L, width]``: patches, scaled source patches, 1, the scale in two parts, zeros."""
    patches, source = _rows(patches), _rows(source)
    scale, row_ids = _contiguous(scale, row_ids)
    out = torch.empty(len(patches), width, dtype=patches.dtype, device=patches.device)
    block_tokens = 8
    _launch(
        kernels.join_patches,
        (triton.cdiv(len(patches), block_tokens),),
        patches,
        patches,
        source,
        scale,
        row_ids,
        out,
        len(patches),
        *_strides([patches, source]),
        len(scale),
        PATCH=patches.shape[1],
        WIDTH=width,
        BLOCK_TOKENS=block_tokens,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
    return out


@contextlib.contextmanager
def recorded_launches(record: Callable[..., None]) -> Iterator[None]:
    """Hand every launch of the body to ``record(kernel, grid, on, *arguments, **options)`` instead of a GPU."""
    global _recorder
    _recorder = record
    try:
        yield
    finally:
        _recorder = None


def _launch(kernel, grid: tuple[int, ...], on: Tensor, *arguments, **options) -> None:
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder(kernel, grid, on, *arguments, **options)
        return
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        # Contraction to fused multiply-adds is stated, since Triton's default for it changes in 3.10.
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


def _reduce(slots: Tensor, part: int, slot_rows: Tensor, out: Tensor) -> None:
    programs, _, parts, dim = slots.shape
    block = 128
    _launch(
        kernels.reduce_slots,
        (len(out) if programs else 0, triton.cdiv(dim, block)),
        slots,
        slots[:, :, part] if not slots.numel() else slots.view(-1)[part * dim :],
        slot_rows,
        out,
        2 * programs,
        parts * dim,
        DIM=dim,
        BLOCK_SLOTS=32,
        BLOCK=block,
        num_warps=4,
    )


def _spans(x: Tensor) -> tuple[int, int]:
    """Number of programs and tokens a program for the backward kernels; no program is left without a token."""
    span = max(1, triton.cdiv(len(x), PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(x.device)))
    return triton.cdiv(len(x), span), span


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    # Two in the interpreter, so that tests see several spans.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _rope_options(x: Tensor, positions: Tensor | None, num_heads: int) -> tuple[Tensor, dict]:
    head_dim = x.shape[1] // num_heads
    sizes = axis_sizes(head_dim)
    block_heads, block_pairs = triton.next_power_of_2(num_heads), triton.next_power_of_2(max(head_dim // 2, 1))
    if positions is None and num_heads == 1:  # a plain norm: any even split of the row
        block_heads, block_pairs = 1, triton.next_power_of_2(triton.cdiv(head_dim, 2))
    options = {
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "TIME_PAIRS": sizes[0] // 2,
        "SIDE_PAIRS": sizes[1] // 2,
        "MAX_POSITION": MAX_POSITION,
        "ROTATE": positions is not None,
        "BLOCK_HEADS": block_heads,
        "BLOCK_PAIRS": block_pairs,
        "num_warps": _num_warps(2 * block_heads * block_pairs),
    }
    positions = x.new_zeros(1, 3, dtype=torch.int32) if positions is None else positions.int().contiguous()
    return positions, options


def _tables(x: Tensor, positions: Tensor, num_heads: int, theta: float) -> Tensor:
    if theta == 0.0:  # no rotation
        return x.new_zeros(1, dtype=torch.float32)
    return rope_tables(x.shape[1] // num_heads, theta, positions.device, torch.float32)


def _row_options(dim: int) -> dict:
    block = triton.next_power_of_2(dim)
    return {"DIM": dim, "BLOCK": block, "num_warps": _num_warps(block)}


def _num_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _pairs(*lists: list[Tensor]) -> list[Tensor]:
    """First and second tensor of each list; a list of one stands for both."""
    return [tensor for tensors in lists for tensor in (tensors[0], tensors[-1])]


def _strides(tensors: list[Tensor]) -> list[int]:
    return [tensors[0].stride(0), tensors[-1].stride(0)]


def _or(default: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Kernel arguments must be tensors even where a flag says that they are not read."""
    return [default if tensor is None else tensor for tensor in tensors]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _float_tokens(x: Tensor) -> Tensor:
    return torch.empty(len(x), dtype=torch.float32, device=x.device)
