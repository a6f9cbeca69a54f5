"""Writing checkpoints beside training: copy to host memory, then write, commit and rotate on a thread."""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.config import CheckpointConfig
from loomvideo.platform.training.slice_file import Abandoned, HostBuffer

logger = logging.getLogger(__name__)

OTHER_WRITER = "another worker could not write its part"


class _Writing:
    """One checkpoint that is being written by a thread."""

    def __init__(self, step: int):
        self.step, self.begun_at = step, time.monotonic()
        self.cancelled = threading.Event()
        self.error = ""
        self.committed = False
        self.thread: threading.Thread | None = None


class CheckpointWriter:
    """Writes this rank's part of checkpoints, one at a time; rank 0 also commits them.

    The training loop asks all ranks for :attr:`busy` and :attr:`failed` together and acts on the sums, so that no rank
    waits in a collective for another's disk.

    Args:
        folder: The run's checkpoints.
        config: Retention.
        rank, world_size: Who writes.
        attempt: The same on all ranks of this start of the run.
        pin: Copy through page-locked memory.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: CheckpointConfig,
        rank: int,
        world_size: int,
        attempt: str = "",
        pin: bool = False,
    ):
        self.folder, self.config, self.rank, self.world_size = folder, config, rank, world_size
        self.attempt = attempt
        # When the newest checkpoint that was committed was begun; on rank 0.
        self.whole_since = time.monotonic()
        self._buffer = HostBuffer(pin)
        self._now: _Writing | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun whose end :meth:`finish` has not told."""
        return self._now is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._now is not None and self._now.thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part."""
        return self._now is not None and bool(self._now.error)

    def write(
        self, step: int, tensors: Mapping[str, Tensor], ranges: Mapping[str, list[int]], state: Mapping[str, Any]
    ) -> None:
        """Copy the tensors and start to write them; the checkpoint before must be finished or abandoned."""
        content = self._buffer.fill(tensors, ranges)
        self._now = now = _Writing(step)
        now.thread = threading.Thread(
            target=self._guarded, args=(now, self._buffer, content, dict(state)), name="checkpoint-writer", daemon=True
        )
        now.thread.start()

    def abandon(self) -> None:
        """Give up what is being written, without waiting for it: its memory stays with its thread."""
        if self._now is not None:
            self._now.cancelled.set()
            if self.busy:
                self._buffer = HostBuffer(self._buffer.pin)
            self._now = None

    def cancel(self) -> None:
        """Stop waiting for the files of others, one of whom failed."""
        if self._now is not None:
            self._now.cancelled.set()

    def finish(self, num_failed: float) -> str:
        """End a checkpoint that no rank is writing any more.

        Args:
            num_failed: Ranks that failed.

        Returns:
            What this rank failed with, or an empty string; a checkpoint that one rank could not write is not committed.
        """
        if self._now is None:
            return ""
        now, self._now = self._now, None
        now.thread.join()
        if num_failed:
            # All ranks have stopped writing: give the room back, which may be what is missing.
            if self.rank == 0 and not now.committed:
                self.folder.discard(now.step)
            return now.error or OTHER_WRITER
        return ""

    def _guarded(self, now: _Writing, buffer: HostBuffer, content: memoryview, state: dict[str, Any]) -> None:
        def progress(num_bytes: int) -> None:
            if now.cancelled.is_set():
                raise Abandoned

        try:
            buffer.wait()
            self.folder.write_rank(now.step, self.rank, self.world_size, content, self.attempt, progress)
            if self.rank == 0:
                self._commit(now, state)
        except Abandoned:
            return
        except Exception as error:  # told by finish(), on the training thread
            now.error = f"{type(error).__name__}: {error}"

    def _commit(self, now: _Writing, state: dict[str, Any]) -> None:
        checkpoint = self.folder.commit(now.step, self.world_size, state, now.cancelled, self.attempt)
        if checkpoint is None:
            return
        now.committed, self.whole_since = True, now.begun_at
        _, best_step = state.get("best", (None, None))
        kept = [] if best_step is None else [best_step]
        try:
            self.folder.rotate(self.config.keep_last, self.config.keep_every, kept)
        except OSError as error:  # the checkpoint is whole all the same
            logger.warning("%s: old checkpoints were not removed: %s", self.folder.url, error)
