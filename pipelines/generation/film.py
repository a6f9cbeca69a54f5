"""A whole video edited to a file that plays like its source: as long, as large, at its rate, with its sound."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from torch import Tensor

from loomvideo.model.buckets import choose_bucket
from loomvideo.model.clips import TARGET_FPS
from loomvideo.model.conditions import Conditions
from loomvideo.model.film import edit_film, film_windows
from loomvideo.model.sampler import Anchor
from loomvideo.model.tasks import requested_task
from loomvideo.pipelines.generation.requests import VIDEO_SUFFIXES, Request
from loomvideo.pipelines.generation.results import digest, write_result
from loomvideo.pipelines.media.sound import ColourTags, add_sound, colour_tags
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from loomvideo.pipelines.generation.generator import FileGenerator


def edit_whole(generator: "FileGenerator", request: Request, on_step: Callable[[int, int], None] | None = None) -> Path:
    """Edit a video of any length within the memory of one window.

    Its frames are scaled to the bucket's size and back, nothing is cropped, and none is left out: the model sees them
    at the source's own rate.

    Args:
        generator: The model with its settings; ``num_frames`` and ``overlap`` are the windows'.
        request: An edit of a video.
        on_step: Called after each step with the steps done and all.

    Raises:
        UserError: for a request that edits no video, a file that cannot be used, or too little memory.
    """
    request.check()
    settings, pipeline, out = generator.settings, generator.pipeline, Path(request.out)
    settings.check()
    info = generator.probe("source", request.source) if request.source else None
    task = requested_task(request.task, info.kind if info else None)
    if info is None or task.source != "video":
        raise UserError(f"whole=true: edits videos, task={request.task} here makes something else; set whole=false")
    if out.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"out={request.out}: {task.name} makes a video, name a {' or '.join(VIDEO_SUFFIXES)} file")
    if settings.shortcuts.alone() and settings.shortcuts.fp8:
        raise UserError("whole=true: shortcuts.fp8 is not for whole films; leave it out")
    size = (settings.width, settings.height) if settings.width and settings.height else None
    size = size or choose_bucket(info.width, info.height, settings.buckets, "video")
    windows = film_windows(info.num_frames, settings.num_frames, settings.overlap, pipeline.grid)
    references = [generator.picture(path) for path in request.refs]
    negative = settings.negative_prompt if request.negative_prompt is None else request.negative_prompt
    steps = pipeline.num_steps(settings.shortcuts.steps or settings.steps)
    done = 0

    def read(start: int, stop: int) -> np.ndarray:
        return _scaled(generator.read("source", request.source, range(start, stop)).numpy(), size)

    def encode(source: np.ndarray) -> Conditions:
        return pipeline.encode(task.name, request.prompt, source, references, negative_prompt=negative)

    def sample(conditions: Conditions, noise: Tensor, anchor: Anchor | None) -> Tensor:
        nonlocal done

        def count(step: int, latents: Tensor) -> None:
            if on_step:
                on_step(done + step + 1, steps * len(windows))

        latents = pipeline.sample(
            conditions, settings.steps, settings.guidance(task.name), batch_branches=settings.batch_branches,
            on_step=count, shortcuts=settings.shortcuts, noise=noise, anchor=anchor,
        )  # fmt: skip
        done += steps
        return latents

    def frames() -> Iterator[np.ndarray]:
        for piece in edit_film(pipeline, read, info.num_frames, windows, encode, sample, request.seed):
            yield _scaled(piece, (info.width, info.height))

    facts = generator.facts(request)
    stated = {
        "digest": digest(facts),
        "task": task.name,
        "num_frames": info.num_frames,
        "size": [info.width, info.height],
        "windows": len(windows),
    }
    tags = colour_tags(request.source) if Path(request.source).is_file() else ColourTags()
    with generator.memory_errors(request):
        write_result(
            out, frames(), {**facts, **stated}, info.fps or TARGET_FPS, tags,
            lambda made: add_sound(made, request.source),
        )  # fmt: skip
    return out


def _scaled(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames at another size, uint8 [frames, height, width, 3]; averaged where they get smaller."""
    if (frames.shape[2], frames.shape[1]) == size:
        return frames
    way = cv2.INTER_AREA if size[0] * size[1] < frames.shape[1] * frames.shape[2] else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, size, interpolation=way) for frame in frames])
