"""A rank's checkpoint file: safetensors laid out in host memory once, written in one pass with its hash.

The training thread only starts copies into the buffer, which is page-locked for GPUs and reused for every checkpoint;
the writing thread waits for them. What is read back is ranges, so any part of a parameter can come from any store.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.tensors import HEADER_SIZE_BYTES, parse_header

CHUNK_BYTES = 16 * 2**20
PART_BYTES = 64 * 2**20
FLOAT_BYTES = 4


class Abandoned(Exception):  # noqa: N818 - not an error
    """Writing was given up on request."""


class HostBuffer:
    """Host memory that holds one file's bytes and is kept for the next.

    Args:
        pin: Lock the pages, so that copies from a GPU overlap with its work.
    """

    def __init__(self, pin: bool = False):
        self.pin = pin
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._copied: Any = None

    def fill(self, tensors: Mapping[str, Tensor], ranges: Mapping[str, list[int]]) -> memoryview:
        """Start to copy 1-D tensors, as float32, into a file's layout.

        Args:
            tensors: The tensors by ``<kind>/<name>``.
            ranges: Parameter name -> [start, stop), kept in the file's metadata.

        Returns:
            The file's bytes; valid after :meth:`wait`, until the next call.
        """
        header: dict[str, Any] = {"__metadata__": {"slices": json.dumps(dict(ranges))}}
        place = 0
        for name, tensor in tensors.items():
            end = place + tensor.numel() * FLOAT_BYTES
            header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [place, end]}
            place = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_SIZE_BYTES)
        head = len(text).to_bytes(HEADER_SIZE_BYTES, "little") + text
        size = len(head) + place
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin)
        self._bytes[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        floats = self._bytes[len(head) : size].view(torch.float32)
        place = 0
        for tensor in tensors.values():
            floats[place : place + tensor.numel()].copy_(tensor.detach(), non_blocking=self.pin)
            place += tensor.numel()
        if self.pin:
            # Updates of the weights are behind the copies on the same stream: nobody has to wait here.
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._bytes.numpy().data[:size]

    def wait(self) -> None:
        """Return when the copies are done."""
        if self._copied is not None:
            self._copied.synchronize()


def write_hashed(
    storage: Storage, path: str, content: memoryview, progress: Callable[[int], None] = lambda num_bytes: None
) -> str:
    """Write a file in one pass; returns its SHA-256. It may be seen half-written: whoever lists it commits it.

    Args:
        storage: Where.
        path: Relative name.
        content: Bytes.
        progress: Called with the bytes of each chunk; may raise to give up.
    """
    return storage.patiently(_write_once, storage, path, content, progress)


def _write_once(storage: Storage, path: str, content: memoryview, progress: Callable[[int], None]) -> str:
    digest, name = hashlib.sha256(), storage.full_path(path)
    if storage.is_local:
        os.makedirs(os.path.dirname(name), exist_ok=True)
        file = open(name, "wb", buffering=0)  # noqa: SIM115 - closed below, in either way
    else:
        file = storage.fs.open(name, "wb", block_size=PART_BYTES)
    try:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            _write_all(file, chunk)
            digest.update(chunk)
            progress(len(chunk))
        if storage.is_local:
            os.fsync(file.fileno())
    except BaseException:
        # An object that was not finished must not appear under its name.
        with contextlib.suppress(Exception):
            getattr(file, "discard", file.close)()
        raise
    file.close()
    return digest.hexdigest()


def _write_all(file: Any, chunk: memoryview) -> None:
    while chunk:
        written = file.write(chunk)
        chunk = chunk[written:]


def hash_of(storage: Storage, path: str, progress: Callable[[int], None] = lambda num_bytes: None) -> str:
    """SHA-256 of a stored file, in hexadecimal."""

    def once() -> str:
        digest = hashlib.sha256()
        with storage.fs.open(storage.full_path(path), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                progress(len(chunk))
        return digest.hexdigest()

    return storage.patiently(once)


@dataclass(frozen=True)
class SavedSlice:
    """Elements [start, stop) of a flattened parameter: float32 from byte ``offset`` of one rank's file."""

    file: str
    start: int
    stop: int
    offset: int


def read_table(storage: Storage, path: str) -> dict[str, SavedSlice]:
    """What a rank's file holds, by ``<kind>/<name>``.

    Raises:
        UserError: if it is none, or cut.
    """
    name, total = path.rsplit("/", 1)[-1], storage.size(path) or 0
    (size,) = storage.read_ranges(path, [(0, HEADER_SIZE_BYTES)])
    length = int.from_bytes(size, "little")
    if length > total - HEADER_SIZE_BYTES:
        raise UserError(f"{storage.url}/{path}: damaged: a header of {length} bytes in a file of {total}")
    (text,) = storage.read_ranges(path, [(HEADER_SIZE_BYTES, length)])
    first = HEADER_SIZE_BYTES + length
    try:
        ranges = json.loads(json.loads(bytes(text))["__metadata__"]["slices"])
        held = {}
        for key, entry in parse_header(text, total - first).items():
            start, stop = ranges[key.partition("/")[2]]
            if [stop - start] != entry["shape"] or entry["dtype"] != "F32":
                raise ValueError(f"{key} is not elements {start} to {stop}")
            held[key] = SavedSlice(name, start, stop, first + entry["data_offsets"][0])
        return held
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{storage.url}/{path}: damaged: {error}") from error
