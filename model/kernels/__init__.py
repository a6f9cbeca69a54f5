"""Fused operations with interchangeable back ends, forward and backward.

The functions below are the DiT's elementwise work. :mod:`~loomvideo.model.kernels.eager` defines them in plain
PyTorch and is the back end in use until :func:`set_backend` chooses another; ``cpp`` and ``triton`` compute the same
values in one pass over memory. See docs/kernels.md.
"""

from torch import Tensor

from loomvideo.model.kernels.backends import BACKENDS, operation, report, set_backend, use_backend
from loomvideo.model.kernels.rope import MAX_POSITION, check_positions

__all__ = [
    "BACKENDS",
    "MAX_POSITION",
    "check_positions",
    "gated_residual",
    "layer_norm",
    "layer_norm_modulate",
    "qk_norm_rope",
    "report",
    "residual_norm",
    "rms_norm",
    "scale_and_add",
    "set_backend",
    "use_backend",
]


def scale_and_add(
    patches: Tensor,
    source_patches: Tensor,
    source_scale: Tensor,
    row_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    source_weight: Tensor,
    source_bias: Tensor,
) -> Tensor:
    """See :func:`loomvideo.model.kernels.eager.scale_and_add`."""
    function = operation("scale_and_add", patches)
    return function(patches, source_patches, source_scale, row_ids, weight, bias, source_weight, source_bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`loomvideo.model.kernels.eager.rms_norm`."""
    return operation("rms_norm", x)(x, weight, eps)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    num_heads: int,
    eps: float,
    theta: float = 10000.0,
    round_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """See :func:`loomvideo.model.kernels.eager.qk_norm_rope`."""
    return operation("qk_norm_rope", q)(q, k, q_weight, k_weight, positions, num_heads, eps, theta, round_norm)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`loomvideo.model.kernels.eager.layer_norm`."""
    return operation("layer_norm", x)(x, weight, bias, eps)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, row_ids: Tensor, eps: float) -> Tensor:
    """See :func:`loomvideo.model.kernels.eager.layer_norm_modulate`."""
    return operation("layer_norm_modulate", x)(x, shift, scale, row_ids, eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, row_ids: Tensor) -> Tensor:
    """See :func:`loomvideo.model.kernels.eager.gated_residual`."""
    return operation("gated_residual", x)(x, y, gate, row_ids)


def residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    row_ids: Tensor,
    eps: float,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`loomvideo.model.kernels.eager.residual_norm`."""
    return operation("residual_norm", x)(x, y, gate, shift, scale, row_ids, eps, affine)
