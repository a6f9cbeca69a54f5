"""Opening media: videos, pictures and frame folders as RGB frames, each by the decoder that shows what a person sees.

Torch-free, so that the isolated decoder process (``decode_worker``) starts in a fraction of a second. What a file holds
decides how it is read, not its name.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from loomvideo.pipelines.media.fragments import FragmentMedia, split_fragment
from loomvideo.pipelines.media.media_info import DEFAULT_FOLDER_FPS, Backend, DecodeError, MediaInfo, OpenMedia
from loomvideo.pipelines.media.pictures import Picture, is_picture
from loomvideo.pipelines.media.videos import open_video

__all__ = ["DEFAULT_FOLDER_FPS", "Backend", "DecodeError", "MediaInfo", "OpenMedia", "on_disk", "open_media"]

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Files that are often found under the name of a picture or video.
_NO_MEDIA = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file; run `git lfs pull`"),
    (b"<!doctype html", "a web page; its download failed"),
    (b"<html", "a web page; its download failed"),
    (b"<svg", "an SVG drawing; render it to PNG"),
    (b"<?xml", "XML (an SVG drawing or a store's error); render it to PNG, or download it again"),
    (b"{", "JSON; its download failed"),
    (b"#extm3u", "a playlist; download what it names"),
    # FFmpeg would open whatever files such a list names.
    (b"ffconcat", "a list of files for FFmpeg; name the files"),
)


def open_media(path: str, backend: Backend = "auto", folder_fps: float = DEFAULT_FOLDER_FPS) -> OpenMedia:
    """Open a local video file, picture, or folder of pictures in name order.

    Args:
        path: The path of the file or folder, or a part of a file (``pipelines.fragments``).
        backend: What reads videos; ``auto`` is PyAV, ``decord`` takes decord for the files that decord reads correctly.
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
    path = on_disk(path)
    file = Path(path)
    if file.is_dir():
        return FrameFolder(file, folder_fps)
    if not file.exists():
        raise DecodeError("missing_file", f"{path}: no such file")
    refuse_endless(file)
    before = file.stat()
    if before.st_size == 0:
        raise DecodeError("empty_file", f"{path}: the file is empty")
    with file.open("rb") as opened:
        head = opened.read(64)
    _refuse_other_kinds(path, head)
    try:
        media = Picture(file) if is_picture(head) else open_video(path, backend)
    except DecodeError:
        _refuse_growing(file, before.st_size)
        raise
    _refuse_growing(file, before.st_size)
    return media


def refuse_endless(file: Path) -> None:
    """Refuse a pipe, a socket or a device, which would be waited for or read for ever.

    Raises:
        DecodeError: ``not_media``.
    """
    if file.exists() and not file.is_file():
        raise DecodeError("not_media", f"{file}: a pipe, a socket or a device; name a file")


def _refuse_growing(file: Path, num_bytes: int) -> None:
    if file.stat().st_size != num_bytes:
        raise DecodeError("growing", f"{file}: is still written; try again when it is whole")


def on_disk(path: str) -> str:
    """A local path in the Unicode form that the disk has it in; itself when there is no such file.

    Names with accents are composed on most systems and decomposed in archives made on a Mac.
    """
    if path.isascii() or Path(path).exists():
        return path
    forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next((form for form in forms if Path(form).exists()), path)


def _refuse_other_kinds(path: str, head: bytes) -> None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = next((kind for mark, kind in _NO_MEDIA if start.startswith(mark)), None)
    if kind:
        raise DecodeError("not_media", f"{path}: {kind}")


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
