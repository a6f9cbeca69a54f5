"""The frames of a sample that a model is shown: few, spread over the clip, small."""

import threading

import cv2
import numpy as np

from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.files import local_copies, resolve
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.time_limits import DECODER


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

    def __call__(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """Target and source (None without one), uint8 [frames, height, width, 3].

        Raises:
            DecodeError: with a reason code.
        """
        paths = [resolve(path, self.base) for path in (sample.target, sample.source) if path]
        fps = float(sample.extra.get("fps", 24.0))
        with local_copies(paths) as copies, self._lock:
            read = [self._read(copies[path], fps) for path in paths]
        return read[0], read[1] if len(read) > 1 else None

    def _read(self, path: str, fps: float) -> np.ndarray:
        info = self._decoder.probe(path, fps)
        chosen = np.linspace(0, info.num_frames - 1, min(self.num_frames, info.num_frames)).round().astype(int)
        scale = min(1.0, self.max_side / max(info.width, info.height))
        size = (max(1, round(info.width * scale)), max(1, round(info.height * scale)))
        chunks = self._decoder.read(path, [int(i) for i in chosen], fps)
        return np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for chunk in chunks for f in chunk])

    def close(self) -> None:
        """End the decoder."""
        self._decoder.close()
