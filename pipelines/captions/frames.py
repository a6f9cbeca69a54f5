"""The frames of a sample that a model is shown: few, spread over the clip, small."""

import threading
from typing import NamedTuple

import cv2
import numpy as np

from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.files import local_copies, resolve
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.time_limits import DECODER


class Frames(NamedTuple):
    """What of a sample is shown.

    Attributes:
        target: uint8 [frames, height, width, 3].
        source: The same of the source, None without one.
        references: The first frame of each reference, [1, height, width, 3].
    """

    target: np.ndarray
    source: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()


class FrameReader:
    """Reads samples' frames through one isolated decoder; may be called from many threads.

    Args:
        num_frames: Frames of a video, from its first to its last.
        max_side: Longer side of the frames.
        base: Folder that relative media paths start at.
        timeout_s: The time limit of one read.
    """

    def __init__(self, num_frames: int, max_side: int, base: str = "", timeout_s: float = DECODER.seconds):
        self.num_frames, self.max_side, self.base = num_frames, max_side, base
        self._decoder = IsolatedDecoder(timeout_s)
        # One decoder for all threads: waiting for answers takes them longer than decoding.
        self._lock = threading.Lock()

    def __call__(self, sample: Sample) -> Frames:
        """The frames of target, source and references.

        Raises:
            DecodeError: with a reason code.
        """
        target = resolve(sample.target, self.base)
        source = resolve(sample.source, self.base) if sample.source else None
        references = [resolve(path, self.base) for path in sample.references]
        fps = float(sample.extra.get("fps", 24.0))
        with local_copies([target, *([source] if source else []), *references]) as copies, self._lock:
            return Frames(
                self._read(copies[target], fps, self.num_frames),
                self._read(copies[source], fps, self.num_frames) if source else None,
                tuple(self._read(copies[path], fps, 1) for path in references),
            )

    def _read(self, path: str, fps: float, count: int) -> np.ndarray:
        info = self._decoder.probe(path, fps)
        chosen = np.linspace(0, info.num_frames - 1, min(count, info.num_frames)).round().astype(int)
        scale = min(1.0, self.max_side / max(info.width, info.height))
        size = (max(1, round(info.width * scale)), max(1, round(info.height * scale)))
        chunks = self._decoder.read(path, [int(i) for i in chosen], fps)
        return np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for chunk in chunks for f in chunk])

    def close(self) -> None:
        """End the decoder."""
        self._decoder.close()
