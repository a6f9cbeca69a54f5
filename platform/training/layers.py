"""Compilation and recomputation of a model's repeated layers."""

from typing import Any

import torch
from torch import nn

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import TrainingConfig


def prepare_layers(layers: Any, config: TrainingConfig) -> None:
    """Compile or recompute layers as configured."""
    for number, layer in enumerate(layers):
        if config.compile:
            layer.compile(dynamic=True)
        if _recomputes(config.activation_checkpointing, number):
            _recompute(layer)


def _recomputes(policy: str, number: int) -> bool:
    if policy in ("none", "all"):
        return policy == "all"
    kind, _, period = policy.partition(":")
    if kind != "every" or not period.isdigit() or int(period) < 1:
        raise UserError(f"training.activation_checkpointing={policy}: use none, all or every:N")
    return number % int(period) == 0


def _recompute(layer: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No random number is drawn inside a layer.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    layer.forward = recomputed
