"""A bounded folder on a node's own disk for what its processes read of an object store.

Entries are named by content (the checksum of the shard that the manifest states, and the range), so none is ever
stale. Each has a checksum of its own (CRC-32): what a disk or a power cut made of it is noticed, deleted and fetched
again. Any number of processes may use a folder at once: an entry appears whole, by renaming, and one that another is
fetching is waited for. Bytes are counted in a file that all of them lock, so the bound holds for the node.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from loomvideo.platform.errors import UserError

logger = logging.getLogger(__name__)
_FOLDERS = 256
_STRIPES = 512
_MAGIC = b"LVRANGE1"
_HEAD = struct.Struct("<8sQI")
_COUNTS = struct.Struct(f"<{_FOLDERS}qq")
"""Bytes in each folder, and the folder that is looked through next when something has to go."""
_LEFT_FULL = 0.95
_GOES_AT_ONCE = 0.25
"""Share of a folder's entries that goes before the next folder is looked at: nearly the oldest of all."""
_ABANDONED_S = 3600.0
_POLL_S = 0.01


class NodeCache:
    """The folder; thread-safe.

    Args:
        folder: Made when it is not there.
        max_bytes: Bound of its entries, heads included.
        wait_s: How long another process's fetch of the same range is waited for.

    Attributes:
        num_damaged: Entries that this process found damaged and deleted.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, max_bytes: int, wait_s: float = 10.0):
        self.folder, self.max_bytes, self.wait_s = Path(folder), max_bytes, wait_s
        self.num_damaged, self._said = 0, False
        try:
            for name in ("entries", "fetching"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            with self._counts():
                pass
        except OSError as error:
            raise UserError(f"data.reading.cache={folder}: cannot be written ({error.strerror or error})") from error

    def get(self, name: str, num_bytes: int, fetch: Callable[[], memoryview]) -> tuple[memoryview, bool]:
        """An entry, and whether it was there; one that is not is fetched by one process of the node and kept.

        A disk that is full or fails costs the entry, not the read; the first time it is logged.
        """
        key = hashlib.sha256(name.encode()).hexdigest()[:40]
        found = self._read(key, num_bytes)
        if found is not None:
            return found, True
        with self._alone(key) as waited:
            # Whoever was waited for has fetched it.
            found = self._read(key, num_bytes) if waited else None
            if found is not None:
                return found, True
            data = fetch()
            try:
                self._keep(key, data)
            except OSError as error:
                if not self._said:
                    self._said = True
                    logger.warning(
                        "data.reading.cache=%s: not written (%s); reading goes on without", self.folder, error
                    )
        return data, False

    def num_bytes(self) -> int:
        """Bytes of all entries, as counted."""
        with self._counts() as (counts, _):
            return sum(counts)

    def _path(self, key: str) -> Path:
        return self.folder / "entries" / key[:2] / key

    def _read(self, key: str, num_bytes: int) -> memoryview | None:
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            head, data = bytearray(_HEAD.size), memoryview(np.empty(num_bytes, np.uint8))
            length = os.preadv(descriptor, [head, data], 0)
            while 0 < length < _HEAD.size + num_bytes:  # the kernel gives at most 2 GB at once
                more = os.preadv(descriptor, [data[length - _HEAD.size :]], length)
                if not more:
                    break
                length += more
            whole = length == _HEAD.size + num_bytes
            if whole and _HEAD.unpack(head) == (_MAGIC, num_bytes, zlib.crc32(data)):
                os.utime(descriptor)
                return data
        except OSError:
            pass  # as damaged as wrong bytes are
        finally:
            os.close(descriptor)
        self.num_damaged += 1
        with contextlib.suppress(FileNotFoundError), self._counts() as (counts, _):
            counts[int(key[:2], 16)] -= path.stat().st_size
            path.unlink()
        return None

    def _keep(self, key: str, data: memoryview) -> None:
        size = _HEAD.size + len(data)
        if size > self.max_bytes:
            return
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        temporary = path.parent / f".{key}.tmp-{os.getpid()}-{threading.get_ident()}"
        try:
            with temporary.open("wb") as file:
                file.write(_HEAD.pack(_MAGIC, len(data), zlib.crc32(data)))
                file.write(data)
            with self._counts() as (counts, turn):
                if path.exists():
                    return
                # Room first: the bound holds at every moment.
                self._make_room(counts, turn, size)
                temporary.rename(path)
                counts[int(key[:2], 16)] += size
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, counts: list[int], turn: list[int], size: int) -> None:
        if sum(counts) + size <= self.max_bytes:
            return
        allowed = min(self.max_bytes - size, int(_LEFT_FULL * self.max_bytes))
        for _ in range(int(_FOLDERS / _GOES_AT_ONCE) + _FOLDERS):
            if sum(counts) <= allowed:
                return
            counts[turn[0]] = self._thin_out(self.folder / "entries" / f"{turn[0]:02x}", sum(counts) - allowed)
            turn[0] = (turn[0] + 1) % _FOLDERS

    def _thin_out(self, folder: Path, enough: int) -> int:
        """Delete what was read longest ago; returns the bytes that are left, as they are and not as counted."""
        entries, now = [], time.time()
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listed:
            for entry in listed:
                stat = entry.stat()
                if not entry.name.startswith("."):
                    entries.append((stat.st_mtime, stat.st_size, entry.path))
                elif now - stat.st_mtime > _ABANDONED_S:
                    os.unlink(entry.path)
        entries.sort()
        left, most = sum(size for _, size, _ in entries), max(1, int(_GOES_AT_ONCE * len(entries)))
        for _, size, path in entries[:most]:
            if enough <= 0:
                break
            os.unlink(path)
            left, enough = left - size, enough - size
        return left

    @contextlib.contextmanager
    def _counts(self) -> Iterator[tuple[list[int], list[int]]]:
        """What is counted, locked against all other threads and processes, and written when the block ends well."""
        with (self.folder / "counts").open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = file.read(_COUNTS.size)
            *counts, turn = _COUNTS.unpack(known) if len(known) == _COUNTS.size else [0] * (_FOLDERS + 1)
            if len(known) != _COUNTS.size:
                counts = self._counted()
            place = [turn % _FOLDERS]
            before = list(counts), list(place)
            yield counts, place
            if (counts, place) != before or len(known) != _COUNTS.size:
                file.truncate(0)
                file.write(_COUNTS.pack(*(max(0, count) for count in counts), place[0]))

    def _counted(self) -> list[int]:
        """Bytes in each folder as they are: the count is lost, or the folder is new."""
        return [self._thin_out(self.folder / "entries" / f"{number:02x}", 0) for number in range(_FOLDERS)]

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[bool]:
        """Fetch an entry while no other process does; yields whether one was waited for.

        One lock guards many keys. A holder that hangs is not waited for longer than ``wait_s``.
        """
        stripe = int(key[:8], 16) % _STRIPES
        with (self.folder / "fetching" / f"{stripe:03x}").open("ab") as file:
            began, waited = time.monotonic(), False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waited = True
                    if time.monotonic() - began > self.wait_s:
                        break
                    time.sleep(_POLL_S)
            yield waited
