"""The checkpoints of a run: found, written by all ranks, committed last, and removed when they are old."""

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.training.checkpoint import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    STATE_FILE,
    Checkpoint,
    DamagedCheckpoint,
    rank_file,
)
from loomvideo.platform.training.config import CheckpointConfig
from loomvideo.platform.training.slice_file import write_hashed

logger = logging.getLogger(__name__)


POLL_INTERVAL_S, REMOTE_POLL_INTERVAL_S = 0.02, 1.0
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints_of(config: CheckpointConfig, run: RunFolder) -> str:
    """Where a run's checkpoints are: in its folder, or below ``checkpoint.url``."""
    root = f"{config.url.rstrip('/')}/{run.job}/{run.name}" if config.url else str(run.path)
    return f"{root}/checkpoints"


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        url: A folder that all ranks reach, a path or fsspec URL.
    """

    def __init__(self, url: str | Path):
        self.storage = Storage(url)
        self.url = self.storage.url

    def _children(self) -> list[int]:
        """Steps of all folders, whole or not."""
        fs, root = self.storage.fs, self.storage.full_path("")
        fs.invalidate_cache()
        try:
            entries = self.storage.patiently(fs.ls, root, detail=False)
        except FileNotFoundError:
            return []
        found = (_NAME.fullmatch(entry.rstrip("/").rsplit("/", 1)[-1]) for entry in entries)
        return sorted(int(match[1]) for match in found if match)

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        return [step for step in self._children() if self.is_committed(step)]

    def is_committed(self, step: int) -> bool:
        """Whether there is a whole checkpoint of a step."""
        return self.storage.exists(f"{self.name_of(step)}/{MANIFEST_FILE}")

    @staticmethod
    def name_of(step: int) -> str:
        """Name of the folder of the checkpoint after ``step`` steps."""
        return f"step-{step:08d}"

    def at(self, step: int) -> str:
        """URL of the checkpoint after ``step`` steps."""
        return f"{self.url}/{self.name_of(step)}"

    def newest(self, verify: bool = True) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are passed over with a warning."""
        for step in reversed(self.steps()):
            try:
                checkpoint = Checkpoint(self.at(step))
                if verify:
                    checkpoint.verify()
                return checkpoint
            except DamagedCheckpoint as damage:
                logger.warning("checkpoint passed over: %s", damage)
        return None

    def open(self, step: int | None = None) -> Checkpoint:
        """A checkpoint by step, or the newest whole one.

        Raises:
            UserError: if there is none.
        """
        if step is None:
            checkpoint = self.newest()
            if checkpoint is None:
                raise UserError(f"{self.url}: no checkpoint")
            return checkpoint
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.url}: no checkpoint of step {step}; there are {have}")
        return Checkpoint(self.at(step))

    def write_rank(
        self,
        step: int,
        rank: int,
        world_size: int,
        content: memoryview,
        attempt: str = "",
        progress: Any = lambda num_bytes: None,
    ) -> None:
        """Write one rank's file, and beside it the note that it is done.

        Args:
            step: Optimiser steps done.
            rank, world_size: Who writes.
            content: The file, from :class:`~loomvideo.platform.training.slice_file.HostBuffer`.
            attempt: The same on all ranks of a start of the run, so that nobody takes an older note for this one.
            progress: See :func:`write_hashed`.
        """
        name, file = self.name_of(step), rank_file(rank, world_size)
        sha256 = write_hashed(self.storage, f"{name}/{file}", content, progress)
        note = {"file": file, "bytes": len(content), "sha256": sha256, "attempt": attempt}
        self.storage.write_bytes(f"{name}/{_note(rank)}", json.dumps(note).encode())

    def commit(
        self,
        step: int,
        world_size: int,
        state: Mapping[str, Any],
        cancelled: threading.Event | None = None,
        attempt: str = "",
    ) -> Checkpoint | None:
        """Wait for all ranks' files, then write state and manifest.

        Args:
            step: Optimiser steps done.
            world_size: Number of files to wait for.
            state: What ``state.json`` shall hold.
            cancelled: Set when a rank failed; then None is returned.
            attempt: See :meth:`write_rank`.
        """
        name, notes = self.name_of(step), {}
        pause_s = POLL_INTERVAL_S if self.storage.is_local else REMOTE_POLL_INTERVAL_S
        while len(notes) < world_size:
            for rank in set(range(world_size)) - set(notes):
                note = self._note_of(name, rank)
                if note and note["attempt"] == attempt and note["file"] == rank_file(rank, world_size):
                    notes[rank] = note
            if cancelled is not None and cancelled.is_set():
                return None
            if len(notes) < world_size:
                time.sleep(pause_s)
        text = json.dumps(dict(state)).encode()
        self.storage.write_bytes(f"{name}/{STATE_FILE}", text)
        files = {notes[r]["file"]: {key: notes[r][key] for key in ("bytes", "sha256")} for r in range(world_size)}
        files[STATE_FILE] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        manifest = {"format_version": FORMAT_VERSION, "step": step, "world_size": world_size, "files": files}
        self.storage.write_bytes(f"{name}/{MANIFEST_FILE}", json.dumps(manifest, indent=1).encode())
        for rank in range(world_size):
            self.storage.delete(f"{name}/{_note(rank)}")
        return Checkpoint(self.at(step))

    def _note_of(self, name: str, rank: int) -> dict[str, Any] | None:
        path = f"{name}/{_note(rank)}"
        self.storage.fs.invalidate_cache()
        return json.loads(self.storage.read_bytes(path)) if self.storage.exists(path) else None

    def discard(self, step: int) -> None:
        """Remove a checkpoint, its manifest first: a reader never takes the rest for one."""
        name = self.name_of(step)
        self.storage.delete(f"{name}/{MANIFEST_FILE}")
        folder = self.storage.full_path(name)
        if self.storage.exists(name):
            self.storage.patiently(self.storage.fs.rm, folder, recursive=True)
            self.storage.fs.invalidate_cache()

    def clear_unfinished(self) -> None:
        """Remove what interrupted writes left behind. Only while nobody writes."""
        for step in self._children():
            if not self.is_committed(step):
                self.discard(step)

    def rotate(self, keep_last: int, keep_every: int = 0, keep: Iterable[int] = ()) -> list[int]:
        """Remove old checkpoints; returns the removed steps.

        Args:
            keep_last: Newest ones to keep.
            keep_every: Also keep steps that are a multiple; 0 keeps none.
            keep: Steps to keep in any case, such as the best by validation.
        """
        steps = self.steps()
        kept = set(steps[-keep_last:]) | set(keep)
        if keep_every:
            kept |= {step for step in steps if step % keep_every == 0}
        removed = [step for step in steps if step not in kept]
        # What was given up before the newest was whole goes too.
        unfinished = [step for step in self._children() if steps and step < steps[-1] and step not in steps]
        for step in removed + unfinished:
            self.discard(step)
        return removed


def _note(rank: int) -> str:
    return f"{rank}.note"
