"""Folders shared by processes and on file systems that are none: paths, locks, and renames that are refused."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# Object stores mounted as folders rename files and no folders; gcsfuse says "too many open files".
_REFUSED_RENAME = (
    errno.EMFILE, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EXDEV, errno.EINVAL,
)  # fmt: skip


def absolute(place: str) -> str:
    """A path that means the same to processes in other folders; URLs and empty values stay."""
    return place if not place or "://" in place else os.path.abspath(os.path.expanduser(place))


def give_name(partial: Path, final: Path, last: str) -> None:
    """Give a finished folder its name; where folders cannot be renamed its files move one by one.

    Args:
        partial: The folder, with a name that nobody reads.
        final: Its name; must not exist.
        last: The file in it by which readers know that it is whole; it moves last.

    Raises:
        OSError: if there is such a folder, or the disk fails.
    """
    try:
        partial.rename(final)
    except OSError as error:
        if error.errno not in _REFUSED_RENAME:
            raise
        final.mkdir(parents=True)
        files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        for file in sorted(files, key=lambda file: file == partial / last):
            target = final / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        shutil.rmtree(partial)


def lock(path: Path, wait_s: float) -> IO | None:
    """Hold a file for this process alone; the file that must be closed to give it back, or None where nothing locks.

    Args:
        path: The file, made when it is not there; it names the holder.
        wait_s: How long another holder is waited for.

    Raises:
        BlockingIOError: if another process holds it; its argument says which.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except PermissionError:
        return None
    ends = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > ends:
                file.seek(0)
                holder = file.read().strip()
                file.close()
                raise BlockingIOError(error.errno, holder or "another process") from error
            time.sleep(0.05)
        except OSError:  # FUSE and network file systems without locks
            file.close()
            return None
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            return file


@contextlib.contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold a file for a block, see :func:`lock`."""
    file = lock(path, wait_s)
    try:
        yield
    finally:
        if file is not None:
            file.close()
