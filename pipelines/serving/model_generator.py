"""Requests of the page as generations of files: uploads written to a temporary folder, the result read back."""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loomvideo.model.fingerprints import folder_fingerprint
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.pipelines.generation import FileGenerator, Request, Settings
from loomvideo.pipelines.serving.jobs import MENTION, GenerationRequest, Result
from loomvideo.pipelines.serving.uploads import Upload
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclass
class GenerationDefaults:
    """What a request that does not say gets."""

    buckets: list[int] = option([640], "resolution classes for sources and references")
    width: int = option(832, "width of what is made from words or references")
    height: int = option(480, "height of it")
    num_frames: int = option(97, "frames of a video, at most the source's; 4k+1")
    steps: int = option(50, "denoising steps")
    scale: float | None = option(None, "guidance scale; null takes the task's (2.5 for edits, 5 otherwise)")
    visual_scale: float | None = option(None, "guidance scale of media; null takes 1.5")
    batch_branches: bool = option(False, "run the guidance branches in one pass: faster for small videos, more memory")


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint and what its preset needs."""

    weights: str
    preset: str
    codec_folder: str = ""
    mllm_folder: str = ""


class PipelineGenerator:
    """A loaded model behind the page."""

    def __init__(self, pipeline: LoomVideoPipeline, defaults: GenerationDefaults, checkpoint: dict[str, str]):
        self.defaults = defaults
        settings = Settings(
            buckets=tuple(defaults.buckets),
            num_frames=defaults.num_frames,
            default_size=(defaults.width, defaults.height),
            steps=defaults.steps,
            scale=defaults.scale,
            visual_scale=defaults.visual_scale,
            batch_branches=defaults.batch_branches,
        )
        self._generator = FileGenerator(pipeline, settings, checkpoint)
        self._settings = settings

    @classmethod
    def load(cls, source: ModelSource, defaults: GenerationDefaults) -> "PipelineGenerator":
        """Load a checkpoint onto the GPU, or the CPU where there is none."""
        pipeline = LoomVideoPipeline.from_pretrained(
            source.weights, source.preset, source.codec_folder, source.mllm_folder
        )
        weights = Path(source.weights)
        fingerprint = folder_fingerprint(weights if weights.is_dir() else weights.parent)
        return cls(pipeline, defaults, {"name": weights.name, "fingerprint": fingerprint, "model": source.preset})

    def generate(self, request: GenerationRequest, on_step: Callable[[int, int], None]) -> Result:
        """Generate one file: PNG for a picture, MP4 for a video.

        Raises:
            UserError: if a size or a length is none the model can make, or a file cannot be decoded.
        """
        self._generator.settings = dataclasses.replace(
            self._settings,
            width=request.width or 0,
            height=request.height or 0,
            num_frames=request.num_frames or self._settings.num_frames,
            steps=request.steps or self._settings.steps,
            scale=self._settings.scale if request.guidance_scale is None else request.guidance_scale,
        )
        makes_picture = request.task == "t2i" or (request.task == "edit" and request.source.info.kind == "image")
        name, media_type = ("result.png", "image/png") if makes_picture else ("result.mp4", "video/mp4")
        with tempfile.TemporaryDirectory(prefix="loomvideo-generation-") as folder:
            files = Request(
                request.task,
                _spoken(request.prompt),
                str(Path(folder) / name),
                _write(request.source, folder, "source") if request.source else "",
                [_write(upload, folder, f"reference-{i}") for i, upload in enumerate(request.references, 1)],
                request.negative_prompt,
                request.seed,
            )
            try:
                content = self._generator.generate(files, on_step).read_bytes()
            except UserError as error:
                raise UserError(str(error).replace(f"{folder}/", "")) from error
        return Result(content, media_type)

    def close(self) -> None:
        """End the decoder process."""
        self._generator.close()


def _write(upload: Upload, folder: str, name: str) -> str:
    path = Path(folder) / name
    path.write_bytes(upload.content)
    return str(path)


def _spoken(prompt: str) -> str:
    """``@Image 2`` as the words for the second reference, in the order in which the MLLM sees them."""
    return MENTION.sub(r"reference image \1", prompt)
