"""Messages between the driver of a training run and its workers."""

from typing import Any

import ray


@ray.remote(num_cpus=0, max_restarts=0)
class Mailbox:
    """An actor on the driver's node: workers put reports, the driver drains them and can ask the run to stop."""

    def __init__(self) -> None:
        self._reports: list[dict[str, Any]] = []
        self._stop_reason = ""

    def put(self, report: dict[str, Any]) -> str:
        """Leave a report; returns why the run should stop, or an empty string."""
        self._reports.append(report)
        return self._stop_reason

    def drain(self) -> list[dict[str, Any]]:
        """Take all reports."""
        reports, self._reports = self._reports, []
        return reports

    def request_stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and stop."""
        self._stop_reason = reason
