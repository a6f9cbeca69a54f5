"""How much memory requests will need, before their files are read."""

import math
from collections.abc import Sequence

from loomvideo.model.buckets import choose_bucket
from loomvideo.model.peaks import Work, activations_of_denoising, conditions_bytes
from loomvideo.model.sizes import ModelSize
from loomvideo.model.tasks import requested_task
from loomvideo.pipelines.generation.requests import Request
from loomvideo.pipelines.generation.settings import Settings

_HUGE = 1 << 16
_UNKNOWN = Request("ref_edit", "any", "any.mp4", "any", ["any"])


def largest_work(size: ModelSize, settings: Settings, requests: Sequence[Request] = ()) -> Work:
    """The request that needs most memory; sources and references count with the largest of their buckets.

    Args:
        size: The size of the model.
        settings: How files are generated.
        requests: What is asked for; none stands for an edit of a video with a reference.
    """
    works = [_work(settings, request) for request in requests or [_UNKNOWN]]
    return max(works, key=lambda work: activations_of_denoising(size, work) + conditions_bytes(size, work))


def _work(settings: Settings, request: Request) -> Work:
    task = requested_task(request.task)
    stated = settings.width and settings.height
    # The square bucket of the largest class has the most pixels, to a few percent.
    largest = choose_bucket(_HUGE, _HUGE, settings.buckets, task.makes)
    width, height = largest if task.needs_source and not stated else settings.size()
    pixels = math.prod(choose_bucket(_HUGE, _HUGE, settings.buckets, "image"))
    num_frames = 1 if task.is_image else settings.num_frames
    return Work(task.name, width, height, num_frames, (pixels,) * len(request.refs))
