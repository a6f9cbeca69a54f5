"""Files of results: pictures and videos with the facts of their making inside and beside them."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loomvideo.model.clips import TARGET_FPS
from loomvideo.pipelines.generation.requests import VIDEO_SUFFIXES
from loomvideo.pipelines.media.sound import ColourTags
from loomvideo.pipelines.media.video_writer import write_while_made
from loomvideo.platform.errors import UserError, full_disk_named

IMAGE_DESCRIPTION = 0x010E
"""The EXIF tag that holds a WebP's facts."""


def write_result(
    path: Path,
    pieces: Iterable[np.ndarray],
    facts: dict[str, Any],
    fps: float = TARGET_FPS,
    colours: ColourTags | None = None,
    finish: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write frames as mp4, png or webp with the facts embedded, and as JSON beside it.

    Args:
        path: The file; its folder is made.
        pieces: Frames uint8 [frames, height, width, 3] in pieces; a video is encoded while the next one is made.
        facts: Plain values, ``prompt`` among them.
        fps: The frame rate of a video.
        colours: What its colours mean; None states nothing.
        finish: Called with the file before its facts are written beside it, which make it count as done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        metadata = {"comment": text, "title": facts["prompt"]}
        write_while_made(path, pieces, fps=fps, metadata=metadata, colours=colours)
    else:
        _write_picture(path, next(iter(pieces))[0], text)
    finish(path)
    sidecar = sidecar_path(str(path))
    partial = sidecar.with_name(f".{sidecar.name}.tmp")
    with full_disk_named(sidecar, partial):
        partial.write_text(json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        partial.replace(sidecar)


def sidecar_path(out: str) -> Path:
    """Where the facts of a result are: ``result.mp4.json``."""
    return Path(out + ".json")


def digest(facts: dict[str, Any]) -> str:
    """One name for facts: equal for equal requests, settings, checkpoints and inputs."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def content_hash(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: if there is none.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_picture(path: Path, pixels: np.ndarray, text: str) -> None:
    partial = path.with_name(f".{path.stem}.tmp{path.suffix}")
    picture = Image.fromarray(pixels)
    with full_disk_named(path, partial):
        if path.suffix.lower() == ".png":
            info = PngInfo()
            info.add_itxt("loomvideo", text)
            picture.save(partial, pnginfo=info)
        else:
            exif = Image.Exif()
            exif[IMAGE_DESCRIPTION] = text
            picture.save(partial, lossless=True, exif=exif)
        partial.replace(path)
