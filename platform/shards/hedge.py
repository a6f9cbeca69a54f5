"""Hedged requests: one that takes longer than most of its size is sent a second time, and the first answer counts.

After Dean and Barroso, The Tail at Scale (2013): waiting for a high percentile of what requests take keeps the second
ones to a few in a hundred and cuts the tail. When a store is slow as a whole every request is; so that hedging does not
double its load then, second requests are at most a tenth of all.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

Answer = TypeVar("Answer")

_REMEMBERED = 256
_ENOUGH = 32
"""Requests of a size after which their percentile is trusted; before, ten times ``least_s`` is waited."""
_UNTRUSTED_FACTOR = 10.0
_MOST_OF_ALL = 0.1


@dataclass
class Hedge:
    """How long requests take, by their size, and when a second one is sent; thread-safe.

    Args:
        percentile: Share of recent requests that took no longer than what is waited; 0 never sends a second one.
        least_s: What is waited in any case.
        clock: Gives seconds.

    Attributes:
        num_requests, num_second, num_won: First requests, second ones, and those of them that answered first.
    """

    percentile: float
    least_s: float
    clock: Callable[[], float] = time.monotonic
    num_requests: int = 0
    num_second: int = 0
    num_won: int = 0
    _taken: dict[int, deque[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait_s(self, num_bytes: int) -> float | None:
        """How long the first request is given before a second one is sent; None for no second one."""
        if not self.percentile:
            return None
        with self._lock:
            if self.num_second >= 1 + _MOST_OF_ALL * self.num_requests:
                return None
            taken = sorted(self._taken.get(_size_class(num_bytes), ()))
        if len(taken) < _ENOUGH:
            return _UNTRUSTED_FACTOR * self.least_s
        return max(self.least_s, taken[int(self.percentile * len(taken))])

    async def first(self, ask: Callable[[], Awaitable[Answer]], num_bytes: int) -> Answer:
        """The answer of the first request to succeed, or the error of the last to fail."""
        began, waits = self.clock(), self.wait_s(num_bytes)
        tasks = [asyncio.ensure_future(ask())]
        with self._lock:
            self.num_requests += 1
        try:
            if waits is not None and not (await asyncio.wait(tasks, timeout=waits))[0]:
                tasks.append(asyncio.ensure_future(ask()))
                with self._lock:
                    self.num_second += 1
            pending = set(tasks)
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good:
                    self._note(num_bytes, self.clock() - began, won=good[0] is not tasks[0])
                    return good[0].result()
                if not pending:
                    return tasks[0].result()
        finally:
            for task in tasks:
                # One that failed meanwhile shall not be reported as an error that nobody looked at.
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
                task.cancel()

    def _note(self, num_bytes: int, seconds: float, won: bool) -> None:
        with self._lock:
            self.num_won += won
            # What a hedged request took is less than its first would have: the percentile stays where it was learned.
            self._taken.setdefault(_size_class(num_bytes), deque(maxlen=_REMEMBERED)).append(seconds)


def _size_class(num_bytes: int) -> int:
    """Requests within a factor of four take about equally long."""
    return num_bytes.bit_length() // 2
