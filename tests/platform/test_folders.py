"""Two runs on one folder, and folders that cannot be renamed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loomvideo.platform import folders, runs, tracking
from loomvideo.platform.errors import UserError
from loomvideo.platform.folders import give_name, locked
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.time_limits import TimeLimit

OTHER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on elsewhere"); file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A run's folder that another process works in."""
    path = tmp_path / "pretrain/one/.lock"
    path.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_that_another_process_works_on_is_one_line(tmp_path, held, monkeypatch):
    monkeypatch.setattr(runs, "RUN_HELD", TimeLimit(0.0, "test"))
    with pytest.raises(UserError, match=r"run=one: process 7 on elsewhere works on .*; wait for it, or give") as caught:
        RunFolder.open(tmp_path, "pretrain", "one")
    assert "\n" not in str(caught.value)
    assert RunFolder.open(tmp_path, "pretrain", "two").name == "two"
    held.kill()
    held.wait()
    assert RunFolder.open(tmp_path, "pretrain", "one").name == "one"
    assert RunFolder.open(tmp_path, "pretrain", "one").name == "one"  # again in the same process


def test_runs_without_a_name_that_begin_in_one_second_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "new_run_name", lambda: "20260101-000000")
    assert [RunFolder.open(tmp_path, "pretrain").name for _ in range(3)] == [
        "20260101-000000", "20260101-000000-2", "20260101-000000-3",
    ]  # fmt: skip


def test_file_systems_without_locks_and_closed_folders_are_worked_in_all_the_same(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    with locked(tmp_path / "x", 0.0):
        assert RunFolder.open(tmp_path, "pretrain", "one").path.is_dir()


def test_a_local_store_is_made_by_one_process_at_a_time(tmp_path):
    with (
        tracking._alone(f"sqlite:///{tmp_path}/runs/mlflow.db"),
        pytest.raises(BlockingIOError, match=str(os.getpid())),
    ):
        folders.lock(tmp_path / "runs/.mlflow.db.lock", 0.0)
    with tracking._alone(f"sqlite:///{tmp_path}/runs/mlflow.db"), tracking._alone("http://tracking:5000"):
        pass
    assert tracking._patient("http://tracking:5000") == "http://tracking:5000"
    assert tracking._patient("sqlite:////runs/mlflow.db").startswith("sqlite:////runs/mlflow.db?timeout=")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOTSUP, errno.EPERM])
def test_where_folders_cannot_be_renamed_files_move_and_the_one_that_vouches_last(tmp_path, monkeypatch, number):
    moved = []
    rename, replace = Path.rename, Path.replace

    def refuse(self, target):
        if self.is_dir():
            raise OSError(number, os.strerror(number))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(Path, "replace", lambda self, target: (moved.append(self.name), replace(self, target)))
    partial = tmp_path / ".partial"
    for name in ("a_record.json", "z/deep.bin", "b.bin"):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(name)
    give_name(partial, tmp_path / "final", "a_record.json")
    assert moved[-1] == "a_record.json"
    assert (tmp_path / "final/z/deep.bin").read_text() == "z/deep.bin"
    assert not partial.exists()


def test_a_folder_that_is_there_and_a_failing_disk_are_errors(tmp_path, monkeypatch):
    for name in ("partial", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    with pytest.raises(OSError, match="not empty"):
        give_name(tmp_path / "partial", tmp_path / "final", "x")
    assert (tmp_path / "partial/x").exists()
