"""What people upload: checked by content, decoded in a child process, kept for a while under our own id."""

import contextlib
import secrets
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loomvideo.pipelines.media.decode import DecodeError, MediaInfo
from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclass
class UploadLimits:
    """What is accepted; the defaults fit one GPU."""

    max_bytes: int = option(100 * 2**20, "bytes of a file at most")
    max_pixels: int = option(4096 * 2304, "pixels of a frame at most")
    max_side: int = option(4096, "pixels of a side at most")
    max_duration_s: float = option(20.0, "seconds of a video at most")
    max_frames: int = option(1200, "frames of a video at most")
    decode_timeout_s: float = option(30.0, "seconds that decoding may take")
    kept_bytes: int = option(2**30, "bytes of uploads kept")
    kept_s: float = option(3600.0, "seconds that an upload is kept")


@dataclass(frozen=True)
class Upload:
    """A checked picture or video; ``content`` is empty where only its description was read."""

    id: str
    content: bytes
    media_type: str
    info: MediaInfo
    num_bytes: int

    def describe(self) -> dict:
        """What the page shows of it."""
        info = self.info
        shape = {"kind": info.kind, "width": info.width, "height": info.height}
        return {"id": self.id, **shape, "frames": info.num_frames, "fps": round(info.fps, 3)}


_STARTS = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (0, b"II*\0", "image/tiff"),
    (0, b"MM\0*", "image/tiff"),
    (8, b"WEBP", "image/webp"),
    (8, b"AVI ", "video/x-msvideo"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
    (0, b"\0\0\x01\xba", "video/mpeg"),
    *((4, atom, "video/quicktime") for atom in (b"moov", b"mdat", b"wide", b"free", b"skip")),
    *((8, brand, "image/avif") for brand in (b"avif", b"avis")),
    *((8, brand, "image/heic") for brand in (b"heic", b"heix", b"mif1")),
)
_SOUND = b"M4A "


def media_type(content: bytes) -> str:
    """The type of a picture or video by its first bytes, whatever its name said.

    Raises:
        UserError: naming the accepted types.
    """
    found = next((kind for at, mark, kind in _STARTS if content[at : at + len(mark)] == mark), "")
    if not found and content[4:8] == b"ftyp" and content[8:12] != _SOUND:
        found = "video/mp4"
    if not found and content[:1] == content[188:189] == b"G":
        found = "video/mp2t"
    if not found:
        raise UserError(
            "unknown file type: upload a PNG, JPEG, WebP, GIF, TIFF or AVIF picture, or an MP4, MOV, WebM, MKV, AVI or "
            "MPEG video"
        )
    return found


class UploadReader:
    """Checks and decodes uploads in a child process, replaced when it hangs or dies; one file at a time.

    Headers are read and frames decoded in there with a time limit, so that neither a decompression bomb nor a file made
    to crash a decoder reaches the server. The file it reads is in a temporary folder for as long as it is read.
    """

    def __init__(self, limits: UploadLimits):
        self.limits = limits
        self._decoder = IsolatedDecoder(limits.decode_timeout_s)
        self._lock = threading.Lock()

    def check(self, content: bytes) -> Upload:
        """Check a file's type, size, duration and first frame.

        Raises:
            UserError: one line that says what to change.
        """
        if not content:
            raise UserError("the file is empty")
        if len(content) > self.limits.max_bytes:
            most = self.limits.max_bytes / 2**20
            raise UserError(f"the file has {len(content) / 2**20:.0f} MiB; at most {most:.0f} MiB")
        kind = media_type(content)
        with self._readable_file(content) as path:
            info = self._decoder.probe(path)
            _check_info(info, self.limits)
            if not list(self._decoder.read(path, [0])):
                raise UserError("the video has no frames")
        return Upload(secrets.token_urlsafe(12), content, kind, info, len(content))

    def frames(self, upload: Upload, indices: Sequence[int]) -> np.ndarray:
        """Frames at ascending indices, uint8 ``[frames, height, width, 3]``.

        Raises:
            UserError: if one cannot be decoded.
        """
        with self._readable_file(upload.content) as path:
            return np.concatenate(list(self._decoder.read(path, indices)))

    def close(self) -> None:
        """End the child process."""
        self._decoder.close()

    @contextlib.contextmanager
    def _readable_file(self, content: bytes) -> Iterator[str]:
        with self._lock, tempfile.TemporaryDirectory(prefix="loomvideo-upload-") as folder:
            path = Path(folder) / "upload"
            path.write_bytes(content)
            try:
                yield str(path)
            except DecodeError as error:
                raise UserError(_readable(error, str(path))) from error


def _check_info(info: MediaInfo, limits: UploadLimits) -> None:
    if max(info.width, info.height) > limits.max_side or info.width * info.height > limits.max_pixels:
        raise UserError(
            f"{info.width}x{info.height} pixels are too many: at most {limits.max_side} a side "
            f"and {limits.max_pixels / 1e6:.1f} megapixels"
        )
    if info.num_frames < 1:
        raise UserError("the video has no frames")
    if info.kind == "video":
        if info.fps and info.num_frames / info.fps > limits.max_duration_s:
            raise UserError(
                f"the video lasts {info.num_frames / info.fps:.1f} s: at most {limits.max_duration_s:g} s; cut it"
            )
        if info.num_frames > limits.max_frames:
            raise UserError(f"the video has {info.num_frames} frames: at most {limits.max_frames}; cut it")


def _readable(error: DecodeError, path: str) -> str:
    """A decoder's message without the path on the server."""
    hints = {
        "no_video_stream": "the file has no video stream (only sound?)",
        "timeout": "the file takes too long to decode",
        "decoder_crash": "the file cannot be decoded",
        "too_large": "the picture has too many pixels",
    }
    message = str(error).replace(path, "").lstrip(": ").strip() or "the file cannot be decoded"
    return hints.get(error.reason, f"the file cannot be read: {message}")
