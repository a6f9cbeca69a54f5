"""What changes with the step: learning rate and the decay of the average."""

import math

from loomvideo.platform.training.config import EmaConfig, OptimizerConfig


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


def ema_decay(config: EmaConfig, step: int) -> float:
    """The decay of the average after optimiser step ``step`` (from 0): the constant, after its warm-up."""
    if config.warmup and step < config.warmup_steps:
        return min(config.decay, (1 + step) / (10 + step))
    return config.decay
