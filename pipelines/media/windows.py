"""Which frames of a file, at which size: one window for encoding, generation and evaluation.

So the model is trained on, asked about and judged by the same frames and pixels of a file.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loomvideo.model.buckets import choose_bucket, resize_and_crop
from loomvideo.model.clips import TARGET_FPS, clip_indices
from loomvideo.model.codec import LatentGrid
from loomvideo.model.tasks import Medium
from loomvideo.pipelines.media.media_info import DEFAULT_FOLDER_FPS, MediaInfo


@dataclass(frozen=True)
class MediaWindow:
    """Frames and pixels of a file.

    Attributes:
        indices: Which frames, ascending.
        size: ``(width, height)`` that they are resized and cropped to.
    """

    indices: tuple[int, ...]
    size: tuple[int, int]

    def fit(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames uint8 ``[frames, height, width, 3]`` as read, at the window's size."""
        return resize_and_crop(frames, self.size)


def picture_window(info: MediaInfo, classes: Sequence[int]) -> MediaWindow:
    """The first frame of a file in its picture bucket, as references are shown."""
    return MediaWindow((0,), choose_bucket(info.width, info.height, classes, "image"))


def media_window(
    info: MediaInfo, medium: Medium, classes: Sequence[int], num_frames: int, grid: LatentGrid, fps: float = TARGET_FPS
) -> MediaWindow:
    """What of a file a task of this medium sees: from its first frame on, in its bucket.

    Args:
        info: What is known of the file.
        medium: What the task makes; a picture is one frame.
        classes: Area classes of buckets to choose from.
        num_frames: Most frames.
        grid: Which frames and sizes the model can make.
        fps: Frame rate that the file is resampled to.

    Raises:
        UserError: for an unknown class, or a file without frames.
    """
    size = choose_bucket(info.width, info.height, classes, medium)
    if medium == "image" or info.kind == "image" or num_frames == 1:
        return MediaWindow((0,), size)
    return MediaWindow(window_indices(info, num_frames, 0.0, grid, fps), size)


# Rates that differ by less are one, such as a container's rounding.
_SAME_RATE = 5e-4
# How far numbers of frames may lie apart, as a share of the longer, for two files to hold the same frames.
_SAME_LENGTH = 0.02


def same_frames(frames: tuple[int, int], rates: tuple[float, float]) -> bool:
    """Whether two files hold the same frames under different rates, frame by frame, and not the same seconds.

    An edit is often saved at its model's rate and not at that of the video it was made of: 81 frames at 16 a second
    beside 81 at 30. Numbers of frames that agree say so, since durations then do not.
    """
    differ = abs(rates[0] - rates[1]) > _SAME_RATE * max(rates)
    return differ and abs(frames[0] - frames[1]) <= max(1, _SAME_LENGTH * max(frames))


def in_step(media: Sequence[MediaInfo]) -> list[tuple[MediaInfo, int]]:
    """A target and its source (or a target alone) with the rate and the number of frames that count for each.

    Files of one rate count up to the shorter one's end. Of different rates, files of equally many frames go frame by
    frame, at the source's rate; others second by second, up to the end of the shorter.
    """
    total = min(info.num_frames for info in media)
    if len(media) < 2 or abs(media[0].fps - media[1].fps) <= _SAME_RATE * max(media[0].fps, media[1].fps):
        return [(info, total) for info in media]
    target, source = media
    if same_frames((target.num_frames, source.num_frames), (target.fps, source.fps)):
        return [(dataclasses.replace(target, fps=source.fps), total), (source, total)]
    seconds = min(info.num_frames / info.fps for info in media)
    return [(info, min(max(round(seconds * info.fps), 1), info.num_frames)) for info in media]


def window_indices(
    info: MediaInfo,
    num_frames: int,
    relative_start: float,
    grid: LatentGrid,
    fps: float,
    total_frames: int | None = None,
) -> tuple[int, ...]:
    """Frames of a window.

    Args:
        info: What is known of the file; without a frame rate, as of a folder of frames, the usual one counts.
        num_frames: Most frames.
        relative_start: Where in the slack it starts, in [0, 1].
        grid: Which frames and sizes the model can make.
        fps: Frame rate that the file is resampled to.
        total_frames: Frames that count, such as those of the shorter of two files; None for all.

    Raises:
        UserError: for a file without frames.
    """
    total = info.num_frames if total_frames is None else total_frames
    return tuple(clip_indices(info.fps or DEFAULT_FOLDER_FPS, total, num_frames, relative_start, grid, fps))
