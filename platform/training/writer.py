"""Writing checkpoints beside training: copy, then write, commit, rotate and upload on a thread."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import fsspec
import torch
from torch import Tensor

from loomvideo.platform.training.checkpoint import MANIFEST_FILE, Checkpoint, CheckpointFolder
from loomvideo.platform.training.config import CheckpointConfig

OTHER_WRITER = "another worker could not write its part"


class CheckpointWriter:
    """Writes this rank's part of checkpoints, one at a time; rank 0 also commits them.

    Args:
        folder: The run's checkpoints.
        config: Retention and upload.
        rank, world_size: Who writes.
    """

    def __init__(self, folder: CheckpointFolder, config: CheckpointConfig, rank: int, world_size: int):
        self.folder, self.config, self.rank, self.world_size = folder, config, rank, world_size
        self.best_step: int | None = None
        # When the newest checkpoint that was committed was begun; on rank 0.
        self.whole_since = time.monotonic()
        self._thread: threading.Thread | None = None
        self._written, self._cancelled = threading.Event(), threading.Event()
        self._error = ""
        self._step, self._begun_at = 0, 0.0

    def write(
        self, step: int, tensors: Mapping[str, Tensor], ranges: Mapping[str, list[int]], state: Mapping[str, Any]
    ) -> None:
        """Copy the tensors and start to write them; the checkpoint before must be settled."""
        copies = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in tensors.items()}
        self._step, self._begun_at = step, time.monotonic()
        self._written.clear()
        self._cancelled.clear()
        self._thread = threading.Thread(
            target=self._guarded, args=(step, copies, dict(ranges), dict(state)), name="checkpoint-writer"
        )
        self._thread.start()

    def settle(self, total: Callable[[float], float]) -> str:
        """Finish the checkpoint that is being written, on all ranks together.

        Args:
            total: Sums a number over all ranks.

        Returns:
            What this rank failed with, or an empty string; a checkpoint that one rank could not write is not committed.
        """
        if self._thread is None:
            return ""
        self._written.wait()
        if total(float(bool(self._error))) > 0:
            self._cancelled.set()
        self._thread.join()
        self._thread = None
        error, self._error = self._error, ""
        if total(float(bool(error))) > 0:
            # All ranks have stopped writing: give the room back, which may be what is missing.
            if self.rank == 0:
                self.folder.discard(self._step)
            return error or OTHER_WRITER
        return ""

    def _guarded(
        self, step: int, tensors: dict[str, Tensor], ranges: dict[str, list[int]], state: dict[str, Any]
    ) -> None:
        try:
            self.folder.write_rank(step, self.rank, self.world_size, tensors, ranges)
        except Exception as error:  # reported by settle(), on the training thread
            self._error = f"{type(error).__name__}: {error}"
        finally:
            self._written.set()
        if self.rank == 0 and not self._error:
            try:
                self._commit(step, state)
            except Exception as error:
                self._error = f"{type(error).__name__}: {error}"

    def _commit(self, step: int, state: dict[str, Any]) -> None:
        checkpoint = self.folder.commit(step, self.world_size, state, self._cancelled)
        if checkpoint is None:
            return
        self.whole_since = self._begun_at
        kept = [] if self.best_step is None else [self.best_step]
        self.folder.rotate(self.config.keep_last, self.config.keep_every, kept)
        if self.config.upload:
            upload(checkpoint, self.config.upload)


def upload(checkpoint: Checkpoint, url: str) -> None:
    """Copy a committed checkpoint below an fsspec URL, its manifest last."""
    system, root = fsspec.core.url_to_fs(url)
    target = f"{root}/{checkpoint.path.name}"
    system.makedirs(target, exist_ok=True)
    for name in [*checkpoint.manifest["files"], MANIFEST_FILE]:
        system.put_file(str(checkpoint.path / name), f"{target}/{name}")
