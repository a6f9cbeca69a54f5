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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.training.slice_file import FLOAT_BYTES, SavedSlice, hash_of, read_table

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
READ_BYTES = 256 * 2**20
READ_THREADS = 16


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
