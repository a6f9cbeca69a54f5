"""Which run, step or weights a person means: one way to write it, read here for every command.

A reference is ``JOB/NAME``, ``NAME`` (of whichever job has such a run), or the path of a run's folder, each with an
optional ``@STEP``. Where weights are meant (:mod:`loomvideo.jobs.weights.lookup`), a weights folder or file, or nothing
for the newest run, will do too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder

STEP_FOLDER = re.compile(r"step-(\d+)")
TRAINING_JOBS = ("finetune-edit", "pretrain", "distill", "prefer")
REFERENCE_HELP = "a run: JOB/NAME, NAME or its folder"
CHECKPOINT_HELP = f"{REFERENCE_HELP}; @STEP after it names one checkpoint"
CHECKPOINT_KEY = (
    "a training run (JOB/NAME, NAME or its folder; @STEP after it takes one checkpoint), a weights folder or "
    "gen_model.pth; empty takes the run that finished last"
)


@dataclass(frozen=True)
class RunReference:
    """A run that exists and, where one was named, a step of it."""

    run: RunFolder
    step: int | None = None


def split_step(text: str) -> tuple[str, int | None]:
    """A reference without its ``@STEP``, and the step.

    Raises:
        UserError: if what follows ``@`` is no number.
    """
    place, at, step = text.rpartition("@")
    if not at or "/" in step:
        return text, None
    if not step.isdigit():
        raise UserError(f"{text}: the part after @ is a step, such as {place}@500")
    return place, int(step)


def find_run(
    text: str, runs: str | Path, jobs: Sequence[str] = TRAINING_JOBS, setting: str = "", preferred: str | None = None
) -> RunReference:
    """The run that a reference names.

    Args:
        text: The reference.
        runs: The folder of all runs.
        jobs: The jobs whose runs may be meant.
        setting: The key or option that holds it, for error messages.
        preferred: The job to take when runs of several jobs have the name.

    Raises:
        UserError: if there is no such run, or several.
    """
    place, step = split_step(text)
    where = f"{setting}={text}" if setting else text
    root = Path(runs).absolute()
    job, slash, name = place.partition("/")
    if slash and job in jobs and name and "/" not in name:
        found = [RunFolder(root, job, name)]
    elif not slash:
        found = [RunFolder(root, job, place) for job in jobs] if place else []
    else:
        found = []
    found = [run for run in found if run.path.is_dir()]
    if len(found) > 1:
        found = [run for run in found if run.job == preferred] or found
    if len(found) > 1:
        raise UserError(
            f"{where}: several runs have this name; write {' or '.join(f'{r.job}/{r.name}' for r in found)}"
        )
    if not found and place and Path(place).is_dir():
        path = Path(place).absolute()
        named = STEP_FOLDER.fullmatch(path.name)
        if named:
            path, step = path.parent, int(named[1])
        if path.name == "checkpoints":
            path = path.parent
        found = [RunFolder(path.parent.parent, path.parent.name, path.name)]
    if not found:
        raise UserError(
            f"{where}: no such run of {' or '.join(jobs)} in {runs}, and no folder; there are {_known(root, jobs)}"
        )
    return RunReference(found[0], step)


def _known(root: Path, jobs: Sequence[str]) -> str:
    names = [f"{job}/{path.name}" for job in jobs for path in sorted((root / job).glob("*")) if path.is_dir()]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return shown or "none"
