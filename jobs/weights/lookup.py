"""The weights that ``checkpoint=`` and ``from_run=`` mean: a run's, one of its steps', or a path."""

from pathlib import Path

from loomvideo.jobs.weights.references import TRAINING_JOBS, find_run, split_step
from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder


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
