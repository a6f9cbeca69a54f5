"""From what the files of a sample hold to the clips cut from them: bucket, windows, frame indices, fingerprints."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from loomvideo.model.buckets import choose_bucket
from loomvideo.model.codec import LatentGrid
from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.media.decode import MediaInfo
from loomvideo.pipelines.media.windows import in_step, picture_window, window_indices
from loomvideo.pipelines.prepare.config import ClipOptions
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.shards.plan import digest

# Raise when the same files and options give other pixels than before.
PIXELS_VERSION = 1


class Filtered(Exception):  # noqa: N818 - a decision, not an error
    """A sample that a rule leaves out."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Clips:
    """What to cut from a sample's files.

    Attributes:
        size: (width, height) that target and source are brought to before the bucket; None when they agree.
        bucket: (width, height).
        starts: Relative start of every window, in [0, 1].
        target: Frame indices of every window.
        source: The same of the source, None without one.
        reference_buckets: (width, height) of every reference.
    """

    size: tuple[int, int] | None
    bucket: tuple[int, int]
    starts: tuple[float, ...]
    target: tuple[tuple[int, ...], ...]
    source: tuple[tuple[int, ...], ...] | None
    reference_buckets: tuple[tuple[int, int], ...]

    @property
    def num_frames(self) -> int:
        """Frames of a window."""
        return len(self.target[0])


def plan_clips(
    sample: Sample,
    target: MediaInfo,
    source: MediaInfo | None,
    references: list[MediaInfo],
    options: ClipOptions,
    seed: int,
    grid: LatentGrid,
) -> Clips:
    """Choose bucket and windows; source and target share both.

    Source and target of unequal length are cut to the shorter, of unequal size brought to the smaller, of unequal rate
    brought in step (:func:`~loomvideo.pipelines.media.windows.in_step`).

    Raises:
        Filtered: if a video sample has too few frames.
    """
    media = [target] if source is None else [target, source]
    smallest = min(media, key=lambda info: info.width * info.height)
    width, height = smallest.width, smallest.height
    is_image = TASKS[sample.task].is_image
    bucket = choose_bucket(width, height, options.buckets, "image" if is_image else "video")
    size = (width, height) if any((info.width, info.height) != (width, height) for info in media) else None
    windows = [(0.0, [(0,)] * len(media))] if is_image else _windows(sample.key, media, options, seed, grid)
    frames = len(windows[0][1][0])
    if not is_image and frames < options.min_frames:
        raise Filtered("too_short", f"{frames} frames at {options.fps:g} fps, clips.min_frames is {options.min_frames}")
    return Clips(
        size=size,
        bucket=bucket,
        starts=tuple(start for start, _ in windows),
        target=tuple(indices[0] for _, indices in windows),
        source=None if source is None else tuple(indices[1] for _, indices in windows),
        reference_buckets=tuple(picture_window(info, options.buckets).size for info in references),
    )


def _windows(
    key: str, media: list[MediaInfo], options: ClipOptions, seed: int, grid: LatentGrid
) -> list[tuple[float, list[tuple[int, ...]]]]:
    counted = in_step(media)
    windows, seen = [], set()
    for window in range(options.windows):
        # One draw in each of equal parts of the file: spread out, yet not always at the same place.
        start = (window + _uniform(seed, key, window)) / options.windows
        indices = [window_indices(info, options.num_frames, start, grid, options.fps, total) for info, total in counted]
        length = grid.whole_frames(min(map(len, indices)))
        cut = [part[:length] for part in indices]
        if cut[0] not in seen:
            seen.add(cut[0])
            windows.append((start, cut))
    return windows


def _uniform(seed: int, key: str, window: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}:{window}".encode()).digest()[:6], "big") / 2**48


def pixel_fingerprints(clips: Clips, content: Callable[[str], str], sample: Sample) -> dict[str, str]:
    """A hash of every member's pixels-to-be: file contents, frames and sizes.

    Args:
        clips: What is cut.
        content: Gives the content hash of a media path of the sample.
        sample: The sample.
    """
    frame = (PIXELS_VERSION, clips.size, clips.bucket)
    pixels = {"target": digest(*frame, content(sample.target), clips.target)}
    if sample.source:
        pixels["source"] = digest(*frame, content(sample.source), clips.source)
    if sample.references:
        contents = [content(path) for path in sample.references]
        pixels["refs"] = digest(PIXELS_VERSION, clips.reference_buckets, contents)
    return pixels
