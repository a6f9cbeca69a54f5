"""A dataset folder on local disk or any fsspec file system, with all-or-nothing writes and range reads."""

import errno
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from loomvideo.platform.errors import UserError, full_disk_behind, full_disk_named

logger = logging.getLogger(__name__)

_MAX_OPEN_FILES = 64
_FILES_AT_A_TIME = 64
# Two minutes in all, after the client's own retries of some seconds: a GPU job must outlive a store's bad moment.
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_REFUSED_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)
# Stores that speak S3 without being it (R2, older MinIO, Ceph) answer "not implemented" to checksums that clients send
# unasked since 2025. What is written is compared by size, and by hash in manifests.
for _variable in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
    os.environ.setdefault(_variable, "when_required")
# Clients raise errors of their own libraries when a connection breaks.
CLIENT_LIBRARIES = ("aiohttp", "botocore")


def is_storage_error(error: BaseException) -> bool:
    """Whether a remote file system, or the client library under it, failed for a reason that may pass."""
    if isinstance(error, (FileNotFoundError, PermissionError)) or full_disk_behind(error) is not None:
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in CLIENT_LIBRARIES


def patiently(name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a remote file system; what it answers with an error that may pass is tried again for two minutes."""
    for delay_s in RETRY_DELAYS_S:
        try:
            return call(*arguments, **options)
        except Exception as error:  # of every client library; what is no broken connection goes on
            if not is_storage_error(error):
                raise
            logger.warning("%s: %s; again in %.0f s", name, error, delay_s)
            time.sleep(delay_s)
    return call(*arguments, **options)


class Storage:
    """Files under one folder; paths are relative to it and use ``/``.

    A write becomes visible under its final name only when complete: local files are written beside their
    destination, synced and renamed; objects are spooled to local disk and uploaded whole.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/")
        try:
            self.fs, self.root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: cannot open this kind of storage ({error})") from error
        self.root = self.root.rstrip("/")
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self._open_files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {"url": self.url}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["url"])

    def full_path(self, path: str) -> str:
        """The file system's own name of ``path``."""
        return f"{self.root}/{path}" if path else self.root

    def patiently(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call the file system, or what reads through it; see :func:`patiently`."""
        return call(*arguments, **options) if self.is_local else patiently(self.url, call, *arguments, **options)

    def exists(self, path: str) -> bool:
        """Whether a file of that name is complete and present.

        Raises:
            PermissionError: for a local folder that may not be looked into.
        """
        if self.is_local:
            # The library's own answer to a closed folder is that nothing is there.
            return self.size(path) is not None
        return self.patiently(self.fs.exists, self.full_path(path))

    def size(self, path: str) -> int | None:
        """Size in bytes, None when absent."""
        try:
            return self.patiently(self.fs.info, self.full_path(path))["size"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> list[str]:
        """Names of the files in ``folder``, sorted; empty when it does not exist. Temporaries are left out."""
        return sorted(self.sizes(folder))

    def read_bytes(self, path: str) -> bytes:
        """The whole file.

        Raises:
            UserError: if it does not exist.
        """
        try:
            return self.patiently(self.fs.cat_file, self.full_path(path))
        except FileNotFoundError as error:
            raise UserError(f"{self.url}/{path}: no such file") from error

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes]:
        """Whole small files, in order; remote ones some dozens at a time.

        Raises:
            UserError: if one does not exist.
        """
        if self.is_local:
            yield from map(self.read_bytes, paths)
            return
        for start in range(0, len(paths), _FILES_AT_A_TIME):
            some = paths[start : start + _FILES_AT_A_TIME]
            names = [self.full_path(path) for path in some]
            try:
                none = [None] * len(names)
                found = self.patiently(self.fs.cat_ranges, names, none, none, on_error="raise")
            except FileNotFoundError as error:
                raise UserError(f"{self.url}: a file is gone while it is read: {error}") from error
            yield from map(bytes, found)

    def sizes(self, folder: str) -> dict[str, int]:
        """``{name: bytes}`` of the files in ``folder``, by one listing; empty when it does not exist."""
        self.fs.invalidate_cache(self.full_path(folder))
        try:
            entries = self.patiently(self.fs.ls, self.full_path(folder), detail=True)
        except FileNotFoundError:
            return {}
        named = ((entry["name"].rstrip("/").rsplit("/", 1)[-1], entry) for entry in entries if entry["type"] == "file")
        return {name: entry["size"] for name, entry in named if name and not _is_temporary(name)}

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytearray | memoryview]:
        """Read ``(start, size)`` ranges of one file into memory that may be written; thread-safe.

        Raises:
            UserError: if the file is missing or ends before a range does.
        """
        if self.is_local:
            parts = [self._read_local(path, start, size) for start, size in ranges]
        else:
            name = self.full_path(path)
            parts = self.patiently(
                self.fs.cat_ranges,
                [name] * len(ranges),
                [s for s, _ in ranges],
                [s + n for s, n in ranges],
                on_error="raise",
            )
            parts = [bytearray(part) for part in parts]
        for part, (start, size) in zip(parts, ranges, strict=True):
            if len(part) != size:
                raise UserError(f"{self.url}/{path}: wanted {size} bytes at {start}, file gave {len(part)}")
        return parts

    def _read_local(self, path: str, start: int, size: int) -> memoryview:
        # A bytearray would be filled with zeros first.
        view, done = memoryview(np.empty(size, np.uint8)), 0
        descriptor = self._duplicate_descriptor(path)
        try:
            while done < size:
                count = os.preadv(descriptor, [view[done:]], start + done)
                if count == 0:
                    break
                done += count
        finally:
            os.close(descriptor)
        return view[:done]

    def _duplicate_descriptor(self, path: str) -> int:
        # A duplicate, so that an eviction by another thread cannot close the file under a read.
        with self._lock:
            if path not in self._open_files:
                try:
                    self._open_files[path] = os.open(self.full_path(path), os.O_RDONLY)
                except FileNotFoundError as error:
                    raise UserError(f"{self.url}/{path}: no such file") from error
                if len(self._open_files) > _MAX_OPEN_FILES:
                    os.close(self._open_files.popitem(last=False)[1])
            self._open_files.move_to_end(path)
            return os.dup(self._open_files[path])

    def close(self) -> None:
        """Close cached file descriptors."""
        with self._lock:
            for descriptor in self._open_files.values():
                os.close(descriptor)
            self._open_files.clear()

    @contextmanager
    def staged(self, path: str) -> Iterator[Path]:
        """A local file to write; published as ``path`` when the block ends well, removed when it raises."""
        destination = self.full_path(path)
        with full_disk_named(f"{self.url}/{path}", spool="" if self.is_local else tempfile.gettempdir()):
            yield from self._staged(path, destination)

    def _staged(self, path: str, destination: str) -> Iterator[Path]:
        if self.is_local:
            folder, name = os.path.split(destination)
            os.makedirs(folder, exist_ok=True)
            temporary = Path(folder) / f".{name}.tmp-{os.getpid()}-{threading.get_ident()}"
            try:
                yield temporary
                _sync(temporary)
                os.replace(temporary, destination)
                _sync(Path(folder))
            finally:
                temporary.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory(prefix="loomvideo-") as folder:
            temporary = Path(folder) / "object"
            yield temporary
            self.patiently(self.fs.put_file, str(temporary), destination)
            self.fs.invalidate_cache()
            size = self.patiently(self.fs.info, destination)["size"]
            if size != temporary.stat().st_size:
                raise OSError(f"{self.url}/{path}: uploaded {temporary.stat().st_size} bytes, storage holds {size}")

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a small file, all or nothing."""
        with self.staged(path) as file:
            file.write_bytes(data)

    def delete(self, path: str) -> None:
        """Remove a file if it is there."""
        with self._lock:
            descriptor = self._open_files.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)
        if self.exists(path):
            self.patiently(self.fs.rm_file, self.full_path(path))
            self.fs.invalidate_cache()

    def remove_temporaries(self, folder: str) -> int:
        """Delete what killed writers left in ``folder``; returns how many files."""
        if not self.is_local or not os.path.isdir(self.full_path(folder)):
            return 0
        left = [entry for entry in Path(self.full_path(folder)).iterdir() if _is_temporary(entry.name)]
        for entry in left:
            entry.unlink(missing_ok=True)
        return len(left)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and ".tmp-" in name


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in _REFUSED_SYNC:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        # CIFS, FUSE and object-store mounts sync no folders, some no files: what they acknowledged is all there is.
        if error.errno not in _REFUSED_SYNC:
            raise
    finally:
        os.close(descriptor)
