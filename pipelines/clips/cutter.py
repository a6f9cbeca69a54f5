"""Clips out of one film in one pass over its bytes: packets copied where key frames allow, else frames encoded anew."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
from PIL import Image

from loomvideo.pipelines.clips.film import CountedFile, Film, Group, UnevenError, all_times, timeline
from loomvideo.pipelines.media.fragments import Fragment
from loomvideo.pipelines.media.media_info import CHUNK_FRAMES, DecodeError
from loomvideo.pipelines.media.video_writer import write_video_stream
from loomvideo.pipelines.prepare.curation.options import ShotOptions
from loomvideo.pipelines.prepare.curation.shots import ShotCutter, ShotDetector, thumbnail

# Raise when the same film and options give other clips.
CUT_VERSION = 1
_COPIED_CODECS = ("h264", "hevc", "av1", "vp9")
_REMOTE_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Part:
    """A part of a film that is wanted.

    Attributes:
        name: Its fragment, without a crop.
        fragment: The same, parsed.
    """

    name: str
    fragment: Fragment

    @property
    def is_picture(self) -> bool:
        """Whether one frame is meant."""
        return self.fragment.frame is not None or self.fragment.at is not None


@dataclass(frozen=True)
class CutOptions:
    """How clips are written.

    Attributes:
        height: Pixels of the shorter side at most; 0 keeps the film's size.
        crf: x264's constant rate factor of what is encoded.
        shots: Cuts a film at its shots.
    """

    height: int
    crf: int
    shots: ShotOptions


@dataclass(frozen=True)
class CutClip:
    """What came of a part.

    Attributes:
        part: Its name; of a shot, the frames that it has in the film.
        file: The file that it was written to, empty when it was not.
        sha256: Hash of the file.
        how: ``copied``, ``encoded`` or ``picture``.
        num_frames: Frames in it.
        fps: Frames a second.
        num_bytes: Size of the file.
        reason: Why there is no file.
        message: The same for a person.
    """

    part: str
    file: str = ""
    sha256: str = ""
    how: str = ""
    num_frames: int = 0
    fps: float = 0.0
    num_bytes: int = 0
    reason: str = ""
    message: str = ""


@dataclass
class Reading:
    """How far a film is read.

    Attributes:
        num_frames: Frames that have passed.
        num_bytes: Bytes that were read of the file.
    """

    num_frames: int = 0
    num_bytes: int = 0


def cut_film(
    path: str,
    parts: Sequence[Part],
    detector: ShotDetector | None,
    options: CutOptions,
    scratch: Path,
    on_progress: Callable[[Reading], None] = lambda reading: None,
) -> Iterator[CutClip | None]:
    """Cut a film; yields a clip for every part, and for every shot where a detector is given.

    None says that a film's rate has turned out to be variable: it is cut anew, and what came before does not count.

    Args:
        path: A local path or URL.
        parts: The parts that are wanted.
        detector: Finds shots.
        options: How clips are written.
        scratch: A local folder for the files.
        on_progress: Called after every group of pictures.

    Raises:
        DecodeError: when nothing of the film can be read.
    """
    reading = Reading()
    try:
        yield from _cut(path, parts, detector, options, scratch, reading, on_progress, None)
    except UnevenError:
        with _opened(path) as opened:
            counted = CountedFile(opened)
            times = all_times(counted, path)
        yield None
        reading.num_bytes += counted.num_read
        yield from _cut(path, parts, detector, options, scratch, reading, on_progress, times)


def _opened(path: str) -> Any:
    if "://" not in path:
        try:
            return open(path, "rb")
        except OSError as error:
            reason = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"
            raise DecodeError(reason, f"{path}: {error.strerror}") from error
    try:
        return fsspec.open(path, "rb", block_size=_REMOTE_BLOCK_BYTES, cache_type="readahead").open()
    except FileNotFoundError as error:
        raise DecodeError("missing_file", f"{path}: no such object") from error


def _cut(
    path: str,
    parts: Sequence[Part],
    detector: ShotDetector | None,
    options: CutOptions,
    scratch: Path,
    reading: Reading,
    on_progress: Callable[[Reading], None],
    times: list[int] | None,
) -> Iterator[CutClip]:
    before = reading.num_bytes
    with _opened(path) as opened:
        counted = CountedFile(opened)
        film = Film(counted, path, times)
        try:
            if times is None and any(part.fragment.at is not None for part in parts) and not film.stream.frames:
                raise UnevenError
            # Minutes may pass while a long clip is encoded.
            knife = _Knife(film, parts, detector, options, scratch, times, lambda: on_progress(reading))
            for group in film.groups():
                reading.num_frames, reading.num_bytes = group.frames.stop, before + counted.num_read
                on_progress(reading)
                yield from knife.add(group)
            yield from knife.finish()
            reading.num_bytes = before + counted.num_read
            on_progress(reading)
        finally:
            film.close()


class _Knife:
    """Takes a film's groups as they come, and lets go of those that no part needs any more."""

    def __init__(
        self,
        film: Film,
        parts: Sequence[Part],
        detector: ShotDetector | None,
        options: CutOptions,
        scratch: Path,
        times: list[int] | None,
        on_frame: Callable[[], None],
    ):
        self.film, self.options, self.scratch, self._on_frame = film, options, scratch, on_frame
        self._line = timeline(times, film.fps, film.stream.time_base) if times else None
        self._total = len(times) if times else film.stream.frames
        self._left = [(part.name, part.is_picture, self._frames(part)) for part in parts]
        self._shots = ShotCutter(detector, film.fps, options.shots) if detector is not None else None
        self._groups: list[Group] = []
        self._num_frames = 0
        self._written = 0

    def _frames(self, part: Part) -> np.ndarray:
        """Numbers of the film's frames that a part shows, one after another."""
        wanted = part.fragment.frame_range(self._total or 2**31, self.film.fps)
        if self._line is not None:
            return self._line[wanted.start : wanted.stop]
        # An open end is found when the film ends.
        return np.array([wanted.start, wanted.stop])

    def _needed(self, name: str, frames: np.ndarray) -> tuple[int, int]:
        """First frame and end of a part."""
        if self._line is not None:
            return (int(frames[0]), int(frames[-1]) + 1) if len(frames) else (0, 0)
        return int(frames[0]), int(frames[1])

    def add(self, group: Group) -> Iterator[CutClip]:
        """Take a group; yields clips that are complete with it."""
        self._groups.append(group)
        self._num_frames = group.frames.stop
        if self._shots is not None:
            frames = self.film.decode(self._groups[-1:] if self.film.is_closed(group) else self._groups[-2:])
            new = (self.film.view(frame) for number, frame in frames if number in group.frames)
            self._take_shots(self._shots.add([thumbnail(pixels) for pixels in new]))
        yield from self._ready(self._num_frames)
        needed = [self._needed(name, frames)[0] for name, _, frames in self._left]
        if self._shots is not None:
            needed.append(self._shots.open_since)
        first = min(needed, default=self._num_frames)
        # One group before the first that is needed: pictures shown before a key frame may need it.
        while len(self._groups) > 2 and self._groups[1].frames.stop <= first:
            del self._groups[0]

    def finish(self) -> Iterator[CutClip]:
        """Cut what reaches to the end of the film."""
        if self._shots is not None:
            self._take_shots(self._shots.finish())
        yield from self._ready(None)

    def _take_shots(self, shots: Sequence[range]) -> None:
        for shot in shots:
            frames = np.arange(shot.start, shot.stop) if self._line is not None else np.array([shot.start, shot.stop])
            self._left.append((str(Fragment(frames=(shot.start, shot.stop))), False, frames))

    def _ready(self, num_frames: int | None) -> Iterator[CutClip]:
        """Cut the parts that end before a frame; at the end of the film all that are left."""
        waiting = []
        for name, is_picture, frames in self._left:
            first, end = self._needed(name, frames)
            if num_frames is not None and end > num_frames:
                waiting.append((name, is_picture, frames))
                continue
            if self._line is None:
                frames = np.arange(first, min(end, self._num_frames))
            yield self._clip(name, is_picture, frames)
        self._left = waiting

    def _clip(self, name: str, is_picture: bool, frames: np.ndarray) -> CutClip:
        if not len(frames):
            return CutClip(name, reason="outside_file", message=f"{self.film.path}: no frame at #{name}")
        self._written += 1
        target = self.scratch / f"{self._written}{'.png' if is_picture else '.mp4'}"
        try:
            how = self._write(target, is_picture, frames)
        except DecodeError as error:
            target.unlink(missing_ok=True)
            return CutClip(name, reason=error.reason, message=str(error))
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        return CutClip(name, str(target), digest, how, len(frames), self.film.fps, target.stat().st_size)

    def _write(self, target: Path, is_picture: bool, frames: np.ndarray) -> str:
        if is_picture:
            Image.fromarray(next(self._pixels(frames))).save(target)
            return "picture"
        packets = self._copyable(frames)
        if packets is not None:
            _copy(target, packets, self.film.stream)
            return "copied"
        # The writer ends in a name of its own and renames: what fails midway leaves nothing.
        write_video_stream(target, _chunks(self._pixels(frames)), self.film.fps, self.options.crf)
        return "encoded"

    def _copyable(self, frames: np.ndarray) -> list[Any] | None:
        """The packets of a clip, where they stand together from a key frame on and nothing else is among them."""
        shorter = min(self.film.view.width, self.film.view.height)
        if (
            not self.film.has_times
            or self._line is not None
            or self.film.codec not in _COPIED_CODECS
            or (self.options.height and shorter > self.options.height)
        ):
            return None
        first, end = int(frames[0]), int(frames[-1]) + 1
        groups = [group for group in self._groups if group.frames.stop > first and group.frames.start < end]
        packets: list[Any] = []
        left = end - first
        for group in groups:
            numbers = self.film.numbers(group)
            if not packets:
                if numbers.get(group.packets[0].pts) != first:
                    return None
                # Pictures shown before the key frame belong to what came before it.
                numbers = {time: number for time, number in numbers.items() if number >= first}
            for packet in group.packets:
                number = numbers.get(packet.pts)
                if number is None:
                    if packets and packet.pts >= packets[0].pts:
                        return None
                    continue
                if number >= end:
                    return None
                packets.append(packet)
                left -= 1
                if not left:
                    return packets
        return None

    def _pixels(self, frames: np.ndarray) -> Iterator[np.ndarray]:
        """The shown pixels of frames, at most as high as is wanted."""
        first, end = int(frames[0]), int(frames[-1]) + 1
        wanted = np.bincount(frames - first)
        start = next(i for i, group in enumerate(self._groups) if group.frames.stop > first)
        last = next(i for i, group in enumerate(self._groups) if group.frames.stop >= end)
        expected = first
        if not self.film.is_closed(self._groups[start]):
            start = max(start - 1, 0)
        for number, frame in self.film.decode(self._groups[start : last + 1]):
            self._on_frame()
            if not first <= number < end or not wanted[number - first]:
                continue
            if frame.is_corrupt:
                raise DecodeError("corrupt_frame", f"{self.film.path}: frame {number} does not decode")
            missing = next((i for i in range(expected, number) if wanted[i - first]), None)
            if missing is not None:
                raise DecodeError("corrupt_frame", f"{self.film.path}: frame {missing} does not decode")
            expected = number + 1
            pixels = self._sized(self.film.view(frame))
            for _ in range(wanted[number - first]):
                yield pixels
        if expected != end:
            raise DecodeError("corrupt_frame", f"{self.film.path}: frame {expected} does not decode")

    def _sized(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        shorter = min(height, width)
        if not self.options.height or shorter <= self.options.height:
            return pixels
        # Even, which H.264 asks for.
        size = tuple(max(2 * round(side * self.options.height / shorter / 2), 2) for side in (width, height))
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _chunks(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    chunk: list[np.ndarray] = []
    for pixels in frames:
        chunk.append(pixels)
        if len(chunk) == CHUNK_FRAMES:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


def _copy(target: Path, packets: Sequence[Any], template: Any) -> None:
    """Write packets as a file of their own that starts at 0."""
    import av

    partial = target.with_suffix(".tmp.mp4")
    try:
        with av.open(str(partial), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream_from_template(template)
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.duration = packet.pts - packets[0].pts, packet.duration
                copy.dts = None if packet.dts is None else packet.dts - packets[0].pts
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                container.mux(copy)
        os.replace(partial, target)
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError("unsupported", f"{target.name}: cannot be copied: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
