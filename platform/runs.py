"""Run folders: ``runs/<job>/<run name>/`` with the resolved configuration, logs and ``result.json``."""

import datetime
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loomvideo.platform.console import console, values_table
from loomvideo.platform.errors import UserError, full_disk_named
from loomvideo.platform.folders import lock
from loomvideo.platform.time_limits import RUN_HELD

CONFIG_FILE = "config.yaml"
RUN_NAME = re.compile(r"[0-9a-zA-Z][0-9a-zA-Z._-]{0,62}")
LOCK_FILE = ".lock"
# The runs of this process; the locks end with it.
_held: dict[Path, IO | None] = {}


def new_run_name() -> str:
    """A name for a run that was given none, from the time of day."""
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; the same job and name always give the same folder, which is what makes a run resumable."""

    root: Path
    job: str
    name: str

    @classmethod
    def open(cls, root: str | Path, job: str, name: str | None = None) -> "RunFolder":
        """Create or reopen a run's folder for this process alone; without a name, a new one from the time of day.

        Raises:
            UserError: if the name cannot be a folder and experiment name, or another process works on that run.
        """
        root = Path(root).absolute()
        if not name:
            return cls._new(root, job)
        if not RUN_NAME.fullmatch(name):
            raise UserError(f"run={name!r}: use letters, digits, '.', '_' and '-', at most 63 characters")
        folder = cls(root, job, name)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._hold()
        return folder

    @classmethod
    def _new(cls, root: Path, job: str) -> "RunFolder":
        for number in itertools.count(1):
            folder = cls(root, job, new_run_name() + (f"-{number}" if number > 1 else ""))
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.path.mkdir()
            except FileExistsError:  # another run began in the same second
                continue
            folder._hold()
            return folder
        raise AssertionError("numbers end")

    def _hold(self) -> None:
        if self.path in _held:
            return
        try:
            _held[self.path] = lock(self.path / LOCK_FILE, RUN_HELD.here())
        except BlockingIOError as error:
            raise UserError(
                f"run={self.name}: {error.strerror} works on {self.path}; wait for it, or give this one another name"
            ) from error

    @classmethod
    def newest(cls, root: str | Path, job: str) -> "RunFolder | None":
        """The run of a job that finished last (the one whose ``result.json`` is newest)."""
        results = sorted(Path(root).absolute().glob(f"{job}/*/result.json"), key=lambda path: path.stat().st_mtime)
        return cls(Path(root).absolute(), job, results[-1].parent.name) if results else None

    @property
    def path(self) -> Path:
        """The folder."""
        return self.root / self.job / self.name

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None when there is none."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    def write_json(self, name: str, values: dict[str, Any]) -> Path:
        """Write a JSON file of the folder through a temporary name."""
        return self.write_text(name, json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the folder through a temporary name."""
        path = self.path / name
        partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        with full_disk_named(path, partial):
            partial.write_text(text)
            partial.replace(path)
        return path

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result.json`` and print it as a short table."""
        path = self.write_json("result.json", result)
        out = console()
        out.print(values_table(result, f"{self.job} {self.name}"))
        out.print(f"result: {path}", soft_wrap=True)
