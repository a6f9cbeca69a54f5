"""Classifier-free guidance with separate scales for text and media."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loomvideo.model import tasks
from loomvideo.model.tasks import FULL, UNCONDITIONAL, VISUAL

NUM_STEPS = 50


@dataclass(frozen=True)
class Guidance:
    """How far a velocity is pushed from the unconditional one.

    ``u + visual_scale (v - u) + scale (f - v)`` with media, ``u + scale (f - u)`` where ``visual_scale`` is None.
    """

    scale: float
    visual_scale: float | None = None

    @classmethod
    def default(cls, task: str) -> "Guidance":
        """The published scales of a task.

        Raises:
            UserError: if there is no such task.
        """
        found = tasks.wording(task)
        return cls(found.scale, found.visual_scale)

    def weights(self) -> dict[str, float]:
        """Weight of each branch's velocity; they add up to 1 and a branch without weight is left out."""
        if self.visual_scale is None:
            weights = {FULL: self.scale, UNCONDITIONAL: 1 - self.scale}
        else:
            weights = {
                FULL: self.scale,
                VISUAL: self.visual_scale - self.scale,
                UNCONDITIONAL: 1 - self.visual_scale,
            }
        return {branch: weight for branch, weight in weights.items() if weight}

    def combine(self, velocities: Mapping[str, Tensor]) -> Tensor:
        """Guided velocity from one velocity a branch of :meth:`weights`."""
        weighted = [weight * velocities[branch] for branch, weight in self.weights().items()]
        return sum(weighted[1:], weighted[0])
