"""Bad steps: a loss that is not finite or far above its running mean is not learned from."""

import math
from typing import Any

from loomvideo.platform.training.config import GuardConfig

MEMORY = 0.98


class SpikeGuard:
    """Judges reduced losses, so that all ranks agree, and remembers quarantined samples.

    Args:
        config: Limits.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.num_seen = 0
        self.mean = 0.0
        self.variance = 0.0
        self.consecutive_skips = 0
        self.num_skips = 0
        self.quarantined: dict[str, int] = {}

    def is_bad(self, loss: float) -> bool:
        """Judge the loss of a step; a good one enters the running mean and variance."""
        limit = self.mean + self.config.sigmas * math.sqrt(self.variance)
        trusted = self.config.sigmas > 0 and self.num_seen >= self.config.warmup_steps
        if not math.isfinite(loss) or (trusted and loss > limit):
            self.consecutive_skips += 1
            self.num_skips += 1
            return True
        memory = min(MEMORY, self.num_seen / (self.num_seen + 1))
        difference = loss - self.mean
        self.mean += (1 - memory) * difference
        self.variance = memory * (self.variance + (1 - memory) * difference * difference)
        self.num_seen += 1
        self.consecutive_skips = 0
        return False

    def quarantine(self, keys: list[str], from_step: int) -> None:
        """Leave samples out of all steps planned from ``from_step`` on."""
        for key in keys:
            self.quarantined.setdefault(key, from_step)

    def excluded(self, step: int) -> set[str]:
        """Keys that may not be planned into ``step``."""
        return {key for key, from_step in self.quarantined.items() if step >= from_step}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "num_seen": self.num_seen,
            "mean": self.mean,
            "variance": self.variance,
            "num_skips": self.num_skips,
            "quarantined": self.quarantined,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.num_seen, self.mean, self.variance = state["num_seen"], state["mean"], state["variance"]
        self.num_skips, self.quarantined = state["num_skips"], dict(state["quarantined"])
