"""Generations that people asked for: queued, followed step by step, and kept so that a restart loses none."""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from loomvideo.model.codec import LatentGrid
from loomvideo.pipelines.serving.requests import GenerationRequest, RequestLimits, check_request
from loomvideo.platform.errors import UserError, full_disk_behind

if TYPE_CHECKING:
    from loomvideo.pipelines.serving.store import ServiceStore

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Status = Literal["queued", "running", "done", "failed", "cancelled"]
UNFINISHED = ("queued", "running")
STORE_PAUSE_S = 1.0
"""Between two questions to a store that is away."""


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


class StoreFullError(UserError):
    """The disk under the store is full."""


class StoreAwayError(UserError):
    """The database of the store does not answer."""


class QuotaReachedError(UserError):
    """A person has asked for all that they may for now.

    Attributes:
        retry_after_s: Seconds after which it is worth trying again.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass
class Job:
    """A request on its way; times are seconds since the epoch."""

    id: str
    request: GenerationRequest
    owner: str = ""
    asked_as: str | None = None
    """What its owner calls it: asking again under that name gives the same job."""
    status: Status = "queued"
    step: int = 0
    steps: int = 0
    error: str = ""
    media_type: str | None = None
    """Of the result, once there is one."""
    attempts: int = 0
    """How often a generator began it."""
    created_s: float = field(default_factory=time.time)
    started_s: float | None = None
    finished_s: float | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.status not in UNFINISHED


class JobQueue:
    """Hands every request to the backend at once and follows it; the backend's own queue decides the order.

    A job is in the store before its sender hears of it, and leaves it unfinished only when the server stops: the next
    one begins it again. Used from one event loop.

    Args:
        backend: Generates; may take as many requests at a time as it likes.
        limits: Limits on requests and on the queue.
        store: Keeps jobs, their files and results.
        on_finished: Called with every job that ended, for metrics.
        grid: Which sizes the model can make; None leaves that to the generator.
    """

    def __init__(
        self,
        backend: Backend,
        limits: RequestLimits,
        store: "ServiceStore",
        on_finished: Callable[[Job], None] = lambda job: None,
        grid: LatentGrid | None = None,
    ) -> None:
        self._backend = backend
        self.limits, self.store = limits, store
        self._on_finished, self._grid = on_finished, grid
        self._active: OrderedDict[str, Job] = OrderedDict()
        self._tasks: dict[str, asyncio.Task] = {}
        self.draining = False

    def resume(self) -> int:
        """Begin again what a server left unfinished, oldest first; returns how many."""
        jobs = self.store.unfinished()
        for job in jobs:
            if job.attempts < self.limits.max_attempts:
                job.status, job.started_s = "queued", None
                deadline_s = job.request.deadline_s
                self._begin(job, None if deadline_s is None else job.created_s + deadline_s - time.time())
            else:
                message = f"the server stopped {job.attempts} times while it ran"
                self.store.finish(job, "failed", message)
        return len(jobs)

    def submit(
        self,
        request: GenerationRequest,
        owner: str = "",
        quotas: tuple[int, int] | None = None,
        asked_as: str | None = None,
    ) -> Job:
        """Queue a request.

        Args:
            request: What to generate.
            owner: Who asks.
            asked_as: What they call it; a second request of that name is the first one.
            quotas: Requests of theirs that may wait or run, and in 24 hours; None takes the limits' own, 0 is none.

        Raises:
            UserError: if it cannot be generated.
            QuotaReachedError: if its owner has too many.
            asyncio.QueueFull: if too many wait.
        """
        check_request(request, self.limits, self._grid)
        known = self.store.asked_as(owner, asked_as) if asked_as else None
        if known is not None and (before := self.get(known)) is not None:
            if before.request.identity() != request.identity():
                raise UserError("idempotency-key: stands for another request already; send a new one")
            return before
        if self.num_waiting >= self.limits.max_waiting:
            raise asyncio.QueueFull
        self._check_quotas(owner, quotas or (self.limits.max_active_per_user, self.limits.max_per_day_per_user))
        self.store.forget(self.limits)
        job = Job(secrets.token_urlsafe(12), request, owner, asked_as)
        self.store.add_job(job)
        self._begin(job, request.deadline_s)
        return job

    def get(self, job_id: str) -> Job | None:
        """A job by its id, None when unknown or forgotten."""
        return self._active.get(job_id) or self.store.job(job_id)

    def cancel(self, job_id: str) -> None:
        """Stop a job and forget it, with its result."""
        self._active.pop(job_id, None)
        self.store.delete(job_id)
        task = self._tasks.pop(job_id, None)
        if task is not None:
            task.cancel()

    async def drain(self, seconds: float) -> int:
        """Take no more requests and let the running ones end; the others stay in the store for the next server.

        Args:
            seconds: How long the running ones may take.

        Returns:
            How many jobs are left.
        """
        self.draining = True
        for job in list(self._active.values()):
            if job.status == "queued" and job.id in self._tasks:
                self._tasks[job.id].cancel()
        running = [self._tasks[job.id] for job in self._active.values() if job.status == "running"]
        if running:
            _, late = await asyncio.wait(running, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for job in self._active.values():
            if job.status == "running":
                with contextlib.suppress(StoreAwayError):  # then it counts as begun once more
                    self.store.put_back(job.id, job.attempts - 1)
        return len(self._active)

    def position(self, job: Job) -> int:
        """How many queued jobs are before this one."""
        before = itertools.takewhile(lambda other: other.id != job.id, self._active.values())
        return sum(other.status == "queued" for other in before)

    @property
    def num_waiting(self) -> int:
        """Jobs that have not started."""
        return sum(job.status == "queued" for job in self._active.values())

    @property
    def num_running(self) -> int:
        """Jobs that a replica works on."""
        return sum(job.status == "running" for job in self._active.values())

    def _check_quotas(self, owner: str, quotas: tuple[int, int]) -> None:
        most_active, most_a_day = quotas
        active = sum(job.owner == owner for job in self._active.values())
        if most_active and active >= most_active:
            raise QuotaReachedError(f"you have {active} requests waiting or running: at most {most_active}", 30)
        made = self.store.asked_since(owner, time.time() - 86_400) if most_a_day else 0
        if most_a_day and made >= most_a_day:
            raise QuotaReachedError(f"you have made {made} requests in 24 hours: at most {most_a_day}", 3600)

    def _begin(self, job: Job, left_s: float | None) -> None:
        self._active[job.id] = job
        self._tasks[job.id] = asyncio.get_running_loop().create_task(self._follow(job, left_s))

    async def _follow(self, job: Job, left: float | None) -> None:
        try:
            await self._run(job, left)
        finally:
            self._tasks.pop(job.id, None)

    async def _run(self, job: Job, left: float | None) -> None:
        """Run a job to its end; cancelled because the server stops, it stays in the store as it is."""
        result: Result | None = None
        try:
            async with asyncio.timeout(left) as deadline:
                # The generator's end (which stops a replica) belongs to this task, not to the garbage collector.
                async with contextlib.aclosing(self._backend(job.request)) as events:
                    async for event in events:
                        if job.status == "queued":
                            await self._started(job)
                            most = self.limits.max_run_s if left is None else min(left, self.limits.max_run_s)
                            deadline.reschedule(asyncio.get_running_loop().time() + most)
                        if isinstance(event, Progress):
                            job.step, job.steps = event.step, event.steps
                        else:
                            result = event
            status, error = ("done", "") if result else ("failed", "the generator gave no result")
        except UserError as problem:
            status, error = "failed", one_line(problem)
        except TimeoutError as problem:
            status, error = "failed", _late(job, self.limits) if deadline.expired() else one_line(problem)
        except Exception as problem:  # whatever a generator raises is the end of its job, and not of the server
            logger.exception("generation %s failed", job.id)
            status, error = "failed", one_line(problem)
        try:
            made = result if status == "done" else None
            ended = await _kept(lambda: self.store.finish(job, status, error, made))
        except StoreFullError as problem:
            # Said here as long as this server runs; the store has it as unfinished, for the next one to make again.
            job.status, job.error, job.finished_s = "failed", str(problem), time.time()
            self._on_finished(job)
            return
        if ended:
            job.status, job.error, job.finished_s = status, error, time.time()
            job.media_type = result.media_type if result and status == "done" else None
            self._on_finished(job)
        self._active.pop(job.id, None)

    async def _started(self, job: Job) -> None:
        job.status, job.started_s, job.attempts = "running", time.time(), job.attempts + 1
        await _kept(lambda: self.store.start(job.id, job.attempts, job.started_s))


async def _kept(keep: Callable[[], Answer]) -> Answer:
    """The store's answer, asked for again as long as its database is away: what was made is not lost by that."""
    while True:
        try:
            return keep()
        except StoreAwayError:
            await asyncio.sleep(STORE_PAUSE_S)


def _late(job: Job, limits: RequestLimits) -> str:
    if job.request.deadline_s is not None and time.time() - job.created_s >= job.request.deadline_s:
        return f"not done within the {job.request.deadline_s:g} s that were asked for"
    return f"the generation took longer than {limits.max_run_s:g} s: choose a smaller size, fewer frames or steps"


def one_line(error: Exception) -> str:
    """What the page says of an error; details go to the log only."""
    cause = getattr(error, "cause", None) or error
    if full_disk_behind(cause) is not None:
        return "the server has no room left on a disk: tell whoever runs it"
    if isinstance(cause, UserError):
        return str(cause)
    if type(cause).__name__ in ("OutOfMemoryError", "MemoryError"):
        return "out of memory: choose a smaller size or fewer frames"
    return f"the generation failed ({type(cause).__name__}); the server's log says why"
