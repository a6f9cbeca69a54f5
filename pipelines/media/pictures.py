"""Pictures and animations through Pillow, as a viewer shows them: upright, in sRGB, alpha over white."""

import bisect
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from loomvideo.pipelines.media.media_info import (
    MAX_PIXELS,
    READER_ERRORS,
    DecodeError,
    MediaInfo,
    check_size,
    first_line,
)

# Browsers show frames that ask for less than 20 ms, or for none, for 100 ms.
_SHORTEST_MS, _USUAL_MS = 20, 100
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def is_picture(head: bytes) -> bool:
    """Whether a file's first 32 bytes are those of a picture or animation."""
    heif = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", *_HEIC)
    starts = (
        b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"8BPS", b"\0\0\1\0",
        b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
    )  # fmt: skip
    return heif or head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


class Picture:
    """A picture, or an animation with its frame times, through Pillow; alpha is laid over white."""

    def __init__(self, path: Path):
        from PIL import Image, ImageOps

        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        self.path = path
        _register_heif(path)
        try:
            self._image = Image.open(path)
            # The further pages of a phone's MPO and of a TIFF are previews, depth and scans, no film.
            num_frames = getattr(self._image, "n_frames", 1) if self._image.format in _ANIMATED else 1
            width, height = self._image.size
            check_size(str(path), width, height)
            durations = []
            if num_frames > 1:
                for number in range(num_frames):
                    self._image.seek(number)
                    self._image.load()  # WebP knows a frame's duration when it is decoded
                    duration = self._image.info.get("duration") or 0
                    durations.append(duration if duration >= _SHORTEST_MS else _USUAL_MS)
                self._image.seek(0)
            first = ImageOps.exif_transpose(self._image)
        except DecodeError:
            raise
        except Image.DecompressionBombError as error:
            raise DecodeError("too_large", f"{path}: {error}") from error
        except READER_ERRORS as error:
            raise DecodeError("unreadable", f"{path}: {first_line(error)}") from error
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
                if self.info.num_frames > 1:  # layers of a PSD are no frames, and cannot be gone back to
                    self._image.seek(number)
                yield _rgb(self._image)[None]
            except READER_ERRORS as error:
                raise DecodeError("corrupt_frame", f"{self.path}: {first_line(error)}") from error


def _register_heif(path: Path) -> None:
    with open(path, "rb") as opened:
        head = opened.read(12)
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIC:
        return
    if importlib.util.find_spec("pillow_heif") is None:
        problem = "a HEIC picture; pip install pillow-heif on every node, or convert it to JPEG"
        raise DecodeError("unsupported", f"{path}: {problem}")
    import pillow_heif

    pillow_heif.register_heif_opener()


def _rgb(image) -> np.ndarray:
    from PIL import Image, ImageOps

    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        grey = np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    image = _in_srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, (255, 255, 255)), alpha)
    return np.asarray(image)


def _in_srgb(image, profile: bytes | None):
    """An RGB picture with the colours that a picture's profile gives its numbers."""
    from PIL import ImageCms

    if not profile:
        return image.convert("RGB")
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(given):
            return image.convert("RGB")
        if image.mode not in ("RGB", "CMYK", "L", "LAB"):
            image = image.convert("RGB")
        converted = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        # Viewers show a picture whose profile is broken, or of another colour model, as sRGB.
        return image.convert("RGB")
    return converted if converted is not None else image.convert("RGB")
