"""Loading ahead of an encoder: in order, across shards, by as many decoders as it takes, within a bound of bytes.

A builder has one decoder of its own, so that it works on any cluster. Where it is allowed more, their number follows
from what is measured: decoding seconds a sample over encoding seconds a sample is how many keep the encoders busy.
"""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from loomvideo.pipelines.prepare.loading import DecoderLostError, Loaded, PlannedSample, lost

logger = logging.getLogger(__name__)

# Decoders beyond what is needed on average: files differ.
HEADROOM = 1.25
# Fewer are wanted only when this share of them would do: a decoder's start costs more than its idling.
_ENOUGH = 0.7
# Until the first sample is encoded nothing is known.
_FIRST_DECODERS = 4
_REMEMBERED = 64
# Of one sample. A decoder dies of its node too; of the same sample hardly twice.
_DEATHS = 2
# In a row, before they have loaded anything: whatever ends them, it is not the samples.
_FAILED_STARTS = 3


class RemoteDecoder(Protocol):
    """A decoder elsewhere; see :class:`~loomvideo.pipelines.prepare.loading.DecoderHandle`."""

    def wait(self) -> str:
        """Wait until it runs."""
        ...

    def load(self, plan: PlannedSample) -> Loaded:
        """Load a sample there."""
        ...

    def close(self) -> None:
        """End it."""
        ...


def decoders_for(load_s: float, encode_s: float) -> int:
    """How many decoders keep one encoder busy.

    Args:
        load_s: Seconds to fetch, decode and resize a sample, on the average.
        encode_s: Seconds to encode one.
    """
    return max(math.ceil(HEADROOM * load_s / max(encode_s, 1e-9)), 1)


class LoadAhead:
    """Hands planned samples to decoders in the order in which they will be encoded.

    Args:
        load: Loads a sample in this process; called by one thread.
        limit_bytes: Bytes of samples that are loaded or being loaded and not taken yet; one sample is always let in.
        size: Bytes of a loaded sample.
        start: Starts a decoder elsewhere, None for none.
        most: Decoders elsewhere at most.
    """

    def __init__(
        self,
        load: Callable[[PlannedSample], Loaded],
        limit_bytes: int,
        size: Callable[[PlannedSample], int],
        start: Callable[[], RemoteDecoder] | None = None,
        most: int = 0,
    ):
        self._load, self._limit_bytes, self._size = load, limit_bytes, size
        self._start, self._most = start, most if start else 0
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._held_bytes = 0
        self._threads: list[threading.Thread] = []
        self._remote: set[RemoteDecoder] = set()
        self._num_remote = self._num_leaving = self._num_failed = self._since_change = 0
        self._times: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._closed = self._is_warm = False

    @property
    def num_decoders(self) -> int:
        """Decoders that run or are being started, this process's among them."""
        return 1 + self._num_remote - self._num_leaving

    def add(self, planned: Sequence[PlannedSample]) -> "Batch":
        """Queue the samples of a shard behind those of earlier ones."""
        jobs = [_Job(plan, self._size(plan)) for plan in planned]
        with self._changed:
            self._queue.extend(jobs)
            if not self._threads:
                self._run(self._work, self._load, None)
                self._grow(min(_FIRST_DECODERS, self._most))
            self._changed.notify_all()
        return Batch(self, jobs)

    def encoded(self, load_s: float, encode_s: float) -> None:
        """Note what a sample took to load and to encode, and have as many decoders as that asks for."""
        with self._changed:
            if not self._is_warm:
                # The first sample loads kernels and weights.
                self._is_warm = True
                return
            self._times.append((load_s, encode_s))
            self._since_change += 1
            wanted = decoders_for(*map(sum, zip(*self._times, strict=True)))
            wanted = min(wanted, 1 + self._most)
            if wanted > self.num_decoders:
                self._grow(wanted - self.num_decoders)
            elif wanted < _ENOUGH * self.num_decoders and self._since_change > _REMEMBERED:
                self._num_leaving += self.num_decoders - wanted
                self._since_change = 0
                self._changed.notify_all()

    def close(self) -> None:
        """End all decoders elsewhere; samples that are not loaded are not loaded any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            remote, self._remote = self._remote, set()
        for decoder in remote:
            decoder.close()
        for thread in self._threads:
            thread.join()

    def _grow(self, count: int) -> None:
        for _ in range(count):
            self._num_remote += 1
            self._since_change = 0
            self._run(self._work_elsewhere)

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, args=arguments, name="decoder", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work_elsewhere(self) -> None:
        decoder = self._start()
        with self._changed:
            self._remote.add(decoder)
        try:
            decoder.wait()
            with self._changed:
                self._num_failed = 0
            self._work(decoder.load, decoder)
        except DecoderLostError as error:
            self._note_loss(error)
        finally:
            with self._changed:
                self._num_remote -= 1
                is_open = decoder in self._remote
                self._remote.discard(decoder)
            if is_open:
                decoder.close()

    def _note_loss(self, error: DecoderLostError) -> None:
        with self._changed:
            if self._closed:
                return
            self._num_failed += 1
            if self._num_failed == _FAILED_STARTS:
                self._most = 0
                logger.warning("no more decoders are started, %d ended in a row, the last: %s", _FAILED_STARTS, error)
            else:
                logger.warning("a decoder ended: %s", error)

    def _work(self, load: Callable[[PlannedSample], Loaded], decoder: RemoteDecoder | None) -> None:
        while (job := self._next(decoder is not None)) is not None:
            began = time.perf_counter()
            try:
                job.result = load(job.plan)
            except DecoderLostError as error:
                self._give_back(job, error)
                raise
            except BaseException as error:  # handed to whoever takes the sample, who raises it
                job.result = error
            job.load_s = time.perf_counter() - began
            with self._changed:
                job.is_done = True
                if job.is_dropped:
                    self._release(job)
                self._changed.notify_all()

    def _next(self, may_leave: bool) -> "_Job | None":
        with self._changed:
            while not self._closed:
                if may_leave and self._num_leaving:
                    self._num_leaving -= 1
                    return None
                if self._queue and (
                    not self._held_bytes or self._held_bytes + self._queue[0].num_bytes <= self._limit_bytes
                ):
                    job = self._queue.popleft()
                    self._held_bytes += job.num_bytes
                    return job
                self._changed.wait()
        return None

    def _give_back(self, job: "_Job", error: DecoderLostError) -> None:
        with self._changed:
            self._held_bytes -= job.num_bytes
            job.deaths += 1
            if job.is_dropped:
                pass
            elif job.deaths < _DEATHS:
                self._queue.appendleft(job)
            else:
                message = f"{job.deaths} decoder processes died on it, last: {error}"
                job.result = lost(job.plan.sample, "quarantined", "decode", "decoder_crash", message)
                self._held_bytes += job.num_bytes
                job.is_done = True
            self._changed.notify_all()

    def _release(self, job: "_Job") -> None:
        self._held_bytes -= job.num_bytes
        job.result = None

    def _take(self, job: "_Job") -> tuple[Loaded, float]:
        with self._changed:
            while not job.is_done:
                if self._closed:
                    raise RuntimeError("loading was ended while a sample was waited for")
                self._changed.wait()
            result = job.result
            self._release(job)
            job.is_dropped = True
            self._changed.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result, job.load_s

    def _drop(self, jobs: Sequence["_Job"]) -> None:
        with self._changed:
            for job in jobs:
                if job.is_dropped:
                    continue
                job.is_dropped = True
                with contextlib.suppress(ValueError):
                    self._queue.remove(job)
                    continue
                if job.is_done:
                    self._release(job)
            self._changed.notify_all()


class _Job:
    """A sample on its way.

    Attributes:
        is_dropped: Nobody will take it, or somebody has.
    """

    def __init__(self, plan: PlannedSample, num_bytes: int):
        self.plan, self.num_bytes = plan, num_bytes
        self.result: Loaded | BaseException | None = None
        self.load_s, self.deaths = 0.0, 0
        self.is_done = self.is_dropped = False


class Batch:
    """The queued samples of a shard."""

    def __init__(self, ahead: LoadAhead, jobs: Sequence[_Job]):
        self._ahead, self._jobs = ahead, jobs

    def __iter__(self) -> Iterator[tuple[PlannedSample, Loaded, float]]:
        """Samples in slot order, each when it is loaded, with the seconds that loading took."""
        for job in self._jobs:
            yield job.plan, *self._ahead._take(job)

    def drop(self) -> None:
        """Let go of what was not taken."""
        self._ahead._drop(self._jobs)
