"""Turns at the encoders: one shard after another, in the order in which their samples were queued."""

import threading
import time
from collections.abc import Callable
from typing import Any


class Turns:
    """Gives turns, first come first served."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._taken = self._open = 0
        self._free_since = time.perf_counter()
        self._ended: set[int] = set()

    def take(self, queue: Callable[[], Any] = lambda: None) -> "EncoderTurn":
        """A turn behind those taken before; ``queue`` is called at the same moment, and its result kept in the turn."""
        with self._changed:
            queued = queue()
            self._taken += 1
            self._open += 1
            return EncoderTurn(self, self._taken - 1, queued)

    def wait_until_over(self) -> None:
        """Wait until nothing that has taken a turn is worked on."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)

    def _begin(self, number: int) -> float:
        with self._changed:
            self._changed.wait_for(lambda: self._next == number)
            return time.perf_counter() - self._free_since

    def _end(self, number: int) -> None:
        with self._changed:
            self._ended.add(number)
            while self._next in self._ended:
                self._ended.remove(self._next)
                self._next += 1
                self._free_since = time.perf_counter()
            self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify_all()


class EncoderTurn:
    """A shard's turn at the encoders, and what their time in it went to.

    Attributes:
        queued: What was queued when it was taken.
        wait_s: Seconds in which they waited for samples, since the turn before.
        encode_s: Seconds in which they encoded.
        hold_s: Seconds in which they waited for what they had encoded to be written.
        load_s: Seconds that decoders took for its samples.
    """

    def __init__(self, turns: Turns, number: int, queued: Any):
        self._turns, self._number, self._is_over = turns, number, False
        self.queued = queued
        self.wait_s = self.encode_s = self.hold_s = self.load_s = 0.0

    def begin(self) -> None:
        """Wait for the turn."""
        self.wait_s += self._turns._begin(self._number)

    def end(self) -> None:
        """Let the next begin; what is left of this shard needs no encoder."""
        if not self._is_over:
            self._is_over = True
            self._turns._end(self._number)

    def __enter__(self) -> "EncoderTurn":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
        self._turns._close()
