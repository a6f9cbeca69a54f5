"""The assessment of one sample: scores from frames, reasons from scores.

The two are apart so that limits can change, or be tried, without decoding anything again.
"""

from dataclasses import dataclass, field

import numpy as np

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.prepare.curation.duplicates import colours, signature
from loomvideo.pipelines.prepare.curation.options import StageOptions
from loomvideo.pipelines.prepare.curation.pair_audit import pair_reasons, pair_scores
from loomvideo.pipelines.prepare.curation.quality import clip_scores, quality_reasons
from loomvideo.pipelines.prepare.curation.text_overlay import TextDetector

# `extra.use` of image pairs that show a garment in another place: nothing is where it was.
UNALIGNED_USES = ("wear", "flat_lay")


@dataclass(frozen=True)
class Clip:
    """Decoded frames of a file, or of a part of it.

    Attributes:
        frames: uint8 [frames, height, width, 3]; may be reduced in size.
        fps: Frames a second of ``frames``; any number for a picture.
        width: The width of the file.
        height: The height of the file.
        duration_s: The duration of the file; default: of the frames.
        text_frames: Frames in full size in which text is looked for; default: some of ``frames``.
        stride: Distance of ``frames`` in the file.
        num_frames: Frames in the file; default: as many as ``frames``.
    """

    frames: np.ndarray
    fps: float
    width: int
    height: int
    duration_s: float = 0.0
    text_frames: list[np.ndarray] = field(default_factory=list)
    stride: int = 1
    num_frames: int = 0

    @property
    def length_s(self) -> float:
        """Seconds of the file."""
        return self.duration_s or len(self.frames) / self.fps


@dataclass(frozen=True)
class Scores:
    """What frames say: numbers for the index, hashes of key frames and colours for the search of duplicates."""

    values: dict[str, float]
    signature: np.ndarray = field(compare=False)
    colours: str = ""


class Assessor:
    """Scores samples; holds the text detector, so build one a worker."""

    def __init__(self, options: StageOptions):
        """Load what the options ask for."""
        options.check()
        self.options = options
        self._text = TextDetector(options.text) if options.text.enabled else None

    def text_positions(self, num_frames: int) -> list[int]:
        """Frames of a clip that :meth:`score` wants in full size; none when text is not looked for."""
        return self._text.positions(num_frames) if self._text is not None else []

    def score(self, task: str, target: Clip, source: Clip | None = None, use: str = "") -> Scores:
        """Score a sample's target, and its source with it.

        Args:
            task: The sample's task.
            target: Decoded target.
            source: Decoded source of an edit.
            use: The sample's ``extra.use``, for pairs that are not aligned by design.
        """
        values: dict[str, float] = {"file_width": target.width, "file_height": target.height}
        if self.options.quality.enabled:
            values |= clip_scores(target.frames, target.fps)
            if len(target.frames) > 1:
                values["duration_s"] = target.length_s
        if self._text is not None:
            looked_at = target.text_frames or [target.frames[i] for i in self.text_positions(len(target.frames))]
            values["text_share"] = self._text.share(looked_at)
        if self.options.pairs.enabled and source is not None and TASKS[task].needs_source and use not in UNALIGNED_USES:
            lengths = (source.length_s, target.length_s)
            files = tuple((c.num_frames or len(c.frames), c.fps * c.stride) for c in (source, target))
            values |= pair_scores(source.frames, target.frames, source.fps, target.fps, lengths, files)
        rounded = {name: round(float(value), 4) for name, value in values.items()}
        return Scores(rounded, signature(target.frames), colours(target.frames))


def reasons_of(values: dict[str, float], options: StageOptions) -> list[str]:
    """Reason codes of all limits that the scores break, those of stages that are off left out."""
    reasons = []
    if options.quality.enabled:
        reasons += quality_reasons(values, values["file_width"], values["file_height"], options.quality)
    if options.text.enabled and values.get("text_share", 0.0) > options.text.max_share:
        reasons.append("text_overlay")
    if options.pairs.enabled:
        reasons += pair_reasons(values, options.pairs)
    return reasons


def drops(reasons: list[str], options: StageOptions) -> bool:
    """Whether the reasons leave a sample out."""
    return not options.score_only and any(reason not in options.keep_reasons for reason in reasons)
