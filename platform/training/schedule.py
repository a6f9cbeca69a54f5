"""Learning-rate schedules."""

import math

from loomvideo.platform.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of optimiser step ``step`` (from 0) of ``num_steps``: linear warm-up, then constant or half a cosine."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    span = max(1, num_steps - config.warmup_steps - 1)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return peak * (config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(decay: float, warmup: bool, step: int) -> float:
    """The decay of the average after optimiser step ``step`` (from 0)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
