"""Which checkpoint a command means: a training run by name, a path, or the newest run."""

from pathlib import Path

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder

TRAINING_JOBS = ("finetune-edit", "pretrain")


def find_weights(checkpoint: str, runs: str | Path) -> tuple[RunFolder | None, Path]:
    """A checkpoint's training run, if it is one, and its weights.

    Args:
        checkpoint: ``JOB/NAME`` of a training run, a weights path, or empty for the training run that finished last.
        runs: The folder of run folders.

    Raises:
        UserError: if there is no such run or path.
    """
    if checkpoint:
        job, _, rest = checkpoint.partition("/")
        if job in TRAINING_JOBS and rest and (Path(runs) / checkpoint / "weights").exists():
            run = RunFolder(Path(runs).absolute(), job, rest)
            return run, run.path / "weights"
        if Path(checkpoint).exists():
            return None, Path(checkpoint)
        raise UserError(f"checkpoint={checkpoint}: neither a training run with weights under {runs} nor a path")
    found = [run for job in TRAINING_JOBS if (run := RunFolder.newest(runs, job))]
    if not found:
        raise UserError(f"no finished training run in {runs}; run `loomvideo pretrain`, or set checkpoint=")
    newest = max(found, key=lambda run: (run.path / "result.json").stat().st_mtime)
    return newest, newest.path / "weights"
