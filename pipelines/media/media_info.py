"""What decoders share: a file's description, why one cannot be used, and the interface of an open file."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Backend = Literal["auto", "decord", "pyav"]
CHUNK_FRAMES = 16
MAX_PIXELS = 8192 * 8192
DEFAULT_FOLDER_FPS = 24.0
# What Pillow's plugins, NumPy and FFmpeg's bindings raise for files that are damaged in ways they did not think of.
READER_ERRORS = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, struct.error, zlib.error,
)  # fmt: skip


class DecodeError(Exception):
    """A file that cannot be used; ``reason`` is its code in the quarantine ledger."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, as shown: after rotation, with frames counted at a constant ``fps``."""

    kind: Literal["video", "image"]
    width: int
    height: int
    num_frames: int
    fps: float
    backend: str
    variable_rate: bool = False
    rotation: int = 0


class OpenMedia(Protocol):
    """An open file."""

    info: MediaInfo

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames at ascending indices (repeats allowed), as uint8 chunks ``[n, height, width, 3]``.

        Raises:
            DecodeError: if a frame cannot be decoded.
        """
        ...


def check_size(path: str, width: int, height: int) -> None:
    """Refuse pictures of one pixel and decompression bombs.

    Raises:
        DecodeError: ``too_small`` or ``too_large``.
    """
    if width < 2 or height < 2:
        raise DecodeError("too_small", f"{path}: {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise DecodeError("too_large", f"{path}: {width}x{height} pixels")


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
