"""The assessment of one sample: scores from frames, reasons from scores.

The two are apart so that limits can change, or be tried, without decoding anything again.
"""

from dataclasses import dataclass, field

import numpy as np

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.prepare.curation.camera import camera_scores
from loomvideo.pipelines.prepare.curation.duplicates import colours, signature
from loomvideo.pipelines.prepare.curation.faces import FaceDetector
from loomvideo.pipelines.prepare.curation.nsfw import NsfwJudge
from loomvideo.pipelines.prepare.curation.options import CameraLimits, FaceLimits, StageOptions
from loomvideo.pipelines.prepare.curation.pair_audit import pair_reasons, pair_scores
from loomvideo.pipelines.prepare.curation.quality import blockiness, clip_scores, quality_reasons
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
        full_frames: Some frames in full size, for what is small; default: some of ``frames``.
        stride: Distance of ``frames`` in the file.
        num_frames: Frames in the file; default: as many as ``frames``.
    """

    frames: np.ndarray
    fps: float
    width: int
    height: int
    duration_s: float = 0.0
    full_frames: list[np.ndarray] = field(default_factory=list)
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
    """Scores samples; holds the networks of the judges that are on, so build one a worker."""

    def __init__(self, options: StageOptions):
        """Load what the options ask for."""
        options.check()
        self.options = options
        self._text = TextDetector(options.text) if options.text.enabled else None
        self._faces = FaceDetector(options.faces) if options.faces.enabled else None
        self._nsfw = NsfwJudge() if options.nsfw.enabled else None

    def full_positions(self, num_frames: int) -> list[int]:
        """Frames of a clip that :meth:`score` wants in full size: a few, inside it."""
        wanted = self.options.quality.enabled or self._text or self._faces or self._nsfw
        return positions(num_frames, self.options.text.num_frames) if wanted else []

    def score(self, task: str, target: Clip, source: Clip | None = None, use: str = "") -> Scores:
        """Score a sample's target, and its source with it.

        Args:
            task: The sample's task.
            target: Decoded target.
            source: Decoded source of an edit.
            use: The sample's ``extra.use``, for pairs that are not aligned by design.
        """
        values: dict[str, float] = {"file_width": target.width, "file_height": target.height}
        looked_at = target.full_frames or [target.frames[i] for i in self.full_positions(len(target.frames))]
        if self.options.quality.enabled:
            values |= clip_scores(target.frames, target.fps) | {"blockiness": blockiness(looked_at)}
            if len(target.frames) > 1:
                values["duration_s"] = target.length_s
        if self.options.camera.enabled and len(target.frames) > 1:
            values |= camera_scores(target.frames, target.fps)
        if self._text is not None:
            values["text_share"] = self._text.share(looked_at)
        if self._faces is not None:
            values |= self._faces.scores(looked_at)
        if self._nsfw is not None:
            values["nsfw"] = self._nsfw.score(looked_at)
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
    for reason, broken in (
        ("text_overlay", options.text.enabled and values.get("text_share", 0.0) > options.text.max_share),
        ("nsfw", options.nsfw.enabled and values.get("nsfw", 0.0) > options.nsfw.max_score),
        *(face_limits(values, options.faces) if options.faces.enabled else ()),
        *(camera_limits(values, options.camera) if options.camera.enabled else ()),
    ):
        if broken:
            reasons.append(reason)
    if options.pairs.enabled:
        reasons += pair_reasons(values, options.pairs)
    return reasons


def positions(num_frames: int, count: int) -> list[int]:
    """Which frames of a clip are looked at in full size: ``count``, evenly inside it."""
    return np.unique(np.linspace(0, num_frames - 1, count + 2)[1:-1].round().astype(int)).tolist()


def face_limits(values: dict[str, float], limits: FaceLimits) -> list[tuple[str, bool]]:
    """Reason codes of people, and whether the scores break their limits; a limit of 0 is none."""
    return [
        ("no_face", values["faces"] < limits.min_faces),
        ("many_faces", 0 < limits.max_faces < values["faces"]),
        ("small_face", values["face_share"] < limits.min_share),
    ]


def camera_limits(values: dict[str, float], limits: CameraLimits) -> list[tuple[str, bool]]:
    """Reason codes of the camera, and whether the scores break their limits; a limit of 0 is none."""
    bounds = {"camera_pan": limits.max_pan, "camera_zoom": limits.max_zoom, "camera_shake": limits.max_shake}
    return [(name, 0 < bound < values.get(name, 0.0)) for name, bound in bounds.items()]


def drops(reasons: list[str], options: StageOptions) -> bool:
    """Whether the reasons leave a sample out."""
    return not options.score_only and any(reason not in options.keep_reasons for reason in reasons)
