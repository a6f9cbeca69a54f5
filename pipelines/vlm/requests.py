"""What a vision-language model is shown: words and labelled media in a fixed order.

Providers sample videos differently (one frame a second, two, all). So frames are chosen here: sent as labelled
pictures, or as a film that plays exactly these frames at one a second. Protocols of public benchmarks that send whole
files say so themselves.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from loomvideo.pipelines.media.decode import open_media
from loomvideo.pipelines.media.video_writer import write_video


@dataclass(frozen=True)
class FrameSampling:
    """How frames are chosen and sized for every model alike.

    Attributes:
        num_frames: Frames of a video, spread from the first to the last.
        max_side: Longest side in pixels; larger frames shrink.
        quality: JPEG quality.
        as_video: Send one film at a frame a second instead of separate pictures.
    """

    num_frames: int = 8
    max_side: int = 768
    quality: int = 92
    as_video: bool = False


@dataclass(frozen=True)
class VLMMedia:
    """One input of a model.

    Attributes:
        label: What it is, for people and stand-in models; what the model reads stands in the request's parts.
        frames: Bytes of each picture; of a film the frames it shows, as far as they are known.
        film: The video file sent instead of the frames, where one is.
        digest: Hash of what is sent.
        mime: Form of the frames.
        billed_frames: Frames that a provider is taken to bill; 0 for those listed.
    """

    label: str
    frames: tuple[bytes, ...]
    film: bytes | None
    digest: str
    mime: str = "image/jpeg"
    billed_frames: int = 0


@dataclass(frozen=True)
class VLMRequest:
    """One question.

    Attributes:
        parts: Words and media in the order the model reads them.
        axes: Names of the fields asked for.
        structured: Whether the answer must be JSON by :meth:`schema`.
        system: System instruction; empty for none.
        repeat: Which of k independent repeats this is.
        ask: 1 when an unreadable answer is asked for again.
        choices: What every field may be.
    """

    parts: tuple[str | VLMMedia, ...]
    axes: tuple[str, ...] = ()
    structured: bool = True
    system: str = ""
    repeat: int = 0
    ask: int = 0
    choices: tuple[int, ...] | tuple[str, ...] = (1, 2, 3, 4, 5)

    @property
    def media(self) -> tuple[VLMMedia, ...]:
        """The media among the parts."""
        return tuple(part for part in self.parts if isinstance(part, VLMMedia))

    @property
    def text(self) -> str:
        """All words, the system instruction first."""
        return "\n".join([self.system] * bool(self.system) + [part for part in self.parts if isinstance(part, str)])

    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer."""
        properties: dict[str, Any] = {"reasoning": {"type": "string"}}
        kind = "integer" if isinstance(self.choices[0], int) else "string"
        properties |= {axis: {"type": kind, "enum": list(self.choices)} for axis in self.axes}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def key(self, identity: dict[str, Any]) -> str:
        """Cache key: everything that can change the answer, media by content."""
        parts = [["media", p.label, p.digest] if isinstance(p, VLMMedia) else p for p in self.parts]
        own = [self.system, self.axes, self.structured, self.repeat, self.ask]
        content = {"parts": parts, "request": own, "schema": self.schema(), "model": identity}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def estimated_tokens(self, tokens_per_frame: int = 258) -> int:
        """Input tokens to expect: a quarter of the characters and a fixed price a frame."""
        return len(self.text) // 4 + tokens_per_frame * sum(m.billed_frames or len(m.frames) for m in self.media)


def labelled(text: str, media: Sequence[VLMMedia]) -> tuple[str | VLMMedia, ...]:
    """Parts of a request: the question, then each medium under its label."""
    parts: list[str | VLMMedia] = [text]
    for medium in media:
        parts += [f"{medium.label}:", medium]
    return tuple(parts)


def encode_media(label: str, video: np.ndarray, sampling: FrameSampling) -> VLMMedia:
    """Sample, shrink and encode a video or picture ``[frames, height, width, 3]``."""
    chosen = spread_frames(video, sampling.num_frames)
    pictures = [_shrunk(Image.fromarray(frame), sampling.max_side) for frame in chosen]
    frames = tuple(_jpeg(picture, sampling.quality) for picture in pictures)
    film = None
    if sampling.as_video and len(pictures) > 1:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "film.mp4"
            write_video(path, np.stack([np.asarray(p) for p in pictures]), fps=1.0)
            film = path.read_bytes()
    # The frames' pixels decide, so that the key is stable when an encoder's bytes are not.
    digest = hashlib.sha256(repr((dataclasses.astuple(sampling), len(pictures))).encode())
    for picture in pictures:
        digest.update(np.asarray(picture).tobytes())
        digest.update(repr(picture.size).encode())
    return VLMMedia(label, frames, film, digest.hexdigest())


def decode_frames(media: VLMMedia) -> np.ndarray:
    """The frames of a request as ``[frames, height, width, 3]``; of a film sent whole, one a second and the last."""
    if not media.frames and media.film is not None:
        return _film_frames(media.film)
    return np.stack([np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")) for frame in media.frames])


def _film_frames(film: bytes) -> np.ndarray:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        path.write_bytes(film)
        opened = open_media(str(path))
        last = opened.info.num_frames - 1
        seconds = range(int(last / opened.info.fps) + 1)
        indices = sorted({min(last, round(second * opened.info.fps)) for second in seconds} | {last})
        return np.concatenate(list(opened.read(indices)))


def spread_frames(video: np.ndarray, count: int) -> np.ndarray:
    """``count`` frames spread evenly from the first to the last (all frames of a shorter video)."""
    if video.ndim != 4 or not len(video):
        raise ValueError(f"expected [frames, height, width, 3], got {list(video.shape)}")
    count = min(count, len(video))
    return video[np.linspace(0, len(video) - 1, count).round().astype(int)]


def _shrunk(picture: Image.Image, max_side: int) -> Image.Image:
    scale = max_side / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
