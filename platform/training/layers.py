"""Recomputation and compilation of a model's repeated layers, for recipes whose model brings none of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loomvideo.platform.errors import UserError


def prepare_layers(layers: Sequence[nn.Module], activation_checkpointing: str, compiles: bool) -> None:
    """Recompute whole layers in the backward pass (``full``), or compile them.

    Raises:
        UserError: if the mode is neither ``none`` nor ``full``.
    """
    if activation_checkpointing not in ("none", "full"):
        raise UserError(f"training.activation_checkpointing={activation_checkpointing}: this model knows none and full")
    for layer in layers:
        if compiles:
            layer.compile(dynamic=True)
        if activation_checkpointing == "full":
            _recompute(layer)


def _recompute(layer: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No random number is drawn inside a layer.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    layer.forward = recomputed
