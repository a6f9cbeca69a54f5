"""Flow matching: the path from latents to noise, its velocity, and how timesteps are drawn."""

import math
from typing import TypeVar

import torch
from torch import Tensor

EPS = 1e-3
"""Share of noise left at t = 0, so that the velocity stays bounded there."""
NUM_TRAIN_TIMESTEPS = 1000
SHIFT_BASE_TOKENS = 64
SHIFT_LIMIT = 8.0
Time = TypeVar("Time", Tensor, float)


def noised_and_target(latents: Tensor, noise: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """The noised latents z_t and the velocity to predict.

    ``z_t = (1 - t) x0 + (eps + (1 - eps) t) n`` and ``dz_t/dt = (1 - eps) n - x0``.

    Args:
        latents: Clean latents x0, any shape.
        noise: Standard normal, like ``latents``.
        t: 0 (clean) to 1 (noise), broadcastable to ``latents``.
    """
    noised = (1 - t) * latents + (EPS + (1 - EPS) * t) * noise
    return noised, (1 - EPS) * noise - latents


def dynamic_shift(
    num_tokens: int, scale: float, base_tokens: int = SHIFT_BASE_TOKENS, limit: float = SHIFT_LIMIT
) -> float:
    """Shift that grows with the sequence: ``clamp(1 + scale * log2(tokens / base_tokens), 1, limit)``."""
    return min(max(1 + scale * math.log2(num_tokens / base_tokens), 1.0), limit)


def shift_time(t: Time, shift: float) -> Time:
    """Move times towards noise: ``s t / (1 + (s - 1) t)``."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timestep(
    generator: torch.Generator,
    num_tokens: int,
    scale: float,
    base_tokens: int = SHIFT_BASE_TOKENS,
    limit: float = SHIFT_LIMIT,
) -> float:
    """Draw t in (0, 1): logit-normal, shifted for a video of ``num_tokens`` tokens.

    The transformer is fed ``NUM_TRAIN_TIMESTEPS * t``.
    """
    normal = torch.randn((), generator=generator, dtype=torch.float64).item()
    return shift_time(1 / (1 + math.exp(-normal)), dynamic_shift(num_tokens, scale, base_tokens, limit))
