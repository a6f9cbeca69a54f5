"""Errors a user can cause and can fix."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Arrow, safetensors, SQLite and FFmpeg keep no number, or the file of an error that they raise again.
_FULL_IN_WORDS = ("no space left on device", "disk quota exceeded", "database or disk is full")
_FREE_SOME = "free some and run the same line again"
# What is left is taken for nothing: a file system keeps some for itself, and a write may need this at once.
_ALMOST_NONE_BYTES = 1 << 20


class UserError(ValueError):
    """A mistake in input, configuration or environment.

    The message is one line that names the file, the key and the fix; the command line prints it without a traceback
    and exits with code 2.
    """


class DiskFullError(UserError):
    """No room is left: the fault of no sample or request."""


def how_to_add(extra: str) -> str:
    """The command that adds an extra to this installation: make's in a clone, which keeps to the locks; else pip's."""
    clone = Path(__file__).resolve().parents[1]
    if (clone / "Makefile").is_file() and (clone / "locks" / f"{extra}.txt").is_file():
        return f"make setup EXTRAS={extra}"
    return f"pip install 'loomvideo[{extra}]'"


def of_the_disk(error: BaseException) -> UserError | None:
    """What a person can do about a file that was refused, or a full disk; None for any other error."""
    full = full_disk_behind(error)
    if full is not None:
        name = getattr(full, "filename", None) or ", ".join(_full_folders()) or "a disk"
        return DiskFullError(f"{name}: no space left; {_FREE_SOME}")
    error = getattr(error, "cause", None) or error  # what a worker of Ray raised
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _REFUSED:
        return None
    fix = "give yourself access, or name another folder (output=…, runs=…; --help has the keys)"
    return UserError(f"{error.filename}: {(error.strerror or 'refused').lower()}; {fix}")


@contextlib.contextmanager
def full_disk_named(name: str | os.PathLike, partial: Path | None = None, spool: str = "") -> Iterator[None]:
    """Say which file a full disk did not take: a write to an open file fails without its name.

    Args:
        name: The file or folder that is written.
        partial: Its temporary name, removed when the block raises.
        spool: The folder that it is kept in until it is whole, where that is another one.

    Raises:
        DiskFullError: when the block raised for want of space.
    """
    try:
        yield
    except BaseException as error:  # what is no full disk goes on as it is
        if partial is not None:
            partial.unlink(missing_ok=True)
        full = None if isinstance(error, UserError) else full_disk_behind(error)
        if full is None:
            raise
        where = getattr(full, "filename", None) or spool
        elsewhere = f" ({where})" if where and Path(name).parent not in Path(where).parents else ""
        raise DiskFullError(f"{name}: no space left{elsewhere}; {_FREE_SOME}") from error


def full_disk_behind(error: BaseException) -> BaseException | None:
    """The error of a full disk among an error and what it came from, if there is one."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.append(one)
        if isinstance(one, OSError) and one.errno in _FULL:
            return one
        if any(words in str(one).lower() for words in _FULL_IN_WORDS):
            return one
        # Ray and SQLAlchemy have names of their own for what an error came from.
        causes = (one.__cause__, one.__context__, getattr(one, "cause", None), getattr(one, "orig", None))
        waiting += [cause for cause in causes if isinstance(cause, BaseException)]
    return None


def _full_folders() -> list[str]:
    """Of the folders that every command writes to, those without room."""
    full = []
    for folder in dict.fromkeys((os.getcwd(), tempfile.gettempdir(), os.path.expanduser("~"), "/dev/shm")):
        with contextlib.suppress(OSError):
            found = os.statvfs(folder)
            if found.f_bavail * found.f_frsize < _ALMOST_NONE_BYTES:
                full.append(folder)
    return full
