"""One generation from files to a file: read source and references, run the pipeline, write the result and its facts."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loomvideo.model.buckets import choose_bucket, resize_and_crop
from loomvideo.model.clips import TARGET_FPS, clip_indices, whole_latent_frames
from loomvideo.model.guidance import Guidance
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.pipelines.decode import DecodeError, MediaInfo
from loomvideo.pipelines.decode_process import IsolatedDecoder
from loomvideo.pipelines.evaluation.media import write_video
from loomvideo.platform.errors import UserError

TASKS = ("t2i", "t2v", "edit", "image_edit", "video_edit", "ref_edit", "mi2v")
NEEDS_SOURCE = ("edit", "image_edit", "video_edit", "ref_edit")
NEEDS_REFERENCES = ("ref_edit", "mi2v")
IMAGE_SUFFIXES, VIDEO_SUFFIXES = (".png", ".webp"), (".mp4",)
MAX_REFERENCES = 6
MAX_PROMPT_CHARACTERS = 4000
MAX_SIDE = 4096


@dataclass(frozen=True)
class Request:
    """What to generate."""

    task: str
    prompt: str
    out: str
    source: str = ""
    refs: list[str] = field(default_factory=list)
    negative_prompt: str = ""
    seed: int = 0

    def check(self) -> None:
        """Check everything that needs no file.

        Raises:
            UserError: naming the key and the fix.
        """
        if self.task not in TASKS:
            raise UserError(f"task={self.task}: choose one of {', '.join(TASKS)}")
        if not self.prompt.strip():
            raise UserError("prompt: must not be empty")
        if len(self.prompt) > MAX_PROMPT_CHARACTERS:
            raise UserError(f"prompt: {len(self.prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are accepted")
        if (self.task in NEEDS_SOURCE) != bool(self.source):
            raise UserError(f"task={self.task}: {'set source=' if self.task in NEEDS_SOURCE else 'takes no source'}")
        if (self.task in NEEDS_REFERENCES) != bool(self.refs):
            raise UserError(f"task={self.task}: {'set refs=[…]' if not self.refs else 'takes no refs'}")
        if len(self.refs) > MAX_REFERENCES:
            raise UserError(f"refs: {len(self.refs)} references, at most {MAX_REFERENCES} are accepted")
        if Path(self.out).suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            raise UserError(f"out={self.out}: name a {', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)} file")


@dataclass(frozen=True)
class Settings:
    """How to generate; zero and None take the task's or the source's own."""

    buckets: tuple[int, ...] = (640,)
    width: int = 0
    height: int = 0
    num_frames: int = 97
    default_size: tuple[int, int] = (832, 480)
    steps: int = 50
    scale: float | None = None
    visual_scale: float | None = None
    batch_branches: bool = False

    def guidance(self, task: str) -> Guidance:
        """The task's guidance with what was set."""
        default = Guidance.default(task)
        visual = default.visual_scale
        if visual is not None and self.visual_scale is not None:
            visual = self.visual_scale
        return Guidance(default.scale if self.scale is None else self.scale, visual)


class FileGenerator:
    """Generates files with a loaded pipeline; media are decoded in a process of their own."""

    def __init__(self, pipeline: LoomVideoPipeline, settings: Settings, checkpoint: dict[str, Any]):
        self.pipeline, self.settings, self.checkpoint = pipeline, settings, checkpoint
        self.decoder = IsolatedDecoder()

    def close(self) -> None:
        """End the decoder process."""
        self.decoder.close()

    def facts(self, request: Request) -> dict[str, Any]:
        """What determines the result: request, settings, checkpoint and the content of its files."""
        files = {path: _content_hash(path) for path in [request.source, *request.refs] if path}
        return {**asdict(request), "settings": asdict(self.settings), "checkpoint": self.checkpoint, "inputs": files}

    def is_done(self, request: Request) -> bool:
        """Whether the file is there and was made from exactly this."""
        sidecar = sidecar_path(request.out)
        if not (Path(request.out).is_file() and sidecar.is_file()):
            return False
        return json.loads(sidecar.read_text())["digest"] == _digest(self.facts(request))

    def generate(self, request: Request, on_step: Callable[[int, int], None] | None = None) -> Path:
        """Generate one file and the JSON of its facts beside it.

        Raises:
            UserError: for a file that cannot be used or a size that cannot be made.
        """
        request.check()
        settings = self.settings
        source_info = self._probe("source", request.source) if request.source else None
        task = _resolved_task(request.task, source_info)
        is_image = task in ("t2i", "image_edit")
        accepted = IMAGE_SUFFIXES if is_image else VIDEO_SUFFIXES
        if Path(request.out).suffix.lower() not in accepted:
            made = "a picture" if is_image else "a video"
            raise UserError(f"out={request.out}: {task} makes {made}, name a {' or '.join(accepted)} file")
        source = self._clip(request.source, source_info, task) if source_info else None
        references = [self._picture(path) for path in request.refs]
        size = (
            None
            if source is not None
            else (settings.width or settings.default_size[0], settings.height or settings.default_size[1])
        )
        num_frames = 1 if is_image else whole_latent_frames(settings.num_frames)
        conditions = self.pipeline.encode(
            task, request.prompt, source, references, size, num_frames, request.negative_prompt
        )
        frames = self.pipeline.denoise(
            conditions,
            settings.steps,
            settings.guidance(task),
            request.seed,
            settings.batch_branches,
            on_step=(lambda step, _: on_step(step + 1, settings.steps)) if on_step else None,
        )
        facts = self.facts(request)
        facts |= {
            "digest": _digest(facts),
            "task": task,
            "num_frames": len(frames),
            "size": [frames.shape[2], frames.shape[1]],
        }
        write_result(Path(request.out), frames, facts)
        return Path(request.out)

    def _probe(self, key: str, path: str) -> MediaInfo:
        try:
            info = self.decoder.probe(path, TARGET_FPS)
        except DecodeError as error:
            raise UserError(f"{key}={path}: {error}") from error
        if max(info.width, info.height) > MAX_SIDE:
            raise UserError(
                f"{key}={path}: {info.width}x{info.height} pixels, sides of at most {MAX_SIDE} are accepted"
            )
        if info.num_frames < 1:
            raise UserError(f"{key}={path}: has no frames")
        return info

    def _clip(self, path: str, info: MediaInfo, task: str) -> np.ndarray:
        """Frames of the source at the published rate, brought to its bucket."""
        if task == "image_edit":
            indices = [0]
        else:
            wanted = min(self.settings.num_frames, info.num_frames)
            indices = clip_indices(info.fps or TARGET_FPS, info.num_frames, wanted, 0.0)
            indices = indices[: whole_latent_frames(len(indices))]
        kind = "image" if task == "image_edit" else "video"
        if bool(self.settings.width) != bool(self.settings.height):
            raise UserError("width and height: set both, or neither to keep the source's shape")
        bucket = (self.settings.width, self.settings.height)
        if not self.settings.width:
            bucket = choose_bucket(info.width, info.height, self.settings.buckets, kind)
        return resize_and_crop(torch.from_numpy(self._read("source", path, indices)), bucket).numpy()

    def _picture(self, path: str) -> np.ndarray:
        info = self._probe("refs", path)
        bucket = choose_bucket(info.width, info.height, self.settings.buckets, "image")
        return resize_and_crop(torch.from_numpy(self._read("refs", path, [0])), bucket).numpy()[0]

    def _read(self, key: str, path: str, indices: list[int]) -> np.ndarray:
        try:
            return np.concatenate(list(self.decoder.read(path, indices, TARGET_FPS)))
        except DecodeError as error:
            raise UserError(f"{key}={path}: {error}") from error


def _resolved_task(task: str, source: MediaInfo | None) -> str:
    """``edit`` is an image or a video edit by what the source is."""
    if source is None:
        return task
    if task == "edit":
        return "image_edit" if source.kind == "image" else "video_edit"
    if task == "video_edit" and source.kind == "image":
        raise UserError("task=video_edit: the source is a picture; use task=edit or task=image_edit")
    return task


def write_result(path: Path, frames: np.ndarray, facts: dict[str, Any]) -> None:
    """Write frames as mp4, png or webp with the facts embedded, and as JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        write_video(path, frames, TARGET_FPS, metadata={"comment": text, "title": facts["prompt"]})
    else:
        partial = path.with_name(f".{path.stem}.tmp{path.suffix}")
        picture = Image.fromarray(frames[0])
        if path.suffix.lower() == ".png":
            info = PngInfo()
            info.add_itxt("loomvideo", text)
            picture.save(partial, pnginfo=info)
        else:
            exif = Image.Exif()
            exif[0x010E] = text  # ImageDescription
            picture.save(partial, lossless=True, exif=exif)
        partial.replace(path)
    sidecar = sidecar_path(str(path))
    partial = sidecar.with_name(f".{sidecar.name}.tmp")
    partial.write_text(json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    partial.replace(sidecar)


def sidecar_path(out: str) -> Path:
    """Where the facts of a result are: ``result.mp4.json``."""
    return Path(out + ".json")


def read_requests(path: Path) -> Iterator[Request]:
    """Requests of a JSONL file, one object a line; paths are relative to the file.

    Raises:
        UserError: naming the file, the line and the field.
    """
    if not path.is_file():
        raise UserError(f"batch={path}: no such file")
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
            request = Request(**values)
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{where}: {error}; fields are {', '.join(Request.__dataclass_fields__)}") from error
        request = Request(
            **{
                **asdict(request),
                "out": str(path.parent / request.out),
                "source": str(path.parent / request.source) if request.source else "",
                "refs": [str(path.parent / ref) for ref in request.refs],
            }
        )
        try:
            request.check()
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if request.out in seen:
            raise UserError(f"{where}: out={request.out} is named twice")
        seen.add(request.out)
        yield request


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _content_hash(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
