"""The C++ back end: raw kernels on CPU tensors, without autograd (see :mod:`~loomvideo.model.kernels.fused`)."""

import ctypes
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from loomvideo.model.kernels import cpp_build
from loomvideo.model.kernels.eager import compute_dtype
from loomvideo.model.kernels.rope import MAX_POSITION, rope_tables
from loomvideo.platform.nodes.artifacts import Artifact, ArtifactStore

NAME = "cpp"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_ERRORS = {
    1: (IndexError, "a row id is outside the modulation rows"),
    2: (IndexError, f"a position is outside the rotary tables (limit {MAX_POSITION - 1})"),
    3: (MemoryError, "out of memory"),
    4: (TypeError, "unsupported dtype"),
}


class _NormRope(Structure):
    _fields_ = [
        ("num_tensors", c_int64),
        ("x", c_void_p * 2),
        ("x_stride", c_int64 * 2),
        ("weight", c_void_p * 2),
        ("positions", c_void_p),
        ("tables", c_void_p),
        ("rstd", c_void_p * 2),
        ("out", c_void_p * 2),
        ("grad", c_void_p * 2),
        ("grad_stride", c_int64 * 2),
        ("weight_grad", c_void_p * 2),
        *((name, c_int64) for name in ("tokens", "heads", "head_dim", "max_position", "round_norm", "threads")),
        ("eps", c_double),
    ]


class _LayerNorm(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        *(
            (name, c_void_p)
            for name in ("gate", "shift", "scale", "gate_ids", "norm_ids", "hidden", "out", "mean", "rstd")
        ),
        ("grad_out", c_void_p),
        ("grad_out_stride", c_int64),
        ("grad_hidden", c_void_p),
        ("grad_hidden_stride", c_int64),
        *((name, c_void_p) for name in ("grad_x", "grad_y", "grad_gate", "grad_shift", "grad_scale")),
        *((name, c_int64) for name in ("tokens", "dim", "gate_rows", "norm_rows", "threads")),
        ("eps", c_double),
        ("scale_offset", c_double),
    ]


class _Residual(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("gate", c_void_p),
        ("ids", c_void_p),
        ("out", c_void_p),
        ("grad", c_void_p),
        ("grad_stride", c_int64),
        ("grad_gate", c_void_p),
        *((name, c_int64) for name in ("tokens", "dim", "rows", "threads")),
    ]


class _Join(Structure):
    _fields_ = [
        ("patches", c_void_p),
        ("patches_stride", c_int64),
        ("source", c_void_p),
        ("source_stride", c_int64),
        ("scale", c_void_p),
        ("ids", c_void_p),
        ("out", c_void_p),
        *((name, c_int64) for name in ("tokens", "patch", "samples", "width", "threads")),
    ]


_SIGNATURES = {
    "norm_rope_forward": _NormRope,
    "norm_rope_backward": _NormRope,
    "layer_norm_forward": _LayerNorm,
    "layer_norm_backward": _LayerNorm,
    "residual_forward": _Residual,
    "residual_backward": _Residual,
    "join_patches": _Join,
}


def prepare(store: ArtifactStore | None = None) -> Artifact:
    """Build or fetch this machine's library, without loading it."""
    store = store or ArtifactStore.from_environment()
    return store.get(cpp_build.artifact_key(), cpp_build.build, cpp_build.check)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded library, built first if it is nowhere to be found."""
    artifact = prepare()
    loaded = ctypes.CDLL(str(artifact.path / cpp_build.LIBRARY))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, f"loomvideo_{name}")
        function.argtypes, function.restype = (c_int, POINTER(arguments)), c_int
    loaded.artifact = artifact
    return loaded


def isa_level(limit: int | None = None) -> int:
    """The x86-64 level in use (2, 3 or 4); with ``limit``, use at most that level from now on."""
    return library().loomvideo_isa() if limit is None else library().loomvideo_limit_isa(limit)


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
    outs = [torch.empty(x.shape, dtype=x.dtype) for x in xs]
    rstds = [torch.empty(len(x), dtype=compute_dtype(x.dtype)) for x in xs]
    _norm_rope("norm_rope_forward", xs, weights, positions, num_heads, eps, theta, round_norm, rstds, outs)
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
    outs = [torch.empty(x.shape, dtype=x.dtype) for x in xs]
    weight_grads = [torch.empty_like(w) for w in weights]
    _norm_rope(
        "norm_rope_backward", xs, weights, positions, num_heads, 0.0, theta, False, rstds, outs, grads, weight_grads
    )
    return outs, weight_grads


def _norm_rope(
    name, xs, weights, positions, num_heads, eps, theta, round_norm, rstds, outs, grads=(), weight_grads=()
) -> None:
    head_dim = xs[0].shape[1] // num_heads
    tables = None
    if positions is not None:
        positions = positions.to(torch.int32).contiguous()
        tables = rope_tables(head_dim, theta, positions.device, compute_dtype(xs[0].dtype))
    weights = [w.contiguous() for w in weights]
    arguments = _NormRope(
        num_tensors=len(xs),
        x=_pointers(xs),
        x_stride=_strides(xs),
        weight=_pointers(weights),
        positions=_pointer(positions),
        tables=_pointer(tables),
        rstd=_pointers(rstds),
        out=_pointers(outs),
        grad=_pointers(grads),
        grad_stride=_strides(grads),
        weight_grad=_pointers(weight_grads),
        tokens=len(xs[0]),
        heads=num_heads,
        head_dim=head_dim,
        max_position=MAX_POSITION,
        round_norm=round_norm,
        threads=torch.get_num_threads(),
        eps=eps,
    )
    _call(name, xs[0].dtype, arguments)


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
    """Optional residual ``x + y * gate[row]``, then its layer norm times ``scale_offset + scale[row]`` plus shift.

    Returns:
        The new residual stream (None without ``y``), the norm, and each token's mean and reciprocal deviation.
    """
    x, y = _rows(x), None if y is None else _rows(y)
    hidden = None if y is None else torch.empty(x.shape, dtype=x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(len(x), dtype=compute_dtype(x.dtype)) for _ in range(2))
    gate, gate_ids, shift, scale, norm_ids = _contiguous(gate, gate_ids, shift, scale, norm_ids)
    arguments = _LayerNorm(
        x=_pointer(x),
        x_stride=x.stride(0),
        y=_pointer(y),
        y_stride=0 if y is None else y.stride(0),
        gate=_pointer(gate),
        shift=_pointer(shift),
        scale=_pointer(scale),
        gate_ids=_pointer(gate_ids),
        norm_ids=_pointer(norm_ids),
        hidden=_pointer(hidden),
        out=_pointer(out),
        mean=_pointer(mean),
        rstd=_pointer(rstd),
        tokens=len(x),
        dim=x.shape[1],
        gate_rows=0 if gate is None else len(gate),
        norm_rows=len(shift),
        threads=torch.get_num_threads(),
        eps=eps,
        scale_offset=scale_offset,
    )
    _call("layer_norm_forward", x.dtype, arguments)
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
    y = None if y is None else _rows(y)
    grad_hidden = None if grad_hidden is None else _rows(grad_hidden)
    gate, gate_ids, scale, norm_ids = _contiguous(gate, gate_ids, scale, norm_ids)
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_y = None if gate is None else torch.empty(x.shape, dtype=x.dtype)
    grad_gate = None if gate is None else torch.empty_like(gate)
    grad_shift, grad_scale = torch.empty_like(scale), torch.empty_like(scale)
    arguments = _LayerNorm(
        x=_pointer(x),
        x_stride=x.stride(0),
        y=_pointer(y),
        y_stride=0 if y is None else y.stride(0),
        gate=_pointer(gate),
        scale=_pointer(scale),
        gate_ids=_pointer(gate_ids),
        norm_ids=_pointer(norm_ids),
        mean=_pointer(mean),
        rstd=_pointer(rstd),
        grad_out=_pointer(grad_out),
        grad_out_stride=grad_out.stride(0),
        grad_hidden=_pointer(grad_hidden),
        grad_hidden_stride=0 if grad_hidden is None else grad_hidden.stride(0),
        grad_x=_pointer(grad_x),
        grad_y=_pointer(grad_y),
        grad_gate=_pointer(grad_gate),
        grad_shift=_pointer(grad_shift),
        grad_scale=_pointer(grad_scale),
        tokens=len(x),
        dim=x.shape[1],
        gate_rows=0 if gate is None else len(gate),
        norm_rows=len(scale),
        threads=torch.get_num_threads(),
        scale_offset=scale_offset,
    )
    _call("layer_norm_backward", x.dtype, arguments)
    return grad_x, grad_y, grad_gate, grad_shift, grad_scale


def residual_forward(x: Tensor, y: Tensor, gate: Tensor, row_ids: Tensor) -> Tensor:
    """``x + y * gate[row]``."""
    x, y = _rows(x), _rows(y)
    gate, row_ids = _contiguous(gate, row_ids)
    out = torch.empty(x.shape, dtype=x.dtype)
    arguments = _Residual(
        x=_pointer(x),
        x_stride=x.stride(0),
        y=_pointer(y),
        y_stride=y.stride(0),
        gate=_pointer(gate),
        ids=_pointer(row_ids),
        out=_pointer(out),
        tokens=len(x),
        dim=x.shape[1],
        rows=len(gate),
        threads=torch.get_num_threads(),
    )
    _call("residual_forward", x.dtype, arguments)
    return out


def residual_backward(grad: Tensor, y: Tensor, gate: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the gate."""
    grad, y = _rows(grad), _rows(y)
    gate, row_ids = _contiguous(gate, row_ids)
    grad_y, grad_gate = torch.empty(y.shape, dtype=y.dtype), torch.empty_like(gate)
    arguments = _Residual(
        y=_pointer(y),
        y_stride=y.stride(0),
        gate=_pointer(gate),
        ids=_pointer(row_ids),
        out=_pointer(grad_y),
        grad=_pointer(grad),
        grad_stride=grad.stride(0),
        grad_gate=_pointer(grad_gate),
        tokens=len(y),
        dim=y.shape[1],
        rows=len(gate),
        threads=torch.get_num_threads(),
    )
    _call("residual_backward", y.dtype, arguments)
    return grad_y, grad_gate


def join_patches(patches: Tensor, source: Tensor, scale: Tensor, row_ids: Tensor, width: int) -> Tensor:
    """``[L, width]``: patches, scaled source patches, 1, the scale in two parts, zeros."""
    patches, source = _rows(patches), _rows(source)
    scale, row_ids = _contiguous(scale, row_ids)
    out = torch.empty(len(patches), width, dtype=patches.dtype)
    arguments = _Join(
        patches=_pointer(patches),
        patches_stride=patches.stride(0),
        source=_pointer(source),
        source_stride=source.stride(0),
        scale=_pointer(scale),
        ids=_pointer(row_ids),
        out=_pointer(out),
        tokens=len(patches),
        patch=patches.shape[1],
        samples=len(scale),
        width=width,
        threads=torch.get_num_threads(),
    )
    _call("join_patches", patches.dtype, arguments)
    return out


def _call(name: str, dtype: torch.dtype, arguments: Structure) -> None:
    status = getattr(library(), f"loomvideo_{name}")(DTYPES[dtype], byref(arguments))
    if status:
        error, message = _ERRORS[status]
        raise error(f"{name}: {message}")


def _rows(x: Tensor) -> Tensor:
    """``x`` itself if its rows are contiguous, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pointers(tensors: list[Tensor] | tuple[Tensor, ...]) -> ctypes.Array:
    return (c_void_p * 2)(*(t.data_ptr() for t in tensors))


def _strides(tensors: list[Tensor] | tuple[Tensor, ...]) -> ctypes.Array:
    return (c_int64 * 2)(*(t.stride(0) for t in tensors))
