"""All judgements of one sample in one call."""

from dataclasses import dataclass, field

import numpy as np

from loomvideo.pipelines.samples import EDIT_TASKS
from loomvideo.pipelines.stages.duplicates import signature
from loomvideo.pipelines.stages.options import StageOptions
from loomvideo.pipelines.stages.pair_audit import audit_pair
from loomvideo.pipelines.stages.quality import clip_scores, quality_reasons
from loomvideo.pipelines.stages.text_overlay import TextDetector

# `extra.use` of image pairs that show a garment in another place: nothing is where it was.
UNALIGNED_USES = ("wear", "flat_lay")


@dataclass(frozen=True)
class Clip:
    """Decoded frames of a file, or some of them at a constant rate.

    Attributes:
        frames: uint8 [frames, height, width, 3]; may be reduced in size.
        fps: Frames a second of ``frames``; any number for a picture.
        width: Of the file.
        height: Of the file.
    """

    frames: np.ndarray
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class Assessment:
    """Scores for the index, reason codes, and whether they drop the sample."""

    scores: dict[str, float]
    reasons: tuple[str, ...]
    dropped: bool
    signature: np.ndarray = field(compare=False)


class Assessor:
    """Judges samples; holds the text detector, so build one a worker."""

    def __init__(self, options: StageOptions):
        """Load what the options ask for."""
        options.check()
        self.options = options
        self._text = TextDetector(options.text) if options.text.enabled else None

    def assess(self, task: str, target: Clip, source: Clip | None = None, use: str = "") -> Assessment:
        """Judge a sample's target, and its source with it.

        Args:
            task: The sample's task.
            target: Decoded target.
            source: Decoded source of an edit.
            use: The sample's ``extra.use``, for pairs that are not aligned by design.
        """
        scores: dict[str, float] = {}
        reasons: list[str] = []
        options = self.options
        if options.quality.enabled:
            scores |= clip_scores(target.frames, target.fps)
            reasons += quality_reasons(scores, target.width, target.height, options.quality)
        if self._text is not None:
            scores["text_share"] = self._text.share(target.frames)
            if scores["text_share"] > options.text.max_share:
                reasons.append("text_overlay")
        if options.pairs.enabled and source is not None and task in EDIT_TASKS and use not in UNALIGNED_USES:
            report = audit_pair(source.frames, target.frames, source.fps, target.fps, options.pairs)
            scores |= report.scores
            reasons += report.reasons
        dropped = not options.score_only and any(reason not in options.keep_reasons for reason in reasons)
        rounded = {name: round(float(value), 4) for name, value in scores.items()}
        return Assessment(rounded, tuple(reasons), dropped, signature(target.frames))
