"""Errors a user can cause: a missing extra, a folder that may not be written to, a full disk."""

import errno
import os
import tomllib
from pathlib import Path

import pytest

from loomvideo.platform import errors

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "extra", tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
)
def test_a_clone_adds_extras_by_make(extra):
    assert errors.how_to_add(extra) == f"make setup EXTRAS={extra}"


def test_an_image_or_a_wheel_adds_extras_by_pip(monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "loomvideo" / "platform" / "errors.py"))
    assert errors.how_to_add("eval") == "pip install 'loomvideo[eval]'"


def test_no_message_names_pip_for_an_extra_itself():
    """They all ask the one helper, so that a clone never gets packages past its locks."""
    found = [
        str(path.relative_to(REPO))
        for room in ("platform", "model", "pipelines", "jobs")
        for path in (REPO / room).rglob("*.py")
        if "pip install 'loomvideo[" in path.read_text() and path.name != "errors.py"
    ]
    assert found == []


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, "/ro/runs: permission denied; give yourself access, or name another folder"),
        (errno.EROFS, "/ro/runs: read-only file system; give yourself access, or name another folder"),
        (errno.ENOSPC, "/ro/runs: no space left; free some and run the same line again"),
    ],
)
def test_what_a_disk_refuses_is_one_line(number, expected):
    assert str(errors.of_the_disk(OSError(number, os.strerror(number), "/ro/runs"))).startswith(expected)


def test_other_errors_of_the_system_keep_their_traceback():
    assert errors.of_the_disk(OSError(errno.ECONNRESET, "reset")) is None
    assert errors.of_the_disk(OSError(errno.EACCES, "of a socket, without a file")) is None
