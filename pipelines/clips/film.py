"""A film read once, from its first byte to its last: its packets by groups of pictures, frames only where wanted.

A group is a key frame and what follows it up to the next one. Groups are small (megabytes), so several clips can be cut
out of what is held of a film while it passes, and nothing is read again.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from loomvideo.pipelines.media.media_info import DEFAULT_FOLDER_FPS, DecodeError
from loomvideo.pipelines.media.videos import FrameView, alpha_decoder, counts_frames, is_variable, video_stream


class UnevenError(Exception):
    """The times of a film are not those of a constant rate: they have to be known before it is cut."""


class CountedFile:
    """A file that knows how many bytes were read of it; what FFmpeg reads through."""

    def __init__(self, opened: BinaryIO):
        self._opened = opened
        self.num_read = 0

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes."""
        data = self._opened.read(size)
        self.num_read += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place."""
        return self._opened.seek(offset, whence)

    def tell(self) -> int:
        """The place."""
        return self._opened.tell()


@dataclass(frozen=True)
class Group:
    """A group of pictures.

    Attributes:
        packets: Its packets, in the order of the file.
        frames: Which frames of the film are in it, in the order shown.
    """

    packets: list[Any]
    frames: range


class Film:
    """An open film.

    Args:
        opened: The file.
        path: What messages call it.
        times: The times of all frames where they are known, for films of variable rate.

    Attributes:
        fps: Frames a second.
        view: How its frames are shown.
        codec: Name of its codec.

    Raises:
        DecodeError: with a reason code.
    """

    def __init__(self, opened: CountedFile, path: str, times: Sequence[int] | None = None):
        import av

        self.path = path
        try:
            self.container = av.open(opened)
            self.stream = video_stream(self.container, path)
        except (av.FFmpegError, OSError) as error:
            raise DecodeError("unreadable", f"{path}: {error}") from error
        self.codec = self.stream.codec_context.name
        self.fps = float(self.stream.average_rate or self.stream.guessed_rate or DEFAULT_FOLDER_FPS)
        self.has_times = not counts_frames(self.container)
        self._decoder = alpha_decoder(self.stream)
        self._known = times
        self._first_time = 0
        self._times: list[int] = []
        self._waiting: list[list[Any]] = []
        self.view = self._first_view()
        if times is not None and len(times) > 1:
            self.fps = float(1 / (Fraction(times[-1] - times[0], len(times) - 1) * self.stream.time_base))

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def groups(self) -> Iterator[Group]:
        """All groups in order.

        Raises:
            UnevenError: where frame numbers cannot be told without all times.
            DecodeError: for a file that breaks off.
        """
        num_frames = 0
        raw = self._packet_groups()
        if not self.has_times:
            packets = [packet for packets in raw for packet in packets]
            yield Group(packets, range(0, sum(1 for _ in self.decode([Group(packets, range(0))]))))
            return
        for packets in raw:
            shown = self._shown_times(packets)
            backwards = bool(self._times and shown and shown[0] <= self._times[-1])
            if self._known is None and (backwards or is_variable([*self._times[-1:], *shown])):
                raise UnevenError
            if backwards:
                raise DecodeError("unsupported", f"{self.path}: pictures of one group are shown among another's")
            self._times = [*self._times[-1:], *shown]
            yield Group(packets, range(num_frames, num_frames + len(shown)))
            num_frames += len(shown)

    def decode(self, groups: Iterable[Group]) -> Iterator[tuple[int, Any]]:
        """Frames of groups that follow each other, with their numbers, in the order shown."""
        import av

        groups = list(groups)
        name = self._decoder or self.stream.codec_context.codec.name
        decoder = av.CodecContext.create(name, "r")
        decoder.extradata = self.stream.codec_context.extradata
        decoder.thread_type = "SLICE"
        numbers: dict[int, int] = {}
        for group in groups if self.has_times else ():
            numbers |= self.numbers(group)
        try:
            counted = 0
            for packet in [packet for group in groups for packet in group.packets] + [None]:
                for frame in decoder.decode(packet):
                    if not self.has_times:
                        yield counted, frame
                        counted += 1
                    elif frame.pts in numbers:
                        yield numbers[frame.pts], frame
        except av.FFmpegError as error:
            raise DecodeError("corrupt_frame", f"{self.path}: {error}") from error

    def numbers(self, group: Group) -> dict[int, int]:
        """Numbers of a group's frames by their times."""
        return dict(zip(self._shown_times(group.packets), group.frames, strict=True))

    def is_closed(self, group: Group) -> bool:
        """Whether a group begins with its key frame as shown: then nothing of it needs the group before."""
        return self.has_times and self.numbers(group).get(group.packets[0].pts) == group.frames.start

    def times(self) -> list[int]:
        """The times of all frames that are shown, ascending; reads the film to its end."""
        return self._shown_times([packet for packets in self._packet_groups() for packet in packets])

    def _shown_times(self, packets: Iterable[Any]) -> list[int]:
        return sorted(p.pts for p in packets if not p.is_discard and p.pts >= self._first_time)

    def _packet_groups(self) -> Iterator[list[Any]]:
        yield from iter(self._next_group, [])

    def _next_group(self) -> list[Any]:
        if self._waiting:
            return self._waiting.pop(0)
        return next(self._demuxed, [])

    def _demux(self) -> Iterator[list[Any]]:
        import av

        packets: list[Any] = []
        try:
            for packet in self.container.demux(self.stream):
                if not packet.size:
                    continue
                if packet.pts is None:
                    self.has_times = False
                if packet.is_keyframe and packets:
                    yield packets
                    packets = []
                packets.append(packet)
        except (av.FFmpegError, OSError) as error:
            raise DecodeError("truncated", f"{self.path}: {error}") from error
        if packets:
            yield packets

    def _first_view(self) -> FrameView:
        """How frames are shown, from the first that can be; its groups are kept for :meth:`groups`."""
        import av

        self._demuxed = self._demux()
        decoder = self.stream.codec_context
        if self._decoder:
            decoder = av.CodecContext.create(self._decoder, "r")
        first = None
        try:
            for packets in self._demuxed:
                self._waiting.append(packets)
                first = next((frame for packet in packets for frame in decoder.decode(packet)), None)
                if first is not None:
                    break
            else:
                first = next(iter(decoder.decode(None)), None)
        except av.FFmpegError as error:
            raise DecodeError("unreadable", f"{self.path}: {error}") from error
        if first is None:
            raise DecodeError("no_frames", f"{self.path}: the video stream has no frames")
        if first.pts is None:
            self.has_times = False
        else:
            self._first_time = first.pts
        return FrameView(self.path, first, self.stream.sample_aspect_ratio)


def all_times(opened: CountedFile, path: str) -> list[int]:
    """The times of all frames that are shown, ascending: for films of variable rate, which are read for them first."""
    film = Film(opened, path, times=())
    try:
        return film.times()
    finally:
        film.close()


def timeline(times: Sequence[int], fps: float, time_base: Fraction) -> np.ndarray:
    """Which frame is on screen at ``i / fps``, for every i of a film of variable rate."""
    clock = [times[0] + round(i / (fps * float(time_base))) for i in range(len(times))]
    return np.array([max(bisect.bisect_right(times, at) - 1, 0) for at in clock])
