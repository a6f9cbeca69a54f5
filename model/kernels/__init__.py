"""Fused operations with interchangeable back ends.

The functions below are the DiT's elementwise work. :mod:`~loomvideo.model.kernels.eager` defines them in plain
PyTorch; other back ends compute the same values faster.
"""

from loomvideo.model.kernels.eager import (
    gated_residual,
    layer_norm,
    layer_norm_modulate,
    qk_norm_rope,
    residual_norm,
    rms_norm,
    scale_and_add,
)
from loomvideo.model.kernels.rope import MAX_POSITION, check_positions

__all__ = [
    "MAX_POSITION",
    "check_positions",
    "gated_residual",
    "layer_norm",
    "layer_norm_modulate",
    "qk_norm_rope",
    "residual_norm",
    "rms_norm",
    "scale_and_add",
]
