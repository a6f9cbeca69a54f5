"""Hang detection: a worker that makes no progress writes all its stacks and ends, so that the run restarts."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

EXIT_CODE = 75


class Watchdog:
    """Watches one worker.

    Args:
        limit_s: Seconds without :meth:`beat` that count as a hang; 0 never does.
        report_file: Where the stacks of all threads are written; they go to stderr too.
    """

    def __init__(self, limit_s: float, report_file: Path):
        self.limit_s, self.report_file = limit_s, report_file
        self._last = time.monotonic()
        self._closed = threading.Event()
        if limit_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Say that there was progress."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.limit_s / 4)):
            if time.monotonic() - self._last > self.limit_s:
                self._end()

    def _end(self) -> None:
        note = f"no progress for {self.limit_s:.0f} s; stacks of all threads are in {self.report_file}"
        print(note, file=sys.stderr, flush=True)
        self.report_file.parent.mkdir(parents=True, exist_ok=True)
        with self.report_file.open("w") as out:
            faulthandler.dump_traceback(out, all_threads=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        # The main thread sits in a collective and cannot be interrupted otherwise.
        os._exit(EXIT_CODE)
