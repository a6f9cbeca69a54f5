"""Videos and pictures as RGB frames: PyAV, or decord where it is asked for and correct; Pillow; frame folders.

Torch-free, so that the isolated decoder process (``decode_worker``) starts in a fraction of a second. What a file holds
decides how it is read, not its name.
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from loomvideo.pipelines.media.fragments import FragmentMedia, split_fragment

Backend = Literal["auto", "decord", "pyav"]
CHUNK_FRAMES = 16
MAX_PIXELS = 8192 * 8192
DEFAULT_FOLDER_FPS = 24.0
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# decord fails on some narrower frames (16, 24, 48 and 72 pixels): its rows are padded there.
_DECORD_MIN_WIDTH = 96
# Consecutive timestamps may differ by rounding to the container's clock and no more.
_RATE_TOLERANCE = 0.02


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


class Media(Protocol):
    """An open file."""

    info: MediaInfo

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames at ascending indices (repeats allowed), as uint8 chunks ``[n, height, width, 3]``.

        Raises:
            DecodeError: if a frame cannot be decoded.
        """
        ...


def open_media(path: str, backend: Backend = "auto", folder_fps: float = DEFAULT_FOLDER_FPS) -> Media:
    """Open a local video file, picture, or folder of pictures in name order.

    Args:
        path: Of the file or folder, or a part of a file (``pipelines.fragments``).
        backend: For videos; ``auto`` is PyAV, ``decord`` takes decord for the files that decord reads correctly.
        folder_fps: Frame rate given to a folder of pictures.

    Raises:
        DecodeError: with a reason code.
    """
    path, fragment = split_fragment(path)
    if fragment is not None:
        try:
            return FragmentMedia(open_media(path, backend, folder_fps), fragment)
        except ValueError as error:
            raise DecodeError("outside_file", f"{path}: {error}") from error
    file = Path(path)
    if file.is_dir():
        return FrameFolder(file, folder_fps)
    if not file.exists():
        raise DecodeError("missing_file", f"{path}: no such file")
    if file.stat().st_size == 0:
        raise DecodeError("empty_file", f"{path}: the file is empty")
    with file.open("rb") as opened:
        head = opened.read(32)
    if _is_picture(head):
        return Picture(file)
    return _open_video(path, backend)


def _is_picture(head: bytes) -> bool:
    heif = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"mif1")
    starts = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
    return heif or head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _open_video(path: str, backend: Backend) -> "Media":
    video = PyAVVideo(path)
    return DecordVideo(path, video.info) if backend == "decord" and video.plain else video


class PyAVVideo:
    """A video through FFmpeg's libraries: any codec and pixel format, rotated as shown, by timestamp."""

    def __init__(self, path: str):
        import av

        self.path = path
        try:
            with av.open(path) as container:
                stream = _video_stream(container, path)
                self._time_base = stream.time_base
                promised = stream.frames
                rate = stream.average_rate or stream.guessed_rate
                times = sorted(p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard)
                pixel_format, codec = stream.codec_context.pix_fmt, stream.codec_context.name
            first = self._first_frame()
        except av.FFmpegError as error:
            raise DecodeError("unreadable", f"{path}: {error}") from error
        if not times or first is None:
            raise DecodeError("no_frames", f"{path}: the video stream has no frames")
        if promised and len(times) < promised:
            raise DecodeError("truncated", f"{path}: {len(times)} of {promised} frames are in the file")
        self._times = times
        self._rotation = int(first.rotation) % 360
        width, height = (first.width, first.height) if self._rotation % 180 == 0 else (first.height, first.width)
        _check_size(path, width, height)
        steps = np.diff(times)
        variable = len(steps) > 1 and bool(np.ptp(steps) > max(_RATE_TOLERANCE * np.median(steps), 1.5))
        if len(times) > 1:
            fps = float(1 / (Fraction(times[-1] - times[0], len(times) - 1) * self._time_base))
        else:
            fps = float(rate or DEFAULT_FOLDER_FPS)
        self.info = MediaInfo("video", width, height, len(times), fps, "pyav", variable, self._rotation)
        self.plain = (
            not variable
            and self._rotation == 0
            and pixel_format in ("yuv420p", "yuvj420p")
            and codec in ("h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1")
            and times[0] >= 0
            and width >= _DECORD_MIN_WIDTH
        )

    def _first_frame(self):
        import av

        with av.open(self.path) as container:
            return next(container.decode(_video_stream(container, self.path)), None)

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames of the constant-rate timeline: index i shows what is on screen at ``i / fps``."""
        import av

        wanted = [self._time_of(index) for index in indices]
        buffer: list[np.ndarray] = []
        position = 0
        try:
            with av.open(self.path) as container:
                stream = _video_stream(container, self.path)
                stream.thread_type = "SLICE"
                if wanted[0] > self._times[0]:
                    container.seek(wanted[0], stream=stream)
                for frame in container.decode(stream):
                    if frame.pts is None or frame.pts < wanted[position]:
                        continue
                    if frame.pts != wanted[position] or frame.is_corrupt:
                        raise DecodeError("corrupt_frame", f"{self.path}: frame {indices[position]} does not decode")
                    pixels = self._upright(frame.to_ndarray(format="rgb24"))
                    while position < len(wanted) and wanted[position] == frame.pts:
                        buffer.append(pixels)
                        position += 1
                    if len(buffer) >= CHUNK_FRAMES:
                        yield np.stack(buffer)
                        buffer = []
                    if position == len(wanted):
                        break
        except av.FFmpegError as error:
            raise DecodeError("corrupt_frame", f"{self.path}: {error}") from error
        if position < len(wanted):
            raise DecodeError("corrupt_frame", f"{self.path}: frame {indices[position]} does not decode")
        if buffer:
            yield np.stack(buffer)

    def _time_of(self, index: int) -> int:
        if not self.info.variable_rate:
            return self._times[index]
        clock = self._times[0] + round(index / (self.info.fps * float(self._time_base)))
        return self._times[max(bisect.bisect_right(self._times, clock) - 1, 0)]

    def _upright(self, pixels: np.ndarray) -> np.ndarray:
        # The display matrix counts counter-clockwise degrees, as rot90 does.
        return np.ascontiguousarray(np.rot90(pixels, self._rotation // 90)) if self._rotation else pixels


class DecordVideo:
    """A plain video (8-bit 4:2:0, constant rate, upright) through decord."""

    def __init__(self, path: str, info: MediaInfo):
        import decord

        self.path = path
        try:
            self._reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise DecodeError("unreadable", f"{path}: decord: {_first_line(error)}") from error
        if len(self._reader) != info.num_frames:
            raise DecodeError("truncated", f"{path}: decord sees {len(self._reader)} of {info.num_frames} frames")
        self.info = MediaInfo(info.kind, info.width, info.height, info.num_frames, info.fps, "decord")

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames by index."""
        import decord

        for start in range(0, len(indices), CHUNK_FRAMES):
            try:
                yield self._reader.get_batch(list(indices[start : start + CHUNK_FRAMES])).asnumpy()
            except (decord.DECORDError, RuntimeError) as error:
                raise DecodeError("corrupt_frame", f"{self.path}: decord: {_first_line(error)}") from error


class Picture:
    """A picture, or an animation with its frame times, through Pillow; alpha is laid over white."""

    def __init__(self, path: Path):
        from PIL import Image, ImageOps

        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        self.path = path
        try:
            self._image = Image.open(path)
            num_frames = getattr(self._image, "n_frames", 1)
            width, height = self._image.size
            _check_size(str(path), width, height)
            durations = []
            if num_frames > 1:
                for number in range(num_frames):
                    self._image.seek(number)
                    durations.append(max(self._image.info.get("duration") or 100, 10))
                self._image.seek(0)
            first = ImageOps.exif_transpose(self._image)
        except DecodeError:
            raise
        except Image.DecompressionBombError as error:
            raise DecodeError("too_large", f"{path}: {error}") from error
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise DecodeError("unreadable", f"{path}: {_first_line(error)}") from error
        width, height = first.size
        if num_frames == 1:
            self.info = MediaInfo("image", width, height, 1, 0.0, "pillow")
            self._ends = [1.0]
        else:
            self._ends = list(np.cumsum(durations) / 1000)
            fps = num_frames / self._ends[-1]
            variable = max(durations) != min(durations)
            self.info = MediaInfo("video", width, height, num_frames, fps, "pillow", variable)

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames of the constant-rate timeline."""
        for index in indices:
            number = 0
            if self.info.num_frames > 1:
                time = index / self.info.fps + 1e-9
                number = min(bisect.bisect_right(self._ends, time), self.info.num_frames - 1)
            try:
                self._image.seek(number)
                yield _rgb(self._image)[None]
            except Exception as error:
                raise DecodeError("corrupt_frame", f"{self.path}: {_first_line(error)}") from error


class FrameFolder:
    """A folder of equally sized pictures in natural name order."""

    def __init__(self, folder: Path, fps: float):
        self.files = sorted(
            (file for file in folder.iterdir() if file.suffix.lower() in _PICTURE_SUFFIXES),
            key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)],
        )
        if not self.files:
            raise DecodeError("no_frames", f"{folder}: no pictures in this folder")
        first = Picture(self.files[0]).info
        self.info = MediaInfo("video", first.width, first.height, len(self.files), fps, "pillow")

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames by position in the folder."""
        for index in indices:
            frame = next(Picture(self.files[index]).read([0]))
            if frame.shape[1:3] != (self.info.height, self.info.width):
                raise DecodeError("mixed_sizes", f"{self.files[index]}: another size than the folder's first picture")
            yield frame


def _rgb(image) -> np.ndarray:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        grey = np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _video_stream(container, path: str):
    import av

    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise DecodeError("no_video_stream", f"{path}: no video stream")
    return streams[0]


def _check_size(path: str, width: int, height: int) -> None:
    if width < 2 or height < 2:
        raise DecodeError("too_small", f"{path}: {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise DecodeError("too_large", f"{path}: {width}x{height} pixels")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
