"""A whole video edited in windows, to a file that plays like its source."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from loomvideo.model.conditions import Conditions
from loomvideo.model.film import edit_film, film_windows
from loomvideo.model.sampler import Anchor
from loomvideo.model.tasks import Task
from loomvideo.pipelines.generation.playback import Playback
from loomvideo.pipelines.generation.requests import Request
from loomvideo.pipelines.generation.results import digest, write_result
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from loomvideo.pipelines.generation.generator import FileGenerator


def edit_whole(
    generator: "FileGenerator",
    request: Request,
    task: Task,
    playback: Playback,
    on_step: Callable[[int, int], None] | None = None,
) -> Path:
    """Edit a video of any length within the memory of one window.

    Args:
        generator: The model with its settings; ``num_frames`` and ``overlap`` are the windows'.
        request: An edit of a video.
        task: Its task.
        playback: How it plays.
        on_step: Called after each step with the steps done and all.

    Raises:
        UserError: for a file that cannot be used, settings that are not for films, or too little memory.
    """
    settings, pipeline = generator.settings, generator.pipeline
    if settings.shortcuts.alone() and settings.shortcuts.fp8:
        raise UserError("whole=true: shortcuts.fp8 is not for whole films; leave it out")
    total = playback.num_frames
    windows = film_windows(total, settings.num_frames, settings.overlap, pipeline.grid)
    references = [generator.picture(path) for path in request.refs]
    negative = settings.negative_prompt if request.negative_prompt is None else request.negative_prompt
    steps = pipeline.num_steps(settings.shortcuts.steps or settings.steps)
    guidance = settings.guidance(pipeline.default_guidance(task.name))
    done = 0

    def read(start: int, stop: int) -> np.ndarray:
        return generator.read("source", request.source, playback.indices(start, stop), playback.fit)

    def encode(source: np.ndarray) -> Conditions:
        return pipeline.encode(task.name, request.prompt, source, references, negative_prompt=negative)

    def sample(conditions: Conditions, noise: Tensor, anchor: Anchor | None) -> Tensor:
        nonlocal done

        def count(step: int, latents: Tensor) -> None:
            if on_step:
                on_step(done + step + 1, steps * len(windows))

        latents = pipeline.sample(
            conditions, settings.steps, guidance, batch_branches=settings.batch_branches,
            on_step=count, shortcuts=settings.shortcuts, noise=noise, anchor=anchor,
        )  # fmt: skip
        done += steps
        return latents

    facts = generator.facts(request)
    stated = {
        "digest": digest(facts),
        "task": task.name,
        "num_frames": total,
        "size": list(playback.size),
        "windows": len(windows),
    }
    made = edit_film(pipeline, read, total, windows, encode, sample, request.seed)
    with generator.memory_errors(request):
        write_result(
            Path(request.out), playback.shown(made, total), {**facts, **stated}, playback.fps, playback.colours(),
            playback.add_sound,
        )  # fmt: skip
    return Path(request.out)
