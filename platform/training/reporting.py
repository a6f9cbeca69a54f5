"""What a worker tells the driver between steps, and what the driver asks in return."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loomvideo.platform.training.hardware import NodeMonitor
from loomvideo.platform.training.mailbox import WRITE_CHECKPOINT

REPORT_INTERVAL_S = 1.0


class Reporter:
    """Collects records of steps and sends them at the pace of ``log_every``.

    Args:
        send: Sends a report to the driver; its answer may be to an earlier one.
        rank: This worker's; rank 0 records the steps.
        device: This worker's.
        run_path: The run's folder, whose disk is watched.
        log_every: Steps between reports.

    Attributes:
        stop_reason: Why the driver wants the run to stop, as far as this rank knows.
        wants_checkpoint: Whether the driver asked for a checkpoint.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], str],
        rank: int,
        device: torch.device,
        run_path: Path,
        log_every: int,
    ):
        self._send, self.rank, self.device, self.log_every = send, rank, device, log_every
        self.stop_reason, self.wants_checkpoint = "", False
        self._records: list[dict[str, Any]] = []
        self._monitor = NodeMonitor(device, run_path)
        self._reported_at = time.monotonic()

    def note(self, step: int, record: dict[str, Any], details: Callable[[], dict[str, Any]]) -> None:
        """Take the record of a step, and send when it is time.

        Args:
            step: The step.
            record: What is recorded of it, on rank 0.
            details: Gives what goes with a report: mean losses by tag, warnings, the age of the checkpoint.
        """
        if self.rank == 0:
            self._records.append(record)
        if step % self.log_every == 0 or step == 1:
            self.flush(details())
        elif self.rank == 0 and time.monotonic() - self._reported_at > REPORT_INTERVAL_S:
            # Asks whether to stop; the answer comes with a later report.
            self._reported_at = time.monotonic()
            self.tell({"event": "alive"})

    def flush(self, details: dict[str, Any], last: bool = False) -> None:
        """Send what was noted since the last time; ``last`` when nothing follows."""
        report: dict[str, Any] = {"event": "steps", "rank": self.rank, "steps": self._records} | details
        if figures := self._monitor.read(at_once=last):
            report |= {"node": self._monitor.node, "system": figures}
        if self.device.type == "cuda":
            report["memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self._reported_at = time.monotonic()
        self.tell(report)
        self._records = []

    def tell(self, report: dict[str, Any]) -> None:
        """Send a report and take the driver's answer."""
        answer = self._send(report)
        if answer == WRITE_CHECKPOINT:
            self.wants_checkpoint = True
        else:
            self.stop_reason = answer or self.stop_reason
