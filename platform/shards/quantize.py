"""Features in eight bits: a row (one token in one layer) keeps its own scale.

What reads LoomVideo's features begins with RMSNorm, so a row's direction is all that matters; fp8 rows are brought to
unit RMS, where no value can overflow (|x| <= sqrt(dim) < 448) and most of the range of e4m3 is used. int8 rows are
brought to a largest magnitude of 127. The scale costs 4 bytes a row and restores the magnitude too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALE_SUFFIX = ".scale"
_SMALLEST = 1e-12


def quantize(states: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Store form of ``states`` [..., dim].

    Args:
        states: Floating point.
        dtype: ``bf16``, ``fp8`` or ``int8``.

    Returns:
        The values in the storage dtype and the scale of every row [...] in float32, None for bf16.
    """
    import torch

    if dtype == "bf16":
        return states.to(torch.bfloat16), None
    rows = states.float()
    if dtype == "fp8":
        scale = rows.square().mean(-1).sqrt().clamp_min(_SMALLEST)
        return (rows / scale[..., None]).to(torch.float8_e4m3fn), scale
    scale = (rows.abs().amax(-1) / 127).clamp_min(_SMALLEST)
    return (rows / scale[..., None]).round().to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """The states again, in ``dtype``, bfloat16 when unset."""
    import torch

    dtype = dtype or torch.bfloat16
    if scale is None:
        return values.to(dtype)
    return (values.float() * scale[..., None]).to(dtype)


def restore(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A member's tensors with every ``name`` that has a ``name.scale`` multiplied out."""
    if not any(name.endswith(SCALE_SUFFIX) for name in tensors):
        return tensors
    return {
        name: dequantize(tensor, tensors[name + SCALE_SUFFIX]) if name + SCALE_SUFFIX in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE_SUFFIX)
    }
