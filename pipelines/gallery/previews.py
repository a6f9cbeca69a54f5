"""Strips of frames: a picture file or clip as eight frames side by side in one JPEG, which any browser can play."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loomvideo.model.codec import Codec, build_codec
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.gallery.rows import GalleryRow
from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.files import local_copies, resolve
from loomvideo.pipelines.media.media_info import DecodeError
from loomvideo.platform.shards.reader import ShardDataset

FRAMES = 8
HEIGHT = 144
_WIDEST = 2 * HEIGHT
ENCODED = "encoded"
"""Prefix of the roles whose strips are decoded from latents."""


@dataclass(frozen=True)
class Strip:
    """Frames side by side.

    Attributes:
        jpeg: The picture.
        frames: How many.
        width: Width of one in pixels.
        height: Height in pixels.
    """

    jpeg: bytes
    frames: int
    width: int
    height: int


def strip_of(frames: Sequence[np.ndarray]) -> Strip:
    """A strip of uint8 frames ``[height, width, 3]`` of one size."""
    from PIL import Image

    height, width = frames[0].shape[:2]
    scale = min(HEIGHT / height, _WIDEST / width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    shown = Image.new("RGB", (size[0] * len(frames), size[1]))
    for number, frame in enumerate(frames):
        shown.paste(Image.fromarray(frame).resize(size), (number * size[0], 0))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=80)
    return Strip(buffer.getvalue(), len(frames), *size)


def roles(row: GalleryRow) -> dict[str, str]:
    """``{role: media path}``: target, source, reference0, …"""
    named = {"target": row["target"], "source": row["source"]}
    named |= {f"reference{number}": path for number, path in enumerate(row["references"])}
    return {role: path for role, path in named.items() if path}


class Previews:
    """Strips of media files; one decoder process, not thread-safe.

    Args:
        base: Folder or URL that relative media paths start at.
        timeout_s: How long a file may take.
    """

    def __init__(self, base: str, timeout_s: float):
        self._base = base
        self._decoder = IsolatedDecoder(timeout_s)

    def close(self) -> None:
        """End the decoder."""
        self._decoder.close()

    def strip(self, path: str) -> Strip:
        """The strip of a media file, or of the part of it that the path names.

        Raises:
            DecodeError: with a reason code.
        """
        full = resolve(path, self._base)
        with local_copies([full]) as copies:
            info = self._decoder.probe(copies[full])
            wanted = sorted({round(i) for i in np.linspace(0, info.num_frames - 1, FRAMES)})
            chunks = list(self._decoder.read(copies[full], wanted))
        frames = [frame for chunk in chunks for frame in chunk]
        if not frames:
            raise DecodeError("no_frames", f"{path}: no frame in it")
        return strip_of(frames)


def report_codec(dataset: ShardDataset) -> Codec | None:
    """The codec that shows a dataset's latents, when it needs no weights."""
    name = dataset.manifest.config.get("model")
    if name is None or not model_size(name).codec.is_built_in:
        return None
    return build_codec(model_size(name).codec)


def encoded_strips(dataset: ShardDataset, row: int, codec: Codec) -> Iterator[tuple[str, Strip]]:
    """``(role, strip)`` of a written sample's latents: what training sees."""
    sample = dataset.read(row, select=_latents_of_first_window)
    for member in ("source", "target", "refs"):
        for number, latent in enumerate(sample.tensors.get(member, {}).values()):
            with torch.no_grad():
                video = codec.decode(latent[None].float())[0]
            chosen = sorted({round(i) for i in np.linspace(0, video.shape[1] - 1, FRAMES)})
            frames = (video[:, chosen] * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
            yield (
                ENCODED + (f"reference{number}" if member == "refs" else member),
                strip_of(list(frames.permute(1, 2, 3, 0).numpy())),
            )


def _latents_of_first_window(member: str, name: str) -> bool:
    return name == "mean.0" if member in ("target", "source") else member == "refs" and name.startswith("mean.")
