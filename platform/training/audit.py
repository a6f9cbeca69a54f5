"""The resume audit: run a stretch of a run again from one of its checkpoints and compare what it recorded."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder, checkpoints_of
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.driver import train
from loomvideo.platform.training.progress import STEPS_FILE
from loomvideo.platform.training.recipe import Recipe

RELATIVE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AuditRow:
    """One step, as recorded and as repeated."""

    step: int
    same_keys: bool
    same_bits: bool
    loss: float
    repeated_loss: float
    grad_norm: float
    repeated_grad_norm: float

    @property
    def is_close(self) -> bool:
        """Whether losses and gradient norms agree within float tolerance."""
        return math.isclose(self.loss, self.repeated_loss, rel_tol=RELATIVE_TOLERANCE) and math.isclose(
            self.grad_norm, self.repeated_grad_norm, rel_tol=10 * RELATIVE_TOLERANCE
        )


def read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """The records of a ``steps.jsonl`` by step; a step recorded twice counts as last recorded."""
    records: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            records[record["step"]] = record
    return records


def checkpoint_to_audit(run: Path, config: TrainingConfig, step: int, num_steps: int, steps_per_round: int = 0) -> int:
    """The step of a checkpoint after which the run recorded enough steps.

    Args:
        run: The run's folder.
        config: Its configuration.
        step: The checkpoint that is asked for; 0 takes the newest that will do.
        num_steps: Steps to repeat.
        steps_per_round: Where a run trains in rounds, how many steps each has: all must be of one; 0 for no rounds.

    Raises:
        UserError: if there is none.
    """
    recorded, folder = read_steps(run / STEPS_FILE), _checkpoints(run, config)
    usable = [k for k in folder.steps() if all(k + i in recorded for i in range(1, num_steps + 1))]
    if steps_per_round:
        usable = [k for k in usable if k % steps_per_round + num_steps <= steps_per_round]
    if not usable or (step and step not in usable):
        have = ", ".join(map(str, folder.steps())) or "none"
        of_round = f" in its round of {steps_per_round}" if steps_per_round else ""
        raise UserError(
            f"{run}: no checkpoint{f' of step {step}' if step else ''} with {num_steps} recorded steps after "
            f"it{of_round} (checkpoints: {have}; last step {max(recorded, default=0)}); set "
            "training.checkpoint.keep_last higher, or repeat fewer steps"
        )
    return step or usable[-1]


def _checkpoints(run: Path, config: TrainingConfig) -> CheckpointFolder:
    return CheckpointFolder(checkpoints_of(config.checkpoint, RunFolder(run.parent.parent, run.parent.name, run.name)))


def audit_resume(
    run: Path,
    config: TrainingConfig,
    recipe_factory: Callable[[], Recipe],
    datasets: Sequence[str],
    scratch: Path,
    step: int = 0,
    num_steps: int = 5,
    open_dataset: Callable[[str], Any] | None = None,
) -> list[AuditRow]:
    """Repeat steps ``step + 1 .. step + num_steps`` of a run.

    Args:
        run: The run's folder.
        config: Its configuration; a changed number of workers is allowed.
        recipe_factory, datasets, open_dataset: What :func:`train` takes.
        scratch: Folder for the repetition.
        step: The checkpoint to start from; 0 takes the newest that has enough recorded steps after it.
        num_steps: Steps to repeat.

    Raises:
        UserError: if there is no such checkpoint, or the run did not record the steps after it.
    """
    step = checkpoint_to_audit(run, config, step, num_steps)
    recorded, folder = read_steps(run / STEPS_FILE), _checkpoints(run, config)
    repetition = RunFolder.open(scratch, "audit", f"{run.name}-{step}")
    shutil.rmtree(repetition.path)
    repetition = RunFolder.open(scratch, "audit", f"{run.name}-{step}")
    copy = repetition.path / "checkpoints" / folder.name_of(step)
    copy.parent.mkdir()
    folder.storage.fs.get(folder.storage.full_path(folder.name_of(step)), str(copy), recursive=True)
    config.pack.per_step = folder.open(step).state["planner"]["packs_per_step"]
    # None of these changes what is compared.
    config.checkpoint.url = ""
    config.validation.every_steps, config.profile_steps = 0, []
    train(config, recipe_factory, datasets, repetition, open_dataset=open_dataset, last_step=step + num_steps)
    repeated = read_steps(repetition.path / STEPS_FILE)
    rows = []
    for number in range(step + 1, step + num_steps + 1):
        one, other = recorded[number], repeated[number]
        rows.append(
            AuditRow(
                number,
                one["keys_digest"] == other["keys_digest"],
                (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"]),
                one["loss"],
                other["loss"],
                one["grad_norm"],
                other["grad_norm"],
            )
        )
    return rows
