"""Parts of media files, named in the path itself: ``video.mp4#t=3.5,9&xywh=percent:10,0,50,100``.

The syntax is that of W3C Media Fragments, with frame numbers added. It lets a sample point at a shot of a film, at a
clip of a long download, or at an object in a frame, without cutting files first:

- ``t=start,end`` seconds, either may be empty; ``frames=first,end`` frame numbers, the end excluded;
- ``frame=17`` or ``at=0.25`` (share of the length) makes one picture of a video;
- ``xywh=percent:x,y,w,h`` or ``xywh=pixel:x,y,w,h`` crops; ``side=768`` says that the pixels are those of the frame
  scaled to a longer side of 768.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_NUMBER = r"\d+(?:\.\d+)?"
_PARTS = {
    "t": rf"(?:{_NUMBER})?,(?:{_NUMBER})?",
    "frames": r"\d+,\d*",
    "frame": r"\d+",
    "at": _NUMBER,
    "xywh": rf"(?:percent|pixel):{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}",
    "side": r"\d+",
}
_PART = "|".join(f"{name}={value}" for name, value in _PARTS.items())
_FRAGMENT = re.compile(rf"#((?:{_PART})(?:&(?:{_PART}))*)$")


@dataclass(frozen=True)
class Fragment:
    """Which part of a file is meant.

    Attributes:
        seconds: Start and end, None where open.
        frames: First frame and end (excluded), None where open.
        frame: One frame as a number.
        at: One frame as a share of the length.
        box: x, y, width, height.
        box_unit: ``percent`` or ``pixel``.
        side: Longer side of the frame that pixel boxes refer to; 0: the frame as it is.
    """

    seconds: tuple[float | None, float | None] | None = None
    frames: tuple[int, int | None] | None = None
    frame: int | None = None
    at: float | None = None
    box: tuple[float, float, float, float] | None = None
    box_unit: str = "percent"
    side: int = 0

    def __str__(self) -> str:
        parts = []
        if self.seconds:
            parts.append("t=" + ",".join("" if v is None else f"{v:g}" for v in self.seconds))
        if self.frames:
            parts.append("frames=" + ",".join("" if v is None else str(v) for v in self.frames))
        if self.frame is not None:
            parts.append(f"frame={self.frame}")
        if self.at is not None:
            parts.append(f"at={self.at:g}")
        if self.box:
            parts.append(f"xywh={self.box_unit}:" + ",".join(f"{v:g}" for v in self.box))
        if self.side:
            parts.append(f"side={self.side}")
        return "&".join(parts)

    def frame_range(self, num_frames: int, fps: float) -> range:
        """The frames of a file of ``num_frames`` that are meant; empty when the fragment lies outside."""
        if self.frame is not None or self.at is not None:
            index = self.frame if self.frame is not None else min(int(num_frames * self.at), num_frames - 1)
            return range(index, min(index + 1, num_frames))
        first, end = 0, num_frames
        if self.frames:
            first, end = self.frames[0], num_frames if self.frames[1] is None else self.frames[1]
        if self.seconds:
            start_s, end_s = self.seconds
            # A frame belongs to the fragment when it is first shown inside it.
            first = max(first, 0 if start_s is None else math.ceil(start_s * fps - 1e-6))
            end = min(end, num_frames if end_s is None else math.ceil(end_s * fps - 1e-6))
        return range(first, min(end, num_frames))

    def crop(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels of a frame, at least one pixel and inside it."""
        if self.box is None:
            return 0, 0, width, height
        if self.box_unit == "percent":
            scale_x, scale_y = width / 100, height / 100
        else:
            scale_x = scale_y = max(width, height) / self.side if self.side else 1.0
        x, y, w, h = self.box
        left, top = min(round(x * scale_x), width - 1), min(round(y * scale_y), height - 1)
        right = min(max(round((x + w) * scale_x), left + 1), width)
        bottom = min(max(round((y + h) * scale_y), top + 1), height)
        return left, top, right, bottom


def split_fragment(path: str) -> tuple[str, Fragment | None]:
    """The file's path or URL, and the part that is meant; ``#`` in other file names stays."""
    match = _FRAGMENT.search(path) if "#" in path else None
    if match is None:
        return path, None
    fields: dict[str, Any] = {}
    for part in match.group(1).split("&"):
        name, _, value = part.partition("=")
        if name == "t":
            fields["seconds"] = tuple(float(v) if v else None for v in value.split(","))
        elif name == "frames":
            fields["frames"] = tuple(int(v) if v else None for v in value.split(","))
        elif name == "xywh":
            unit, _, numbers = value.partition(":")
            fields |= {"box": tuple(float(v) for v in numbers.split(",")), "box_unit": unit}
        elif name == "at":
            fields["at"] = float(value)
        else:
            fields[name] = int(value)
    return path[: match.start()], Fragment(**fields)


def with_fragment(path: str, fragment: Fragment) -> str:
    """A path that names a part of a file; a second fragment of the same file replaces the first one's parts."""
    path, inner = split_fragment(path)
    if inner is not None:
        given = {f.name: getattr(fragment, f.name) for f in dataclasses.fields(fragment)}
        default = Fragment()
        fragment = dataclasses.replace(inner, **{k: v for k, v in given.items() if v != getattr(default, k)})
    text = str(fragment)
    return f"{path}#{text}" if text else path


class FragmentMedia:
    """A part of an open file, with the same interface as the file (``info`` and ``read``).

    Raises:
        ValueError: when the file has no frame there.
    """

    def __init__(self, media: Any, fragment: Fragment):
        """Wrap ``media``: ``info`` has num_frames, fps, width, height and kind; ``read(indices)`` yields chunks."""
        self._media = media
        self._range = fragment.frame_range(media.info.num_frames, media.info.fps)
        if not self._range:
            raise ValueError(f"no frame at #{fragment} of {media.info.num_frames} frames at {media.info.fps:g} fps")
        self._crop = fragment.crop(media.info.width, media.info.height)
        left, top, right, bottom = self._crop
        single = fragment.frame is not None or fragment.at is not None
        self.info = dataclasses.replace(
            media.info,
            kind="image" if single else media.info.kind,
            num_frames=len(self._range),
            width=right - left,
            height=bottom - top,
        )

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames at ascending indices of the part, as uint8 chunks [n, height, width, 3]."""
        left, top, right, bottom = self._crop
        for chunk in self._media.read([self._range[index] for index in indices]):
            yield np.ascontiguousarray(chunk[:, top:bottom, left:right])
