"""Messages between the driver of a training run and its workers."""

from typing import Any

import ray

WRITE_CHECKPOINT = "write a checkpoint"
"""The answer to a report that asks the workers for a checkpoint."""


@ray.remote(num_cpus=0, max_restarts=0)
class Mailbox:
    """An actor on the driver's node: workers put reports, the driver drains them and can ask the run to stop."""

    def __init__(self) -> None:
        self._reports: list[dict[str, Any]] = []
        self._stop_reason = ""
        self._runs = False
        self._num_asked = self._num_told = self._num_written = 0

    def put(self, report: dict[str, Any]) -> str:
        """Leave a report; returns why the run should stop, ``WRITE_CHECKPOINT``, or an empty string."""
        self._reports.append(report)
        self._runs = self._runs or report["event"] == "steps"
        if report["event"] == "checkpointed":
            self._num_written = self._num_told
        if not self._stop_reason and self._num_told < self._num_asked:
            self._num_told = self._num_asked
            return WRITE_CHECKPOINT
        return self._stop_reason

    def drain(self) -> list[dict[str, Any]]:
        """Take all reports."""
        reports, self._reports = self._reports, []
        return reports

    def request_stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and stop."""
        self._stop_reason = reason

    def is_running(self) -> bool:
        """Whether workers have trained since they were started."""
        return self._runs

    def note_stopped(self) -> None:
        """The workers ended; what was asked of them is void."""
        self._runs = False
        self._num_told = self._num_written = self._num_asked

    def request_checkpoint(self) -> int:
        """Ask the workers for a checkpoint now; returns the request's number."""
        self._num_asked += 1
        return self._num_asked

    def is_written(self, request: int) -> bool:
        """Whether the checkpoint of a request is whole."""
        return self._num_written >= request
