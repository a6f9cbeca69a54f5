"""What a judge is shown: a rubric, and the same explicitly sampled frames whoever the judge is.

Providers sample videos differently (one frame a second, two, all). So frames are chosen here: sent as labelled
pictures, or as a film that plays exactly these frames at one a second.
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

from loomvideo.pipelines.evaluation.media import strip_frames, write_video


@dataclass(frozen=True)
class FrameSampling:
    """How frames are chosen and sized for every judge alike.

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
class Media:
    """One labelled input of a judge.

    Attributes:
        label: What it is, in words the judge reads.
        frames: JPEG bytes of each frame.
        film: The frames as mp4 at one a second, when films are sent.
        digest: Hash of what is sent.
    """

    label: str
    frames: tuple[bytes, ...]
    film: bytes | None
    digest: str


@dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge.

    Attributes:
        text: The rubric with the sample's instruction filled in.
        media: Inputs in the order shown.
        axes: Names of the scores asked for.
        structured: Whether the answer must be JSON with ``axes`` and ``reasoning``.
        repeat: Which of k independent repeats this is.
        ask: 1 when an unreadable answer is asked for again.
    """

    text: str
    media: tuple[Media, ...]
    axes: tuple[str, ...]
    structured: bool = True
    repeat: int = 0
    ask: int = 0

    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer."""
        properties: dict[str, Any] = {"reasoning": {"type": "string"}}
        properties |= {axis: {"type": "integer", "enum": [1, 2, 3, 4, 5]} for axis in self.axes}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def key(self, judge: dict[str, Any]) -> str:
        """Cache key: everything that can change the answer, media by content."""
        own = [self.text, self.axes, self.structured, self.repeat, self.ask]
        content = {"request": own, "media": [(m.label, m.digest) for m in self.media], "judge": judge}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def estimated_tokens(self, tokens_per_frame: int = 258) -> int:
        """Input tokens to expect: a quarter of the characters and a fixed price a frame."""
        return len(self.text) // 4 + tokens_per_frame * sum(len(m.frames) for m in self.media)


def encode_media(label: str, video: np.ndarray, sampling: FrameSampling) -> Media:
    """Sample, shrink and encode a video or picture ``[frames, height, width, 3]`` for a judge."""
    chosen = strip_frames(video, sampling.num_frames)
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
    return Media(label, frames, film, digest.hexdigest())


def decode_frames(media: Media) -> np.ndarray:
    """The frames of a request as ``[frames, height, width, 3]``."""
    return np.stack([np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")) for frame in media.frames])


def media_for_item(
    sampling: FrameSampling,
    result: np.ndarray,
    source: np.ndarray | None,
    references: Sequence[np.ndarray],
) -> tuple[Media, ...]:
    """The inputs of one sample in a fixed order: source, references, result."""
    media = []
    if source is not None:
        media.append(encode_media("Before editing", source, sampling))
    for number, reference in enumerate(references, 1):
        media.append(encode_media(f"Reference picture {number}", reference, sampling))
    label = "After editing" if source is not None else "Generated result"
    return (*media, encode_media(label, result, sampling))


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
