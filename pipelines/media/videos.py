"""Videos as a player shows them: PyAV (FFmpeg's libraries), or decord where it is asked for and correct.

Upright and mirrored by the display matrix, square pixels, deinterlaced, in the colours of the stream's matrix, alpha
over white, at the times that the container gives. High dynamic range is refused with the reason ``hdr``.
"""

import bisect
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from loomvideo.pipelines.media.media_info import (
    CHUNK_FRAMES,
    DEFAULT_FOLDER_FPS,
    Backend,
    DecodeError,
    MediaInfo,
    OpenMedia,
    check_size,
    first_line,
)

# decord fails on some narrower frames (16, 24, 48 and 72 pixels): its rows are padded there.
_DECORD_MIN_WIDTH = 96
_DECORD_CODECS = ("h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1")
# Consecutive timestamps may differ by rounding to the container's clock and no more.
_RATE_TOLERANCE = 0.02
# Containers without presentation times, or (AVI) with those of decoding: frames are counted as they come out.
_WITHOUT_TIMES = ("avi", "h264", "hevc", "m4v", "mpegvideo", "vc1", "obu", "ivf")
_PQ, _HLG = 16, 18
_BT709, _UNSPECIFIED = 1, 2
# From here on players take BT.709 where the stream does not say.
_HD_HEIGHT = 720
_MAX_PIXEL_ASPECT = 8


class _Orientation(NamedTuple):
    """How stored frames are turned to be shown: transposed first, then mirrored."""

    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn ``[height, width, 3]``."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        if self.mirror:
            pixels = pixels[:, ::-1]
        if self.flip:
            pixels = pixels[::-1]
        return np.ascontiguousarray(pixels)


class FrameView:
    """Decoded frames of a stream as a player shows them.

    Args:
        path: The path of the file, for messages.
        first: The stream's first frame, which says how all are stored.
        aspect: The shape of the stream's pixels.

    Attributes:
        width: The width as shown.
        height: The height as shown.
        rotation: Degrees that the file asks for.

    Raises:
        DecodeError: ``hdr``, ``too_small`` or ``too_large``.
    """

    def __init__(self, path: str, first: Any, aspect: Fraction | None):
        if first.color_trc in (_PQ, _HLG):
            kind = "PQ" if first.color_trc == _PQ else "HLG"
            raise DecodeError("hdr", f"{path}: high dynamic range ({kind}); convert it to BT.709 first")
        self._size = _square(first.width, first.height, aspect)
        self._orientation, self.rotation = _orientation(first)
        self.width, self.height = reversed(self._size) if self._orientation.transpose else self._size
        check_size(path, self.width, self.height)
        self._source_colours = _colours_to_assume(first)
        self._has_alpha = any(component.is_alpha for component in first.format.components)
        self.changes_nothing = (
            self._orientation == _Orientation()
            and self._size == (first.width, first.height)
            and self._source_colours is None
        )

    def __call__(self, frame: Any) -> np.ndarray:
        """Pixels of a frame, uint8 ``[height, width, 3]``."""
        options = {} if self._source_colours is None else {"src_colorspace": self._source_colours}
        pixels = frame.to_ndarray(format="rgba" if self._has_alpha else "rgb24", **options)
        if self._has_alpha:
            pixels = _over_white(pixels)
        if frame.interlaced_frame:
            pixels = _deinterlaced(pixels)
        if self._size != (frame.width, frame.height):
            pixels = _resized(pixels, *self._size)
        return self._orientation.apply(pixels)


def is_variable(times: Sequence[int]) -> bool:
    """Whether ascending timestamps differ by more than the rounding of a container's clock."""
    steps = np.diff(times)
    return len(steps) > 1 and bool(np.ptp(steps) > max(_RATE_TOLERANCE * np.median(steps), 1.5))


def open_video(path: str, backend: Backend) -> OpenMedia:
    """Open a video file.

    Raises:
        DecodeError: with a reason code.
    """
    video = PyAVVideo(path)
    return DecordVideo(path, video.info) if backend == "decord" and video.plain else video


class PyAVVideo:
    """A video of any codec, pixel format and container, by timestamp or, where there are none, by count."""

    def __init__(self, path: str):
        import av

        self.path = path
        try:
            with av.open(path) as container:
                stream = video_stream(container, path)
                self._index, self._time_base = stream.index, stream.time_base
                self._alpha_decoder = alpha_decoder(stream)
                pixel_format, codec = stream.codec_context.pix_fmt, stream.codec_context.name
                rate, aspect = stream.average_rate or stream.guessed_rate, stream.sample_aspect_ratio
                packets = [(p.pts, p.is_discard) for p in container.demux(stream) if p.size]
                promised = stream.frames
                without_times = any(pts is None for pts, _ in packets) or counts_frames(container)
            if promised and len(packets) < promised:
                raise DecodeError("truncated", f"{path}: {len(packets)} of {promised} frames are in the file")
            first = next(self._frames(), None)
            if first is None:
                raise DecodeError("no_frames", f"{path}: the video stream has no frames")
            self._view = FrameView(path, first, aspect)
            self._times: list[int] | None = None
            if without_times:
                num_frames = sum(1 for _ in self._frames())
            else:
                # A cut that starts off a key frame begins with frames that nothing can decode, or that are not shown.
                self._times = sorted(pts for pts, discard in packets if not discard and pts >= first.pts)
                num_frames = len(self._times)
        except av.FFmpegError as error:
            raise DecodeError("unreadable", f"{path}: {error}") from error
        width, height = self._view.width, self._view.height
        variable, fps = False, float(rate or DEFAULT_FOLDER_FPS)
        if self._times is not None and num_frames > 1:
            variable = is_variable(self._times)
            fps = float(1 / (Fraction(self._times[-1] - self._times[0], num_frames - 1) * self._time_base))
        self.info = MediaInfo("video", width, height, num_frames, fps, "pyav", variable, self._view.rotation)
        self.plain = (
            not variable
            and self._view.changes_nothing
            and not first.interlaced_frame
            and pixel_format in ("yuv420p", "yuvj420p")
            and codec in _DECORD_CODECS
            and self._alpha_decoder is None
            and self._times is not None
            and len(self._times) == len(packets)
            and self._times[0] >= 0
            and width >= _DECORD_MIN_WIDTH
        )

    def _frames(self, seek_to: int | None = None) -> Iterator[Any]:
        """Decoded frames in order, from the key frame before a time on."""
        import av

        with av.open(self.path) as container:
            stream = container.streams[self._index]
            stream.thread_type = "SLICE"
            if seek_to is not None:
                container.seek(seek_to, stream=stream)
            if self._alpha_decoder is None:
                yield from container.decode(stream)
                return
            decoder = av.CodecContext.create(self._alpha_decoder, "r")
            for packet in container.demux(stream):
                yield from decoder.decode(packet)

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames of the constant-rate timeline: index i shows what is on screen at ``i / fps``."""
        import av

        wanted = [self._time_of(index) for index in indices]
        buffer: list[np.ndarray] = []
        position = 0
        try:
            for time, frame in self._timed(wanted[0]):
                if time < wanted[position]:
                    continue
                if time != wanted[position] or frame.is_corrupt:
                    raise DecodeError("corrupt_frame", f"{self.path}: frame {indices[position]} does not decode")
                pixels = self._view(frame)
                while position < len(wanted) and wanted[position] == time:
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

    def _timed(self, start: int) -> Iterator[tuple[int, Any]]:
        """Frames with their times (or numbers), the first one no later than ``start``."""
        if self._times is None:
            yield from enumerate(self._frames())
            return
        if start > self._times[0]:
            frames = ((frame.pts, frame) for frame in self._frames(start) if frame.pts is not None)
            first = next(((time, frame) for time, frame in frames if time >= start), None)
            # Pictures between a key frame and one shown before it need what came before: then decoding starts afresh.
            if first is not None and first[0] == start and not first[1].is_corrupt:
                yield first
                yield from frames
                return
        yield from ((frame.pts, frame) for frame in self._frames() if frame.pts is not None)

    def _time_of(self, index: int) -> int:
        if self._times is None:
            return index
        if not self.info.variable_rate:
            return self._times[index]
        clock = self._times[0] + round(index / (self.info.fps * float(self._time_base)))
        return self._times[max(bisect.bisect_right(self._times, clock) - 1, 0)]


class DecordVideo:
    """A plain video (8-bit 4:2:0, constant rate, upright, square pixels, progressive) through decord."""

    def __init__(self, path: str, info: MediaInfo):
        import decord

        self.path = path
        try:
            self._reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise DecodeError("unreadable", f"{path}: decord: {first_line(error)}") from error
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
                raise DecodeError("corrupt_frame", f"{self.path}: decord: {first_line(error)}") from error


def counts_frames(container: Any) -> bool:
    """Whether a container's times are none of presentation, so that frames are counted as they come out."""
    return bool(set(container.format.name.split(",")) & set(_WITHOUT_TIMES))


def video_stream(container: Any, path: str) -> Any:
    """The stream that players show.

    Raises:
        DecodeError: ``no_video_stream``.
    """
    import av

    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise DecodeError("no_video_stream", f"{path}: no video stream")
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def alpha_decoder(stream: Any) -> str | None:
    """The decoder of a stream whose alpha FFmpeg's own decoder leaves out; None for others."""
    has_alpha = stream.codec_context.name == "vp9" and stream.metadata.get("alpha_mode") == "1"
    return "libvpx-vp9" if has_alpha else None


def _square(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """The size with square pixels: the side that is squeezed is stretched."""
    if not aspect or aspect == 1 or not Fraction(1, _MAX_PIXEL_ASPECT) <= aspect <= _MAX_PIXEL_ASPECT:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _orientation(frame: Any) -> tuple[_Orientation, int]:
    """How the display matrix turns a frame, to the nearest right angle, and its rotation in degrees."""
    from av.sidedata.sidedata import Type

    side_data = frame.side_data.get(Type.DISPLAYMATRIX)
    if side_data is None:
        return _Orientation(), 0
    a, b, _, c, d = struct.unpack("<5i", bytes(side_data)[:20])
    rotation = int(frame.rotation) % 360
    # A point (x, y) is shown at (a x + c y, b x + d y).
    if abs(b) + abs(c) > abs(a) + abs(d):
        return _Orientation(transpose=True, mirror=c < 0, flip=b < 0), rotation
    return _Orientation(mirror=a < 0, flip=d < 0), rotation


def _colours_to_assume(frame: Any) -> int | None:
    """The colour matrix of a stream that names none; None where FFmpeg's own choice is that of players."""
    is_yuv = not frame.format.is_rgb and len(frame.format.components) >= 3
    full_range = frame.format.name.startswith("yuvj")
    if is_yuv and not full_range and frame.colorspace == _UNSPECIFIED and frame.height >= _HD_HEIGHT:
        return _BT709
    return None


def _over_white(pixels: np.ndarray) -> np.ndarray:
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _deinterlaced(pixels: np.ndarray) -> np.ndarray:
    """One field at full height: the lines between are the mean of their neighbours."""
    field = pixels[0::2]
    below = np.concatenate((field[1:], field[-1:]))[: len(pixels[1::2])]
    shown = pixels.copy()
    shown[1::2] = (field[: len(below)].astype(np.uint16) + below + 1) // 2
    return shown


def _resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(width=width, height=height, interpolation="BICUBIC").to_ndarray(format="rgb24")
