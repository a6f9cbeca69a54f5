"""Checkpoints that belong to no world size, written by all ranks and committed by a manifest.

A checkpoint is a folder ``step-00000500/``. Every rank writes ``rank-00003-of-00008.safetensors`` with its slice of
every trainable parameter's float32 master weights, moments and average (``master/<name>`` ...); the file's metadata
says which elements of the parameter each slice is. ``state.json`` holds the counters that continue the run and
``manifest.json`` the size and SHA-256 of every file. All is written under a temporary name; rank 0 writes the manifest
last and renames the folder, so a folder under its final name with a manifest is complete, and one that was damaged
since is recognised by its hashes.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loomvideo.platform.errors import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(ValueError):  # noqa: N818 - a finding, not always an error
    """A checkpoint is incomplete or its content differs from its manifest."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rank_file(rank: int, world_size: int) -> str:
    """Name of one rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True)
class SavedSlice:
    """Elements [start, stop) of a flattened parameter in one rank's file."""

    file: str
    start: int
    stop: int


class Checkpoint:
    """One committed checkpoint, read lazily.

    Args:
        path: Its folder.

    Raises:
        DamagedCheckpoint: if there is no readable manifest or state.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.manifest = json.loads((self.path / MANIFEST_FILE).read_text())
            self.state = json.loads((self.path / STATE_FILE).read_text())
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{self.path}: {error}") from error
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise DamagedCheckpoint(f"{self.path}/{MANIFEST_FILE}: not a checkpoint of format {FORMAT_VERSION}")
        self._open_files: dict[str, Any] = {}

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
    def kinds(self) -> list[str]:
        """Which of ``master, exp_avg, exp_avg_sq, ema`` are stored."""
        return [kind for kind in KINDS if self.slices.get(kind)]

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Check sizes and hashes of the named files, by default all.

        Raises:
            DamagedCheckpoint: naming the first file that is missing or differs.
        """
        for name in self.manifest["files"] if files is None else files:
            entry, path = self.manifest["files"][name], self.path / name
            if not path.is_file():
                raise DamagedCheckpoint(f"{path}: missing")
            if path.stat().st_size != entry["bytes"]:
                raise DamagedCheckpoint(f"{path}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
            if sha256_of(path) != entry["sha256"]:
                raise DamagedCheckpoint(f"{path}: content differs from the manifest's hash")

    @cached_property
    def slices(self) -> dict[str, dict[str, list[SavedSlice]]]:
        """``slices[kind][parameter name]`` in order of their start."""
        table: dict[str, dict[str, list[SavedSlice]]] = {}
        for file in self.manifest["files"]:
            if not file.endswith(".safetensors"):
                continue
            handle = self._file(file)
            ranges = json.loads(handle.metadata()["slices"])
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                kind, _, name = key.partition("/")
                table.setdefault(kind, {}).setdefault(name, []).append(SavedSlice(file, *ranges[name]))
        for parameters in table.values():
            for parts in parameters.values():
                parts.sort(key=lambda part: part.start)
        return table

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            self._open_files[name] = safe_open(self.path / name, "pt")
        return self._open_files[name]

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """Elements [start, stop) of a flattened parameter, float32; None when the kind was not stored.

        Raises:
            DamagedCheckpoint: if the files do not hold all of them.
        """
        parts = self.slices.get(kind, {}).get(name)
        if parts is None:
            return None
        pieces, place = [], start
        for part in parts:
            if part.start <= place < part.stop and place < stop:
                end = min(stop, part.stop)
                saved = self._file(part.file).get_slice(f"{kind}/{name}")
                pieces.append(saved[place - part.start : end - part.start])
                place = end
        if place < stop:
            raise DamagedCheckpoint(f"{self.path}: {kind} of {name} ends at element {place}, wanted {stop}")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def weights(self, kind: str = "master") -> "LazyWeights":
        """The full weights, ``master`` or ``ema``, read one parameter at a time."""
        if kind not in self.slices:
            raise UserError(f"{self.path}: holds no {kind} weights; it has {', '.join(self.kinds)}")
        return LazyWeights(self, kind)


class LazyWeights(Mapping[str, Tensor]):
    """A full float32 state dict of trained parameters that reads a parameter when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, kind: str):
        self.checkpoint, self.kind = checkpoint, kind

    def __getitem__(self, name: str) -> Tensor:
        shape = self.checkpoint.shapes[name]
        num_elements = torch.Size(shape).numel()
        value = self.checkpoint.read(self.kind, name, 0, num_elements)
        if value is None and self.kind == "ema":
            # Parameters that are not trained have no average.
            value = self.checkpoint.read("master", name, 0, num_elements)
        if value is None:
            raise DamagedCheckpoint(f"{self.checkpoint.path}: no {self.kind} of {name}")
        return value.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.shapes)

    def __len__(self) -> int:
        return len(self.checkpoint.shapes)


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: Folder that all ranks share.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        if not self.path.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def at(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` steps."""
        return self.path / f"step-{step:08d}"

    def staging(self, step: int) -> Path:
        """Where the checkpoint is written before it is committed."""
        return self.path / f".step-{step:08d}.partial"

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
                raise UserError(f"{self.path}: no checkpoint")
            return checkpoint
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.path}: no checkpoint of step {step}; there are {have}")
        return Checkpoint(self.at(step))

    def write_rank(
        self, step: int, rank: int, world_size: int, tensors: Mapping[str, Tensor], ranges: Mapping[str, list[int]]
    ) -> None:
        """Write one rank's file into the staging folder, and beside it the note that it is done.

        Args:
            step: Optimiser steps done.
            rank, world_size: Who writes.
            tensors: ``<kind>/<name>`` -> 1-D float32.
            ranges: Parameter name -> [start, stop).
        """
        folder = self.staging(step)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / rank_file(rank, world_size)
        save_file(dict(tensors), path, metadata={"slices": json.dumps(dict(ranges))})
        _flush(path)
        note = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        partial = folder / f".{rank}.note"
        partial.write_text(json.dumps(note))
        partial.replace(folder / f"{rank}.note")

    def notes(self, step: int, world_size: int) -> list[dict[str, Any]] | None:
        """The notes of all ranks, or None while one is missing."""
        paths = [self.staging(step) / f"{rank}.note" for rank in range(world_size)]
        if not all(path.is_file() for path in paths):
            return None
        return [json.loads(path.read_text()) for path in paths]

    def commit(
        self, step: int, world_size: int, state: Mapping[str, Any], cancelled: threading.Event | None = None
    ) -> Checkpoint | None:
        """Wait for all ranks' files, write state and manifest, and give the folder its final name.

        Args:
            step: Optimiser steps done.
            world_size: Number of files to wait for.
            state: What ``state.json`` shall hold.
            cancelled: Set when a rank failed; then None is returned.
        """
        folder = self.staging(step)
        while (notes := self.notes(step, world_size)) is None:
            if cancelled is not None and cancelled.wait(0.02):
                return None
        (folder / STATE_FILE).write_text(json.dumps(dict(state)))
        _flush(folder / STATE_FILE)
        files = {note["file"]: {"bytes": note["bytes"], "sha256": note["sha256"]} for note in notes}
        files[STATE_FILE] = {
            "bytes": (folder / STATE_FILE).stat().st_size,
            "sha256": sha256_of(folder / STATE_FILE),
        }
        for rank in range(world_size):
            (folder / f"{rank}.note").unlink()
        manifest = {"format_version": FORMAT_VERSION, "step": step, "world_size": world_size, "files": files}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
        _flush(folder / MANIFEST_FILE)
        if self.at(step).exists():
            shutil.rmtree(self.at(step))
        folder.rename(self.at(step))
        _flush(self.path)
        return Checkpoint(self.at(step))

    def discard(self, step: int) -> None:
        """Remove what was written of a checkpoint that will not be committed."""
        shutil.rmtree(self.staging(step), ignore_errors=True)

    def clear_staging(self) -> None:
        """Remove what interrupted writes left behind. Only while nobody writes."""
        if self.path.is_dir():
            for entry in self.path.glob(".step-*.partial"):
                shutil.rmtree(entry, ignore_errors=True)

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
        for step in removed:
            # Renamed first, so that a reader never sees half a folder under a final name.
            doomed = self.path / f".step-{step:08d}.removed"
            self.at(step).rename(doomed)
            shutil.rmtree(doomed)
        return removed


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
