"""Which run, step or weights a person means: one way to write it, read here for every command.

A reference is ``JOB/NAME``, ``NAME`` (of whichever job has such a run), or the path of a run's folder, each with an
optional ``@STEP``. Where weights are meant, a weights folder or file, or nothing for the newest run, will do too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder

STEP_FOLDER = re.compile(r"step-(\d+)")
TRAINING_JOBS = ("finetune-edit", "pretrain")
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


def find_weights(
    checkpoint: str, runs: str | Path, setting: str = "checkpoint", preferred: str | None = None
) -> tuple[RunFolder | None, Path]:
    """The run that a checkpoint is of, if it is a run's, and its weights.

    Weights of a single step are written beside the run's, averaged where it has an average, when first asked for.

    Args:
        checkpoint: A run reference, a weights folder or file, or empty for the training run that finished last.
        runs: The folder of all runs.
        setting: The key that holds it, for error messages.
        preferred: The job to take when runs of several jobs have the name.

    Raises:
        UserError: if there is no such run or path, or the run has no weights.
    """
    if not checkpoint:
        newest = [run for job in TRAINING_JOBS if (run := RunFolder.newest(runs, job))]
        if not newest:
            raise UserError(f"no finished training run in {runs}; run `loomvideo pretrain`, or set {setting}=")
        run = max(newest, key=lambda run: (run.path / "result.json").stat().st_mtime)
        return run, _weights_of(run, f"{setting}={run.job}/{run.name}")
    place, step = split_step(checkpoint)
    path = Path(place)
    if step is None and (path.is_file() or (path.is_dir() and not _is_run(path) and not _is_reference(place, runs))):
        return None, path
    found = find_run(checkpoint, runs, setting=setting, preferred=preferred)
    if found.step is None:
        return found.run, _weights_of(found.run, f"{setting}={checkpoint}")
    from loomvideo.jobs.weights.export import weights_of_step

    return found.run, weights_of_step(found.run, found.step)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and not (path / "config.json").is_file()


def _is_reference(place: str, runs: str | Path) -> bool:
    if "/" in place:
        return place.partition("/")[0] in TRAINING_JOBS and (Path(runs) / place).is_dir()
    return any((Path(runs) / job / place).is_dir() for job in TRAINING_JOBS)


def _weights_of(run: RunFolder, where: str) -> Path:
    if not (run.path / "weights").is_dir():
        raise UserError(f"{where}: {run.path} has no weights yet; @STEP takes those of a checkpoint")
    return run.path / "weights"


def _known(root: Path, jobs: Sequence[str]) -> str:
    names = [f"{job}/{path.name}" for job in jobs for path in sorted((root / job).glob("*")) if path.is_dir()]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return shown or "none"
