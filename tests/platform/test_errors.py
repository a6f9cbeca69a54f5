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


class OfRayError(RuntimeError):
    """As Ray raises what a worker raised: several lines, and the error itself as ``cause``."""

    def __init__(self, cause):
        super().__init__("ray::work()\n  a traceback")
        self.cause = cause


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OfRayError(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_a_full_disk_is_told_by_any_librarys_error_and_the_folder_without_room_named(error, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    none_left = os.statvfs_result((4096, 4096, 100, 0, 0, 10, 10, 10, 0, 255))
    room = os.statvfs_result((4096, 4096, 10**6, 10**6, 10**6, 10, 10, 10, 0, 255))
    monkeypatch.setattr(errors.os, "statvfs", lambda folder: none_left if folder == str(tmp_path) else room)
    told = errors.of_the_disk(error)
    assert str(told).startswith(f"{tmp_path}: no space left")
    (tmp_path / "partial").touch()
    with (
        pytest.raises(errors.UserError, match=r"film\.mp4: no space left") as caught,
        errors.full_disk_named("film.mp4", tmp_path / "partial"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "partial").exists()


def test_what_is_no_full_disk_passes_and_an_error_of_ours_stays_as_it_is():
    for error in (KeyError("x"), errors.UserError("a: no space left on device")):
        with pytest.raises(type(error)) as caught, errors.full_disk_named("film.mp4"):
            raise error
        assert caught.value is error


def test_other_errors_of_the_system_keep_their_traceback():
    assert errors.of_the_disk(OSError(errno.ECONNRESET, "reset")) is None
    assert errors.of_the_disk(OSError(errno.EACCES, "of a socket, without a file")) is None
