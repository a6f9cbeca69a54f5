"""Opt-in approximations of a generation: less work for a result that differs a little.

None is on by default. ``loomvideo generate`` prints the error of each that is on; docs/generation.md has figures.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loomvideo.model.flow import NUM_TRAIN_TIMESTEPS
from loomvideo.platform.errors import UserError

MAX_ORDER = 3


def _key(default: Any, help: str) -> Any:
    """A field documented as ``platform.config.option`` does, which this room would need another library for."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Shortcuts:
    """Which approximations are on, and how far each goes."""

    steps: int = _key(0, "denoise in this many steps instead of `steps`; 0 for off")
    guidance_from: float = _key(1.0, "noise level (1 noise, 0 clean) below which guidance begins; 1 for off")
    guidance_to: float = _key(0.0, "noise level below which guidance ends, the full branch runs alone; 0 for off")
    branch_refresh: int = _key(1, "run the branches beside the full one every k steps only, keep their difference")
    branch_order: int = _key(
        0, "with branch_refresh: order of the Taylor polynomial that goes on with the difference; 0 keeps it"
    )
    step_cache: float = _key(0.0, "skip the blocks after the first while it changes less than this; try 0.1")
    fp8: bool = _key(False, "matrix products of the blocks in 8-bit floats (CUDA: Ada, Hopper or newer)")

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key.
        """
        if not 0 <= self.guidance_to < self.guidance_from <= 1:
            raise UserError(
                f"shortcuts.guidance_from={self.guidance_from} guidance_to={self.guidance_to}: need 0 <= to < from <= 1"
            )
        if not 0 <= self.branch_order <= MAX_ORDER:
            raise UserError(f"shortcuts.branch_order={self.branch_order}: choose 0 to {MAX_ORDER}")
        if self.branch_order and self.branch_refresh == 1:
            raise UserError(f"shortcuts.branch_order={self.branch_order}: needs shortcuts.branch_refresh of 2 or more")
        for name, least in (("steps", 0), ("branch_refresh", 1), ("step_cache", 0)):
            if getattr(self, name) < least:
                raise UserError(f"shortcuts.{name}={getattr(self, name)}: must be at least {least}")

    def alone(self) -> "dict[str, Shortcuts]":
        """Every approximation that is on, by itself, under a name such as ``step_cache=0.1``."""
        by_name = {}
        off = Shortcuts()
        for keys in (("steps",), ("guidance_from", "guidance_to"), ("branch_refresh", "branch_order"),
                     ("step_cache",), ("fp8",)):  # fmt: skip
            values = {key: getattr(self, key) for key in keys if getattr(self, key) != getattr(off, key)}
            if values:
                name = " ".join(f"{key}={value}" for key, value in values.items())
                by_name[name] = dataclasses.replace(off, **values)
        return by_name

    def guides(self, timestep: float) -> bool:
        """Whether a timestep is in the interval with guidance (Kynkäänniemi et al., 2024)."""
        return self.guidance_to <= timestep / NUM_TRAIN_TIMESTEPS <= self.guidance_from


class Taylor:
    """Goes on with a tensor that changes smoothly over the steps, by the polynomial through its last values.

    It is TaylorSeer's idea (Liu et al., 2025): differences of what was computed at earlier steps stand for derivatives
    over the number of the step. (Over timesteps, which lie far apart at the end, the polynomial overshoots.)

    Args:
        order: The order of the polynomial; as long as fewer values are known, it is the highest that they give.
    """

    def __init__(self, order: int) -> None:
        self._known: deque[tuple[int, Tensor]] = deque(maxlen=order + 1)

    def add(self, step: int, value: Tensor) -> None:
        """Remember a value that was computed."""
        self._known.append((step, value))

    def at(self, step: int) -> Tensor:
        """The value that the polynomial has at another step."""
        nodes = [known for known, _ in self._known]
        weights = (math.prod((step - other) / (node - other) for other in nodes if other != node) for node in nodes)
        terms = [weight * value for weight, (_, value) in zip(weights, self._known, strict=True)]
        return sum(terms[1:], terms[0])


class BlockCache:
    """Skips all blocks but the first while the first one's contribution stays nearly what it was.

    The share by which the first block's residual differs (mean absolute) from that of the last step that was computed
    in full stands for the change of everything behind it; that contribution is then taken from the full step. It is
    TeaCache's idea (Liu et al., 2024) with a measured indicator in place of a fitted one.

    Args:
        threshold: Largest difference that is skipped.
        total: Sums a tensor over the ranks that share the sequence; None where one holds it all.
    """

    def __init__(self, threshold: float, total: Callable[[Tensor], Tensor] | None = None) -> None:
        self.threshold = threshold
        self.num_skipped = 0
        self._total = total or (lambda sums: sums)
        self._first: Tensor | None = None
        self._rest: Tensor | None = None

    def reuse(self, first: Tensor) -> Tensor | None:
        """What the blocks after the first add, if the first's residual ``first`` is close enough; else None."""
        if self._rest is not None:
            sums = torch.stack([(first - self._first).abs().sum(), self._first.abs().sum()]).double()
            change, size = self._total(sums).tolist()
            if change <= self.threshold * size:
                self.num_skipped += 1
                return self._rest
        self._first = first
        return None

    def keep(self, rest: Tensor) -> None:
        """Remember what the blocks after the first added, of the step whose residual :meth:`reuse` was last given."""
        self._rest = rest
