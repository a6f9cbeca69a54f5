"""Linear weights in 8 or 4 bits: a half or a quarter of the memory for a small, measured error.

The code books are bitsandbytes': 8-bit dynamic blocks and 4-bit NormalFloat (Dettmers et al., 2021 and 2023). It is one
wheel for CPU and CUDA, alive, and its operators know their shapes without data, so that peaks are counted without a
GPU. Weights are turned back a layer at a time; products and sums are in the layer's own dtype. ``gpu`` is the extra.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loomvideo.platform.errors import UserError, how_to_add

BITS = (16, 8, 4)
"""16 leaves weights as they are."""
_BLOCKS = {8: 256, 4: 64}
"""Weights that share a scale."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept in few bits.

    Args:
        linear: The layer it stands for; its bias is taken over.
        bits: 8 or 4.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits, self.shape = bits, tuple(linear.weight.shape)
        weight = linear.weight.detach().contiguous()
        packed, absmax, code = _quantize(weight, bits)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("code", code)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The weight turned back, [out, in]."""
        operators = torch.ops.bitsandbytes
        if self.bits == 4:
            return operators.dequantize_4bit(self.packed, self.absmax, _BLOCKS[4], "nf4", self.shape, dtype)
        return operators.dequantize_blockwise(self.packed, self.absmax, self.code, _BLOCKS[8], dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.weight_as(x.dtype), self.bias)


def quantize_linears(module: nn.Module, bits: int) -> None:
    """Replace every linear layer below a module; each frees its old weight before the next is turned.

    Raises:
        UserError: for other bits, or without bitsandbytes.
    """
    check_bits("bits", bits)
    if bits == 16:
        return
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantizedLinear(child, bits))
        else:
            quantize_linears(child, bits)


def check_bits(key: str, bits: int) -> None:
    """Refuse bits that weights cannot be kept in here.

    Raises:
        UserError: naming the key.
    """
    if bits not in BITS:
        raise UserError(f"{key}={bits}: choose one of {', '.join(map(str, BITS))}")
    if bits != 16:
        try:
            import bitsandbytes  # noqa: F401 - registers the operators
        except ImportError as error:
            raise UserError(f"{key}={bits}: needs bitsandbytes; {how_to_add('gpu')}, or use 16") from error


def stored_bytes(parameters: int, bits: int, num_bytes: int = 2) -> int:
    """Bytes of linear weights in so many bits, scales included; ``num_bytes`` each at 16."""
    return parameters * num_bytes if bits == 16 else parameters * bits // 8 + 4 * parameters // _BLOCKS[bits]


def _quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    operators = torch.ops.bitsandbytes
    if bits == 4:
        packed, absmax = operators.quantize_4bit(weight, _BLOCKS[4], "nf4", torch.uint8)
        return packed, absmax, None
    from bitsandbytes.functional import create_dynamic_map

    code = create_dynamic_map().to(weight.device)
    packed, absmax = operators.quantize_blockwise(weight, code, _BLOCKS[8])
    return packed, absmax, code
