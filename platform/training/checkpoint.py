"""Checkpoints that belong to no world size, on a disk or an object store, written by all ranks.

A checkpoint is a folder ``step-00000500/`` below any fsspec URL. Every rank writes ``rank-00003-of-00008.safetensors``
with its slice of every trainable parameter's float32 master weights, moments and average (``master/<name>`` ...); the
file's metadata says which elements of the parameter each slice is. ``state.json`` holds the counters that continue the
run and ``manifest.json`` the size and SHA-256 of every file. The manifest is written last, all or nothing, and removed
first: a folder with one is a complete checkpoint, any other is none, and nothing is ever renamed. What was damaged
since is recognised by the hashes.
"""

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.training.config import CheckpointConfig
from loomvideo.platform.training.slice_file import FLOAT_BYTES, SavedSlice, hash_of, read_table, write_hashed

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
READ_BYTES = 256 * 2**20
READ_THREADS = 16
POLL_INTERVAL_S, REMOTE_POLL_INTERVAL_S = 0.02, 1.0
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(UserError):  # noqa: N818 - a finding, not always an error
    """A checkpoint is incomplete or its content differs from its manifest."""


def rank_file(rank: int, world_size: int) -> str:
    """Name of one rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


class Checkpoint:
    """One committed checkpoint, read lazily.

    Args:
        url: Its folder, a path or fsspec URL.

    Raises:
        DamagedCheckpoint: if there is no readable manifest or state.
    """

    def __init__(self, url: str | Path):
        self.storage = Storage(url)
        self.url = self.storage.url
        try:
            self.manifest = json.loads(self.storage.read_bytes(MANIFEST_FILE))
            self.state = json.loads(self.storage.read_bytes(STATE_FILE))
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{self.url}: {error}") from error
        if not isinstance(self.manifest, dict) or self.manifest.get("format_version") != FORMAT_VERSION:
            raise DamagedCheckpoint(f"{self.url}/{MANIFEST_FILE}: not a checkpoint of format {FORMAT_VERSION}")
        _check_structure(self.manifest, self.state, self.url)

    @property
    def name(self) -> str:
        """Name of the folder, such as ``step-00000500``."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state["step"]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    @property
    def digest(self) -> str:
        """Hash of the manifest: names the content."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        return {name: tuple(shape) for name, shape in self.state["shapes"].items()}

    @property
    def base(self) -> dict[str, str]:
        """``digest`` and ``path`` of the weights that parameters not stored here come from; empty for none."""
        return self.state.get("base") or {}

    @property
    def kinds(self) -> list[str]:
        """Which of ``master, exp_avg, exp_avg_sq, ema`` are stored."""
        return [kind for kind in KINDS if self.slices.get(kind)]

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Check sizes and hashes of the named files, by default all.

        Raises:
            DamagedCheckpoint: naming the first file that is missing or differs.
        """
        for name in self.manifest["files"] if files is None else files:
            entry, place = self.manifest["files"][name], f"{self.url}/{name}"
            size = self.storage.size(name)
            if size is None:
                raise DamagedCheckpoint(f"{place}: missing")
            if size != entry["bytes"]:
                raise DamagedCheckpoint(f"{place}: {size} bytes, the manifest says {entry['bytes']}")
            if hash_of(self.storage, name) != entry["sha256"]:
                raise DamagedCheckpoint(f"{place}: content differs from the manifest's hash")

    @cached_property
    def slices(self) -> dict[str, dict[str, list[SavedSlice]]]:
        """``slices[kind][parameter name]`` in order of their start."""
        table: dict[str, dict[str, list[SavedSlice]]] = {}
        files = [file for file in self.manifest["files"] if file.endswith(".safetensors")]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for held in pool.map(lambda file: read_table(self.storage, file), files):
                for key, part in held.items():
                    kind, _, name = key.partition("/")
                    table.setdefault(kind, {}).setdefault(name, []).append(part)
        for parameters in table.values():
            for parts in parameters.values():
                parts.sort(key=lambda part: part.start)
        return table

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """Elements [start, stop) of a flattened parameter, float32; None when the kind was not stored.

        Raises:
            DamagedCheckpoint: if the files do not hold all of them.
        """
        return next(self.read_many([(kind, name, start, stop)]))

    def read_many(self, requests: Sequence[tuple[str, str, int, int]]) -> Iterator[Tensor | None]:
        """Answer many requests of :meth:`read` in their order, with few and large reads."""
        batch: list[list[tuple[str, int, int]] | None] = []
        size = 0
        for request in requests:
            pieces = self._pieces(*request)
            batch.append(pieces)
            size += (request[3] - request[2]) * FLOAT_BYTES
            if size >= READ_BYTES:
                yield from self._read_batch(batch)
                batch, size = [], 0
        yield from self._read_batch(batch)

    def _pieces(self, kind: str, name: str, start: int, stop: int) -> list[tuple[str, int, int]] | None:
        """(file, first byte, number of bytes) of every part of a request."""
        parts = self.slices.get(kind, {}).get(name)
        if parts is None:
            return None
        pieces, place = [], start
        for part in parts:
            if part.start <= place < part.stop and place < stop:
                end = min(stop, part.stop)
                first = part.offset + (place - part.start) * FLOAT_BYTES
                pieces.append((part.file, first, (end - place) * FLOAT_BYTES))
                place = end
        if place < stop:
            raise DamagedCheckpoint(f"{self.url}: {kind} of {name} ends at element {place}, wanted {stop}")
        return pieces

    def _read_batch(self, batch: Sequence[list[tuple[str, int, int]] | None]) -> Iterator[Tensor | None]:
        merged: dict[str, list[list[int]]] = {}
        for file, first, size in sorted({piece for pieces in batch for piece in pieces or ()}):
            ranges = merged.setdefault(file, [])
            if ranges and ranges[-1][0] + ranges[-1][1] == first:
                ranges[-1][1] += size
            else:
                ranges.append([first, size])
        data = {
            file: list(zip(ranges, self.storage.read_ranges(file, [tuple(r) for r in ranges]), strict=True))
            for file, ranges in merged.items()
        }

        def piece_of(file: str, first: int, size: int) -> Tensor:
            start, content = next((r[0], c) for r, c in data[file] if r[0] <= first < r[0] + r[1])
            return torch.frombuffer(content, dtype=torch.float32, count=size // FLOAT_BYTES, offset=first - start)

        for pieces in batch:
            if pieces is None:
                yield None
            elif not pieces:
                yield torch.empty(0)
            else:
                parts = [piece_of(*piece) for piece in pieces]
                yield parts[0] if len(parts) == 1 else torch.cat(parts)

    def weights(self, kind: str = "master", base: Mapping[str, Tensor] | None = None) -> "LazyWeights":
        """The full weights, ``master`` or ``ema``, read one parameter at a time.

        Args:
            kind: Which.
            base: The weights that :attr:`base` names, for parameters that are not stored here.
        """
        if kind not in self.slices:
            raise UserError(f"{self.url}: holds no {kind} weights; it has {', '.join(self.kinds)}")
        return LazyWeights(self, kind, base)


class LazyWeights(Mapping[str, Tensor]):
    """A full float32 state dict that reads a parameter when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, kind: str, base: Mapping[str, Tensor] | None = None):
        self.checkpoint, self.kind, self.base = checkpoint, kind, base

    def is_stored(self, name: str) -> bool:
        """Whether the checkpoint itself holds a parameter."""
        return any(name in self.checkpoint.slices.get(kind, {}) for kind in (self.kind, "master"))

    def __getitem__(self, name: str) -> Tensor:
        shape = self.checkpoint.shapes[name]
        # Parameters that are not trained have no average.
        kind = self.kind if name in self.checkpoint.slices.get(self.kind, {}) else "master"
        value = self.checkpoint.read(kind, name, 0, torch.Size(shape).numel())
        if value is None and self.base is not None:
            value = self.base[name].float()
        if value is None and self.checkpoint.base:
            raise UserError(
                f"{self.checkpoint.url}: {name} was not trained and is kept in the weights that the run started from, "
                f"{self.checkpoint.base['path']} ({self.checkpoint.base['digest']}); name them"
            )
        if value is None:
            raise DamagedCheckpoint(f"{self.checkpoint.url}: no {self.kind} of {name}")
        return value.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.shapes)

    def __len__(self) -> int:
        return len(self.checkpoint.shapes)


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


def _check_structure(manifest: dict[str, Any], state: Any, url: str) -> None:
    """Check what every reader takes for granted, so that damage is told from a mistake in the code."""
    try:
        files = manifest["files"].items()
        sound = all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for _, entry in files)
        shapes = state["shapes"].values()
        sound &= isinstance(state["step"], int) and all(isinstance(size, int) for shape in shapes for size in shape)
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{url}: manifest or state lack {error}") from error
    if not sound:
        raise DamagedCheckpoint(f"{url}: manifest or state have values of another type")


def _note(rank: int) -> str:
    return f"{rank}.note"
