"""When checkpoints are written: all ranks decide together, and none waits in a collective for another's disk."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.config import CheckpointConfig
from loomvideo.platform.training.writer import CheckpointWriter

logger = logging.getLogger(__name__)

LAST_RETRIES = 2

Contents = Callable[[], tuple[Mapping[str, Tensor], Mapping[str, list[int]], Mapping[str, Any]]]
"""Gives what a checkpoint of now holds: tensors by ``<kind>/<name>``, ranges by name, and the state."""


def newest_whole(folder: CheckpointFolder, total: Callable[..., list[float]]) -> Checkpoint | None:
    """The newest checkpoint that is whole; every rank checks a share of the files.

    Args:
        folder: The run's checkpoints.
        total: Sums numbers over all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        folder.clear_unfinished()
    box = [folder.steps() if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    for step in reversed(box[0]):
        checkpoint, damage = None, ""
        try:
            checkpoint = Checkpoint(folder.at(step))
            checkpoint.verify(sorted(checkpoint.manifest["files"])[rank::world_size])
        except DamagedCheckpoint as found:
            damage = str(found)
        if total(float(bool(damage)))[0] == 0:
            return checkpoint
        if damage:
            logger.warning("checkpoint passed over: %s", damage)
    return None


class Saver:
    """Writes a run's checkpoints beside training.

    Args:
        folder: The run's checkpoints.
        config: When, and which are kept.
        writer: This rank's.
        total: Sums numbers over all ranks.
        report: Sends a report to the driver.
        beat: Called while waiting for the writers, which is progress however slow the store.
        saved_at: Step of the checkpoint that the run continued from, if any.

    Attributes:
        saved_at: Step of the newest checkpoint that was begun.
        error: Why the newest one was not written; empty otherwise.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: CheckpointConfig,
        writer: CheckpointWriter,
        total: Callable[..., list[float]],
        report: Callable[[dict[str, Any]], Any],
        beat: Callable[[], None],
        saved_at: int | None,
    ):
        self.folder, self.config, self.writer, self.saved_at = folder, config, writer, saved_at
        self.error = ""
        self._total, self._report, self._beat = total, report, beat
        # When the newest checkpoint was begun, and the newest one known to be whole.
        self._begun_at = self._whole_at = time.monotonic()
        # One that was due while the one before was being written; whether any rank was, at the last look.
        self._postponed = self._writing = False

    @property
    def age_s(self) -> float:
        """What a failure now would cost."""
        return time.monotonic() - (self._whole_at if self.error else self._begun_at)

    def is_due(self, step: int, asks_all: bool) -> bool:
        """Whether a checkpoint is due after ``step`` steps; called on all ranks alike.

        Args:
            step: Steps done.
            asks_all: Whether to ask all ranks for their clocks.
        """
        by_clock = False
        if self.config.every_s and asks_all:
            by_clock = self._total(float(time.monotonic() - self._begun_at > self.config.every_s))[0] > 0
        return step % self.config.every_steps == 0 or by_clock or (self._postponed and not self._writing)

    def save(self, step: int, contents: Contents) -> None:
        """Start to write a checkpoint; the one before must be finished or given up."""
        self.writer.write(step, *contents())
        self.saved_at, self._begun_at, self._postponed = step, time.monotonic(), False
        if not self.config.background:
            self.settle()

    def save_when_free(self, step: int, contents: Contents) -> bool:
        """Save, unless the checkpoint before is still being written after a while: then as soon as it is not."""
        if self.settle(self.config.wait_s):
            self.save(step, contents)
            return True
        if not self._postponed:
            self._postponed = True
            self._report({"event": "checkpoint_postponed", "rank": self.writer.rank, "step": step})
        return False

    def save_urgently(self, step: int, contents: Contents) -> None:
        """Save now, before the workers are taken away: a checkpoint that is still being written is given up for it."""
        if self.saved_at != step or self.error:
            if self.writer.pending:
                self._report({"event": "checkpoint_abandoned", "rank": self.writer.rank, "step": self.saved_at})
                self.writer.abandon()
            self.save(step, contents)
        self.settle()
        self._report({"event": "checkpointed", "rank": self.writer.rank, "step": step})

    def save_last(self, step: int, contents: Contents) -> None:
        """Save and wait until it is whole.

        Raises:
            UserError: if it could not be written, several times.
        """
        self.settle()
        for _ in range(1 + LAST_RETRIES):
            if self.saved_at == step and not self.error:
                return
            self.save(step, contents)
            self.settle()
        if self.error:
            raise UserError(f"{self.folder.url}: the last checkpoint was not written: {self.error}")

    def settle(self, patience_s: float = math.inf) -> bool:
        """Wait until no rank is writing, all ranks together; returns whether that came to pass in time."""
        waited_from, pause_s = time.monotonic(), 0.002
        while self.writer.pending:
            mine = time.monotonic() - waited_from > patience_s
            busy, failed, late = self._total(float(self.writer.busy), float(self.writer.failed), float(mine))
            self.look(busy, failed)
            self._beat()
            if self.writer.pending and late:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)
        return True

    def look(self, num_busy: float, num_failed: float) -> None:
        """Act on how many ranks are writing and how many failed; one that failed is reported and training goes on."""
        self._writing = num_busy > 0
        if num_failed:
            self.writer.cancel()
        if num_busy or not self.writer.pending:
            return
        self.error = self.writer.finish(num_failed)
        if self.error:
            report = {"event": "checkpoint_failed", "step": self.saved_at, "message": self.error}
            self._report(report | {"rank": self.writer.rank})
        else:
            self._whole_at = self._begun_at
