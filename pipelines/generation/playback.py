"""What an edit takes over from its source: size, frame rate, what its colours mean, sound."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from loomvideo.model.buckets import choose_bucket, resize_and_crop, resize_frames
from loomvideo.model.clips import TARGET_FPS
from loomvideo.model.tasks import Medium
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.media.media_info import CHUNK_FRAMES, MediaInfo
from loomvideo.pipelines.media.sound import ColourTags, add_sound, colour_tags


@dataclass(frozen=True)
class Playback:
    """How an edit of a file plays: like the file, where the settings ask for nothing else.

    Attributes:
        source: The file, as shown: upright.
        model_size: ``(width, height)`` that the model works in.
        size: ``(width, height)`` of what is written.
        fps: Frames a second that the model sees and that are written.
        num_frames: Frames of the whole file at that rate.
        cropped: Whether the file is cropped to the model's size; else it is scaled to it and back, and nothing is lost.
    """

    source: str
    model_size: tuple[int, int]
    size: tuple[int, int]
    fps: float
    num_frames: int
    cropped: bool
    _has_tracks: bool
    _step: float
    _last: int

    @classmethod
    def of(cls, source: str, info: MediaInfo, settings: Settings, medium: Medium) -> "Playback":
        """How an edit of a file plays.

        Raises:
            UserError: for an unknown bucket class, or one of width and height alone.
        """
        asked = settings.asked_size()
        model_size = asked or choose_bucket(info.width, info.height, settings.buckets, medium)
        own = info.fps or TARGET_FPS
        fps = settings.fps or own
        total = 1 if medium == "image" else max(round(info.num_frames * fps / own), 1)
        size = asked or (info.width, info.height)
        has_tracks = info.kind == "video" and info.backend != "pillow"  # animated pictures have neither tags nor sound
        last = info.num_frames - 1
        return cls(source, model_size, size, fps, total, asked is not None, has_tracks, own / fps, last)

    def indices(self, start: int, stop: int) -> list[int]:
        """Which frames of the file are on screen at these of what is written."""
        # What rounding takes from a whole number must not show the frame before.
        return [min(int(index * self._step + 1e-6), self._last) for index in range(start, stop)]

    def fit(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames of the file at the model's size, uint8 [frames, height, width, 3]."""
        if self.cropped:
            return resize_and_crop(frames, self.model_size)
        return resize_frames(frames, self.model_size[1], self.model_size[0])

    def shown(self, pieces: Iterable[np.ndarray], num_frames: int) -> Iterator[np.ndarray]:
        """The first frames of what the model made, at the size that is written."""
        left = num_frames
        for piece in pieces:
            piece = piece[: max(left, 0)]
            left -= len(piece)
            for start in range(0, len(piece), CHUNK_FRAMES):
                yield _scaled(piece[start : start + CHUNK_FRAMES], self.size)

    def colours(self) -> ColourTags:
        """What the file says of its colours."""
        return colour_tags(self.source) if self._has_tracks else ColourTags()

    def add_sound(self, made: Path) -> None:
        """Give a file that was written the sound of the source."""
        if self._has_tracks:
            add_sound(made, self.source)


def _scaled(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames at another size, uint8 [frames, height, width, 3]; averaged where they get smaller."""
    if (frames.shape[2], frames.shape[1]) == size:
        return frames
    way = cv2.INTER_AREA if size[0] * size[1] < frames.shape[1] * frames.shape[2] else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, size, interpolation=way) for frame in frames])
