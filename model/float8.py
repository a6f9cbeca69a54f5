"""Matrix products of the blocks in 8-bit floats: half the weights' memory, and up to twice the rate on GPUs with them.

Weights have one scale an output channel, activations one a token, found as they come; sums are fp32.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.platform.errors import UserError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
MULTIPLE = 16
"""What the hardware's products need sides to be a multiple of."""


class Float8Linear(nn.Module):
    """A linear layer with e4m3 weights and activations.

    Args:
        linear: The layer it stands for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = _quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out] in the dtype of ``x``."""
        values, scale = _quantize(x)
        rows = ScalingType.RowWise
        product = F.scaled_mm(values, self.weight.T, scale, rows, self.scale, rows, output_dtype=torch.bfloat16)
        product = product.to(x.dtype)
        return product if self.bias is None else product + self.bias


def float8_blocks(model: LoomVideoDiT) -> LoomVideoDiT:
    """A copy of a model with the blocks' products in 8-bit floats; all other parameters are shared with it.

    A model that has them already is returned as it is.

    Raises:
        UserError: on a GPU without 8-bit products.
    """
    if any(isinstance(module, Float8Linear) for module in model.modules()):
        return model
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"shortcuts.fp8: {torch.cuda.get_device_name(device)} has no 8-bit floats; leave it off")
    twin = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    for block in twin.blocks:
        replace_linears(block)
    return twin


def replace_linears(module: nn.Module) -> None:
    """Replace every linear layer below a module whose sides allow it."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            replace_linears(child)
        elif not (child.in_features % MULTIPLE or child.out_features % MULTIPLE):
            setattr(module, name, Float8Linear(child))


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [rows, columns] in e4m3 and their scales, fp32 [rows, 1]."""
    scale = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale
