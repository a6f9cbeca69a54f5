"""Requests of the page as generations of files: uploads written to a temporary folder, the result read back."""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from loomvideo.model.loading import ModelSource, fitted
from loomvideo.model.tasks import requested_task
from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.memory import largest_work
from loomvideo.pipelines.generation.requests import Request
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.serving.jobs import Result
from loomvideo.pipelines.serving.requests import MENTION, GenerationRequest, RequestLimits
from loomvideo.pipelines.serving.uploads import Upload
from loomvideo.platform.errors import UserError


class PageGenerator:
    """A loaded model behind the page: the generator of files, with the settings that each request asks for.

    Args:
        generator: Its settings are what a request that does not say gets.
    """

    def __init__(self, generator: FileGenerator):
        self._generator, self._settings = generator, generator.settings

    @classmethod
    def load(cls, source: ModelSource, settings: Settings, limits: RequestLimits | None = None) -> "PageGenerator":
        """Load a checkpoint onto the GPU, or the CPU where there is none.

        Args:
            source: What to load; ``memory=auto`` is decided for the largest request that the limits allow.
            settings: What a request that does not say gets.
            limits: Limits on requests; None for the usual ones.
        """
        limits, size = limits or RequestLimits(), source.size
        side = math.isqrt(limits.max_pixels)
        frames = size.grid.whole_frames(limits.max_frames)
        largest = dataclasses.replace(settings, num_frames=frames, width=side, height=side)
        return cls(FileGenerator.load(fitted(source, largest_work(size, largest)), settings))

    def generate(self, request: GenerationRequest, on_step: Callable[[int, int], None]) -> Result:
        """Generate one file: PNG for a picture, MP4 for a video.

        Raises:
            UserError: if a size or a length is none the model can make, or a file cannot be decoded.
        """
        self._generator.settings = dataclasses.replace(
            self._settings,
            width=request.width or 0,
            height=request.height or 0,
            num_frames=self._generator.pipeline.grid.whole_frames(request.num_frames or self._settings.num_frames),
            whole=request.whole or self._settings.whole,
            steps=request.steps or self._settings.steps,
            scale=self._settings.scale if request.guidance_scale is None else request.guidance_scale,
        )
        task = requested_task(request.task, request.source.info.kind if request.source else None)
        name, media_type = ("result.png", "image/png") if task.is_image else ("result.mp4", "video/mp4")
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
