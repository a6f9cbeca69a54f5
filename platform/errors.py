"""Errors a user can cause and can fix."""

from pathlib import Path


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
