"""The command line: what a person can mend is one line and exit code 2, what he cannot keeps its traceback."""

import errno

import pytest

from loomvideo.jobs import cli
from loomvideo.platform import errors
from loomvideo.platform.errors import UserError


class OfAWorkerError(UserError):
    """As Ray raises it."""

    def __init__(self, cause):
        super().__init__("ray::prepare()\n  a traceback")
        self.cause = cause


class OfADiskError(OSError):
    """As Ray raises it: no number and no file of its own."""

    def __init__(self, cause):
        super().__init__("ray::prepare()\n  a traceback")
        self.cause = cause


@pytest.fixture
def run(monkeypatch):
    """Run the command line with a command that fails so."""

    def call(error):
        def app():
            raise error

        monkeypatch.setattr(cli, "make_ordinary", lambda: None)
        monkeypatch.setattr(cli, "app", app)
        cli.main()

    return call


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("lr=x: use a number"), "error: lr=x: use a number\n"),
        (OfAWorkerError(UserError("data: x is no dataset")), "error: data: x is no dataset\n"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "error: /here: no space left; free some"),
        (
            OfADiskError(PermissionError(errno.EACCES, "Permission denied", "/ro")),
            "error: /ro: permission denied",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/ro"), "error: /ro: permission denied; give yourself"),
    ],
)
def test_a_mistake_is_one_line(run, capsys, monkeypatch, error, line):
    monkeypatch.setattr(errors, "_full_folders", lambda: ["/here"])
    with pytest.raises(SystemExit) as caught:
        run(error)
    shown = capsys.readouterr().err
    assert caught.value.code == 2
    assert shown.startswith(line)
    assert shown.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback(run):
    with pytest.raises(ConnectionResetError):
        run(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))
