"""What held-out samples show, in words: colours right out of so many, decibels with their intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loomvideo.pipelines.evaluation.statistics import bootstrap_mean

LARGE_EDIT = 0.1
"""Share of the picture above which an edit counts as large: below, copying the source is nearly right already."""


@dataclass(frozen=True)
class HeldoutSample:
    """One held-out sample.

    Attributes:
        key: The sample's key.
        task: What it is a sample of.
        group: Samples of one group show the same thing and are not independent.
        instruction: What the model was told.
        figures: What was measured, by metric; None where a metric has no value for this sample.
    """

    key: str
    task: str
    group: str
    instruction: str
    figures: dict[str, float | None] = field(default_factory=dict)

    def flat(self) -> dict[str, float | str | None]:
        """For JSON: the figures beside the rest."""
        return {
            "key": self.key,
            "task": self.task,
            "group": self.group,
            "instruction": self.instruction,
            **self.figures,
        }


def words(samples: Sequence[HeldoutSample]) -> list[str]:
    """Lines about measured held-out samples; what was not measured has no line."""
    lines = []
    colours = [right for s in samples if (right := s.figures.get("garment_colour_right")) is not None]
    if colours:
        lines.append(f"{_of(colours)} garments have the colour asked for ({_share(colours)})")
    drawn = [right for s in samples if (right := s.figures.get("garments_drawn_right")) is not None]
    if drawn:
        lines.append(f"{_of(drawn)} captions are drawn with their garments and colours ({_share(drawn)})")
    outside = _interval(samples, lambda s: s.figures.get("outside_psnr_db"))
    if outside:
        lines.append(f"outside the edit {outside}")
    large = [s for s in samples if (s.figures.get("asked_area") or 0) > LARGE_EDIT]
    edit = _interval(large, lambda s: s.figures.get("edit_psnr_db"))
    if edit:
        gain = _interval(large, lambda s: s.figures.get("gain_psnr_db"))
        lines.append(
            f"edits of over a tenth of the picture: {edit}, {gain} over copying the source ({len(large)} edits)"
        )
    wrong = _interval(samples, _worse)
    if wrong:
        lines.append(f"with another instruction {wrong} worse")
    return lines


def _of(right: Sequence[float]) -> str:
    return f"{int(sum(right))} of {len(right)}"


def _share(right: Sequence[float]) -> str:
    low, high = wilson(int(sum(right)), len(right))
    return f"{np.mean(right):.0%}, {low:.0%} to {high:.0%}"


def wilson(right: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    centre, spread = right + z * z / 2, z * (right * (number - right) / number + z * z / 4) ** 0.5
    return max((centre - spread) / (number + z * z), 0.0), min((centre + spread) / (number + z * z), 1.0)


def _worse(sample: HeldoutSample) -> float | None:
    right, wrong = sample.figures.get("edit_psnr_db"), sample.figures.get("wrong_instruction_psnr_db")
    return None if right is None or wrong is None else right - wrong


def _interval(samples: Sequence[HeldoutSample], value: Callable[[HeldoutSample], float | None]) -> str:
    """Mean and 95 % interval in dB; empty without a value."""
    found = [(value(s), s.group) for s in samples if value(s) is not None]
    if not found:
        return ""
    scores, groups = zip(*found, strict=True)
    estimate = bootstrap_mean(np.array(scores, dtype=float), groups)
    if np.isnan(estimate.low):
        return f"{estimate.value:.1f} dB"
    return f"{estimate.value:.1f} dB ({estimate.low:.1f} to {estimate.high:.1f})"
