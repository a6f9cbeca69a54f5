"""Features of some layers only: what is read for a layer that is not stored is the nearest one that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Tensors of the mllm member that hold states [layers, tokens, dim].
_STATES = ("full.", "visual.")


def nearest(stored: Sequence[int], num_layers: int) -> list[int]:
    """For each of ``num_layers`` layers the position in ``stored`` to read, of two equally near ones the earlier."""
    return [min(range(len(stored)), key=lambda i: (abs(stored[i] - layer), i)) for layer in range(num_layers)]


def expanded(tensors: Mapping[str, Tensor], stored: Sequence[int], num_layers: int) -> dict[str, Tensor]:
    """The mllm member's tensors with states [len(stored), tokens, dim] brought to ``num_layers`` layers."""
    import torch

    positions = torch.tensor(nearest(stored, num_layers))
    return {
        name: tensor.index_select(0, positions) if name.startswith(_STATES) else tensor
        for name, tensor in tensors.items()
    }
