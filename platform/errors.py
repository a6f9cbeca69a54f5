"""Errors a user can cause and can fix."""

import errno
from pathlib import Path

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake in input, configuration or environment.

    The message is one line that names the file, the key and the fix; the command line prints it without a traceback
    and exits with code 2.
    """


def how_to_add(extra: str) -> str:
    """The command that adds an extra to this installation: make's in a clone, which keeps to the locks; else pip's."""
    clone = Path(__file__).resolve().parents[1]
    if (clone / "Makefile").is_file() and (clone / "locks" / f"{extra}.txt").is_file():
        return f"make setup EXTRAS={extra}"
    return f"pip install 'loomvideo[{extra}]'"


def of_the_disk(error: OSError) -> UserError | None:
    """What a person can do about a file that was refused, or a full disk; None for any other error."""
    if error.filename is None or error.errno not in (*_REFUSED, *_FULL):
        return None
    if error.errno in _FULL:
        return UserError(f"{error.filename}: no space left; free some and run the same line again")
    fix = "give yourself access, or name another folder (output=…, runs=…; --help has the keys)"
    return UserError(f"{error.filename}: {error.strerror.lower()}; {fix}")
