"""Byte-deterministic writing of clips and pictures, and the overview picture of a dataset."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.codec.context import Flags
from PIL import Image


def write_clip(path: Path, frames: Sequence[np.ndarray], fps: Fraction | float = 24) -> None:
    """Encode frames as H.264: one thread and no encoder date, so the same frames give the same bytes.

    Args:
        path: An .mp4 file; its folder is made.
        frames: uint8 [H, W, 3] each, H and W even.
        fps: Frames a second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree reads uninitialised memory: with it, the same frames give other bytes now and then.
        stream.options = {"crf": "10", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        stream.codec_context.flags |= Flags.bitexact
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_clip(path: Path) -> tuple[list[np.ndarray], Fraction]:
    """All frames of a clip, uint8 [H, W, 3] each, and its mean frame rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream.average_rate


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] or [H, W] as PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, compress_level=3)


def read_picture(path: Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def still(path: Path, position: float = 0.5) -> np.ndarray:
    """A picture, or the frame at a relative position of a clip, uint8 [H, W, 3]."""
    if path.suffix != ".mp4":
        return read_picture(path)
    frames, _ = read_clip(path)
    return frames[round(position * (len(frames) - 1))]


def labelled_row(pictures: Sequence[np.ndarray], text: str, side: int, columns: int) -> np.ndarray:
    """Pictures fitted into ``side`` x ``side`` tiles, left to right, over one line of text."""
    row = np.full((side + 16, side * columns, 3), 255, np.uint8)
    for column, picture in enumerate(pictures[:columns]):
        scale = side / max(picture.shape[:2])
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        row[: size[1], column * side : column * side + size[0]] = cv2.resize(
            picture, size, interpolation=cv2.INTER_AREA
        )
    origin = (2, side + 11)
    return cv2.putText(
        row, text[: side * columns // 6], origin, cv2.FONT_HERSHEY_SIMPLEX, 0.34, (0, 0, 0), 1, cv2.LINE_AA
    )
