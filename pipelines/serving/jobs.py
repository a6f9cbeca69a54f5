"""Generations that people asked for: validated, queued, followed step by step, kept for a while."""

import asyncio
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from loomvideo.model.codec import LatentGrid
from loomvideo.model.tasks import requested_task
from loomvideo.pipelines.serving.uploads import Upload
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError

logger = logging.getLogger(__name__)
Status = Literal["queued", "running", "done", "failed", "cancelled"]
MENTION = re.compile(r"@image\s*(\d+)", re.IGNORECASE)


@dataclass
class RequestLimits:
    """What one request may ask for, and how many may wait."""

    max_prompt_characters: int = option(2000, "characters of a prompt at most")
    max_references: int = option(6, "reference pictures at most")
    max_steps: int = option(100, "denoising steps at most")
    max_frames: int = option(121, "frames at most")
    max_side: int = option(1472, "pixels of a side at most")
    max_pixels: int = option(960 * 960, "pixels of a frame at most")
    max_waiting: int = option(32, "requests that may wait")
    kept_results: int = option(200, "finished generations kept in memory")
    kept_bytes: int = option(2**30, "bytes of finished generations kept in memory, sources counted")
    kept_s: float = option(3600.0, "seconds that a finished generation is kept")


@dataclass(frozen=True)
class GenerationRequest:
    """One generation; unset numbers are the checkpoint's and the task's defaults."""

    task: str
    prompt: str
    negative_prompt: str | None = None
    source: Upload | None = None
    references: list[Upload] = field(default_factory=list)
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Progress:
    """Steps done of all."""

    step: int
    steps: int


@dataclass(frozen=True)
class Result:
    """A finished file."""

    content: bytes
    media_type: str


class Backend(Protocol):
    """What generates; the Ray Serve deployment, or a function in a test."""

    def __call__(self, request: GenerationRequest) -> AsyncIterator[Progress | Result]:
        """Progress while it runs, then one result; :class:`UserError` for what the user can change."""
        ...


def check_request(request: GenerationRequest, limits: RequestLimits, grid: LatentGrid | None = None) -> None:
    """Refuse what cannot be generated.

    Args:
        request: What is asked for.
        limits: What may be.
        grid: Which sizes the model can make; None leaves that to the generator.

    Raises:
        UserError: one line that says what to change.
    """
    task = requested_task(request.task, request.source.info.kind if request.source else None)
    if not request.prompt.strip():
        raise UserError("the prompt is empty: say what to make or change")
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt or "")):
        if len(text) > limits.max_prompt_characters:
            raise UserError(f"the {name} has {len(text)} characters: at most {limits.max_prompt_characters}")
    if task.needs_source != (request.source is not None):
        needs = "editing needs a source video or picture"
        raise UserError(needs if task.needs_source else "this task takes no source")
    if task.needs_references and not request.references:
        raise UserError("this task needs at least one reference picture")
    if not task.needs_references and request.references:
        raise UserError("this task takes no reference pictures")
    if len(request.references) > limits.max_references:
        raise UserError(f"{len(request.references)} reference pictures: at most {limits.max_references}")
    if any(reference.info.kind != "image" for reference in request.references):
        raise UserError("a reference is a video: references are pictures")
    for number in map(int, MENTION.findall(request.prompt)):
        if not 1 <= number <= len(request.references):
            raise UserError(f"the prompt mentions @Image {number}, but there are {len(request.references)} references")
    for name, value, most in (
        ("steps", request.steps, limits.max_steps),
        ("frames", request.num_frames, limits.max_frames),
    ):
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{name}={value}: choose 1 to {most}")
    width, height = request.width, request.height
    if (width is None) != (height is None):
        raise UserError("width and height: give both, or neither")
    if width is None or height is None:
        return
    for name, side in (("width", width), ("height", height)):
        if not 1 <= side <= limits.max_side:
            raise UserError(f"{name}={side}: choose 1 to {limits.max_side}")
    if width * height > limits.max_pixels:
        raise UserError(f"{width}x{height}: {width * height} pixels, at most {limits.max_pixels}")
    if grid is not None:
        grid.check_size("size", width, height)


@dataclass
class Job:
    """A request on its way; times are seconds since the epoch."""

    id: str
    request: GenerationRequest
    status: Status = "queued"
    step: int = 0
    steps: int = 0
    error: str = ""
    result: Result | None = None
    created_s: float = field(default_factory=time.time)
    started_s: float | None = None
    finished_s: float | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("done", "failed", "cancelled")

    @property
    def num_bytes(self) -> int:
        """Memory of its files."""
        files = [self.request.source, *self.request.references, self.result]
        return sum(len(file.content) for file in files if file is not None)


class JobQueue:
    """Hands every request to the backend at once and follows it; the backend's own queue decides the order.

    Used from one event loop.

    Args:
        backend: Generates; may take as many requests at a time as it likes.
        limits: On requests and on the queue.
        on_finished: Called with every job that ended, for metrics.
        grid: Which sizes the model can make; None leaves that to the generator.
    """

    def __init__(
        self, backend: Backend, limits: RequestLimits, on_finished=lambda job: None, grid: LatentGrid | None = None
    ):
        self._backend = backend
        self.limits = limits
        self._on_finished, self._grid = on_finished, grid
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._tasks: dict[str, asyncio.Task] = {}

    def submit(self, request: GenerationRequest) -> Job:
        """Queue a request.

        Raises:
            UserError: if it cannot be generated.
            asyncio.QueueFull: if too many wait.
        """
        check_request(request, self.limits, self._grid)
        if self.num_waiting >= self.limits.max_waiting:
            raise asyncio.QueueFull
        self._forget_old()
        job = Job(secrets.token_urlsafe(12), request)
        self._jobs[job.id] = job
        self._tasks[job.id] = asyncio.get_running_loop().create_task(self._follow(job))
        return job

    def get(self, job_id: str) -> Job | None:
        """A job by its id, None when unknown or forgotten."""
        return self._jobs.get(job_id)

    def cancel(self, job_id: str) -> None:
        """Stop a job and forget it, with its result."""
        task = self._tasks.pop(job_id, None)
        if task is not None:
            task.cancel()
        self._jobs.pop(job_id, None)

    def position(self, job: Job) -> int:
        """How many queued jobs are before this one."""
        return sum(other.status == "queued" and other.created_s < job.created_s for other in self._jobs.values())

    @property
    def num_waiting(self) -> int:
        """Jobs that have not started."""
        return sum(job.status == "queued" for job in self._jobs.values())

    @property
    def num_running(self) -> int:
        """Jobs that a replica works on."""
        return sum(job.status == "running" for job in self._jobs.values())

    async def _follow(self, job: Job) -> None:
        try:
            async for event in self._backend(job.request):
                if job.status == "queued":
                    job.status, job.started_s = "running", time.time()
                if isinstance(event, Progress):
                    job.step, job.steps = event.step, event.steps
                else:
                    job.result = event
            job.status, job.error = ("done", "") if job.result else ("failed", "the generator gave no result")
        except asyncio.CancelledError:
            job.status = "cancelled"
            raise
        except UserError as error:
            job.status, job.error = "failed", str(error)
        except Exception as error:
            logger.exception("generation %s failed", job.id)
            job.status, job.error = "failed", _one_line(error)
        finally:
            job.finished_s = time.time()
            self._tasks.pop(job.id, None)
            self._on_finished(job)

    def _forget_old(self) -> None:
        oldest, limits = time.time() - self.limits.kept_s, self.limits
        finished = [job for job in self._jobs.values() if job.finished]
        kept_bytes = sum(job.num_bytes for job in finished)
        for index, job in enumerate(finished):
            surplus = len(finished) - index > limits.kept_results or kept_bytes > limits.kept_bytes
            if surplus or job.finished_s < oldest:
                kept_bytes -= job.num_bytes
                del self._jobs[job.id]


def _one_line(error: Exception) -> str:
    """What the page says of an error; details go to the log only."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError):
        return str(cause)
    if type(cause).__name__ in ("OutOfMemoryError", "MemoryError"):
        return "out of memory: choose a smaller size or fewer frames"
    return f"the generation failed ({type(cause).__name__}); the server's log says why"
