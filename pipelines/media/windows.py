"""Which frames of a file, at which size: one window for encoding, generation and evaluation.

So the model is trained on, asked about and judged by the same frames and pixels of a file.
"""

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
