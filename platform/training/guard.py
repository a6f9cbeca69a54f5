"""Bad steps: a loss that is not finite or far above its running mean is not learned from."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from loomvideo.platform.training.config import GuardConfig
from loomvideo.platform.training.recipe import MODEL

MEMORY = 0.98


@dataclass
class _Running:
    """Running statistics of a role's losses."""

    number: int = 0
    mean: float = 0.0
    variance: float = 0.0


class SpikeGuard:
    """Judges reduced losses, each role's among its own, so that all ranks agree; remembers quarantined samples.

    Args:
        config: Limits.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self._running: dict[str, _Running] = {}
        self.consecutive_skips = 0
        self.num_skips = 0
        self.quarantined: dict[str, int] = {}

    def is_bad(self, loss: float, role: str = MODEL) -> bool:
        """Judge the loss of a step; a good one enters the running mean and variance of its role."""
        seen = self._running.setdefault(role, _Running())
        limit = seen.mean + self.config.sigmas * math.sqrt(seen.variance)
        trusted = self.config.sigmas > 0 and seen.number >= self.config.warmup_steps
        if not math.isfinite(loss) or (trusted and loss > limit):
            self.consecutive_skips += 1
            self.num_skips += 1
            return True
        memory = min(MEMORY, seen.number / (seen.number + 1))
        difference = loss - seen.mean
        seen.mean += (1 - memory) * difference
        seen.variance = memory * (seen.variance + (1 - memory) * difference * difference)
        seen.number += 1
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
            "running": {role: dataclasses.asdict(seen) for role, seen in self._running.items()},
            "num_skips": self.num_skips,
            "quarantined": self.quarantined,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue."""
        # Checkpoints of before there were roles.
        alone = (
            {MODEL: {"number": state["num_seen"], "mean": state["mean"], "variance": state["variance"]}}
            if ("num_seen" in state)
            else {}
        )
        self._running = {role: _Running(**seen) for role, seen in (state.get("running") or alone).items()}
        self.num_skips, self.quarantined = state["num_skips"], dict(state["quarantined"])
