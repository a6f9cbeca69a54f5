"""Weights folders from checkpoints: staged beside their place, renamed when whole, with a note of what they are."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loomvideo.jobs.training.config import TrainingJobConfig, job_schema
from loomvideo.jobs.training.methods import recipe_class
from loomvideo.jobs.weights.references import find_run, split_step
from loomvideo.model.sizes import ENCODERS_KEY, LEFT_OUT_KEY, PIPELINE_FILE
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.training.dit_recipe import DiTRecipe
from loomvideo.platform.config import load_config
from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import CONFIG_FILE, RunFolder
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder, checkpoints_of
from loomvideo.platform.training.config import CheckpointConfig

ENCODERS_FILE = "encoders.json"
"""What the shards of a run were encoded with, in its folder."""
# Names of weights for people, and what checkpoints call them.
KINDS = {"ema": "ema", "raw": "master"}
NAMES = {stored: name for name, stored in KINDS.items()}
EXPORTS_FOLDER = "exports"


def default_kind(checkpoint: Checkpoint) -> str:
    """``ema`` where the checkpoint has an average, else ``raw``."""
    return "ema" if "ema" in checkpoint.kinds else "raw"


def run_config(run: RunFolder) -> TrainingJobConfig:
    """The configuration that a run was made with.

    Raises:
        UserError: if the folder is no training run's.
    """
    file = run.path / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{file}: not found; it says which model the run trains")
    return load_config(job_schema(run.job), preset_file=file)


@dataclass(frozen=True)
class RunCheckpoints:
    """The checkpoints of a run, which need not be where its folder is.

    Attributes:
        run: The run; of one that was named by a URL, nothing but job and name are meaningful.
        folder: Its checkpoints.
        step: The one that was named, if any.
    """

    run: RunFolder
    folder: CheckpointFolder
    step: int | None = None

    @classmethod
    def of(cls, run: RunFolder, step: int | None = None) -> "RunCheckpoints":
        """Those of a run's folder, or of the URL that its configuration states."""
        stated = (run.path / CONFIG_FILE).is_file()
        config = run_config(run).training.checkpoint if stated else CheckpointConfig()
        return cls(run, CheckpointFolder(checkpoints_of(config, run)), step)

    @classmethod
    def find(cls, reference: str, runs: str | Path) -> "RunCheckpoints":
        """Those of a reference (see :mod:`loomvideo.jobs.weights.references`), or of ``URL/JOB/NAME[@STEP]``.

        Raises:
            UserError: if there is no such run, or it has no checkpoint.
        """
        if "://" in reference:
            place, step = split_step(reference)
            root, job, name = place.rstrip("/").rsplit("/", 2)
            found = cls(RunFolder(Path(root), job, name), CheckpointFolder(f"{place.rstrip('/')}/checkpoints"), step)
        else:
            named = find_run(reference, runs)
            found = cls.of(named.run, named.step)
        if not found.folder.steps():
            raise UserError(f"{reference}: {found.folder.url} holds no checkpoints")
        return found

    def config(self) -> TrainingJobConfig:
        """The run's configuration, which lies beside checkpoints elsewhere too."""
        storage = Storage(self.folder.url.rsplit("/", 1)[0])
        if not storage.exists(CONFIG_FILE):
            raise UserError(f"{storage.url}/{CONFIG_FILE}: not found; it says which model the run trains")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / CONFIG_FILE
            copy.write_bytes(storage.read_bytes(CONFIG_FILE))
            return load_config(job_schema(self.run.job), preset_file=copy)

    def open(self) -> Checkpoint:
        """The named checkpoint, else the newest.

        Raises:
            UserError: if it does not exist or is damaged.
        """
        try:
            return self.folder.open(self.step)
        except DamagedCheckpoint as damage:
            raise UserError(f"damaged checkpoint {damage}") from damage


def open_checkpoint(run: RunFolder, step: int | None = None) -> Checkpoint:
    """A checkpoint of a run, by default the newest.

    Raises:
        UserError: if it does not exist or is damaged.
    """
    return RunCheckpoints.of(run, step).open()


def run_recipe(config: TrainingJobConfig) -> DiTRecipe:
    """The recipe of a run as far as its weights go, without its data."""
    return recipe_class(config)(config.model, config.objective, [], lora=config.lora)


def export_weights(
    recipe: DiTRecipe,
    config: TrainingJobConfig,
    run: RunFolder,
    checkpoint: Checkpoint,
    output: Path,
    kind: str = "",
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
    base: str = "",
) -> str:
    """Write a checkpoint as a weights folder under the published names, adapters merged; returns the kind written.

    One parameter at a time is in memory. Killed half-way, ``output`` is what it was before.

    Args:
        recipe: The run's; it knows the published names and its adapters.
        config: The run's configuration.
        run: The run.
        checkpoint: One of its checkpoints.
        output: The folder to write.
        kind: ``ema`` or ``raw``; empty takes ``ema`` where the checkpoint has it.
        dtype: The type of the written tensors.
        replace: Whether a folder that is there already is replaced.
        base: Where the weights are now that a run with frozen parameters started from; empty for where they were.

    Raises:
        UserError: if the folder holds weights already, or the checkpoint has none of this kind.
    """
    kind = kind or default_kind(checkpoint)
    if output.exists() and any(output.iterdir()) and not replace:
        raise UserError(f"{output}: already holds weights or other files; name a new folder")
    state = checkpoint.weights(KINDS[kind], recipe.open_base(checkpoint.base, base))
    note: dict[str, Any] = {
        "model": config.model,
        "step": checkpoint.step,
        "weights": kind,
        "run": f"{run.job}/{run.name}",
    }
    note[LEFT_OUT_KEY] = sorted(task for task, weight in config.training.mixture.tasks.items() if weight == 0)
    if encoders := run.read_json(ENCODERS_FILE):
        note[ENCODERS_KEY] = encoders
    note |= recipe.note()
    with staged_folder(output) as staged:
        save_dit(recipe.published(state), recipe.config, staged, dtype=dtype)
        (staged / PIPELINE_FILE).write_text(json.dumps(note, indent=2) + "\n")
    return kind


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A folder that takes the place of ``output`` when the body is done, and leaves no trace when it fails."""
    staged = output.with_name(f"{output.name}.partial-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield staged
        if output.exists():
            shutil.rmtree(output)
        os.replace(staged, output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def weights_of_step(run: RunFolder, step: int) -> Path:
    """The weights folder of one step of a run, written under ``exports/`` when it is not there yet.

    Raises:
        UserError: if the run has no checkpoint of the step.
    """
    checkpoint = open_checkpoint(run, step)
    output = run.path / EXPORTS_FOLDER / f"step-{step:08d}-{default_kind(checkpoint)}"
    if not (output / PIPELINE_FILE).is_file():
        config = run_config(run)
        export_weights(run_recipe(config), config, run, checkpoint, output, replace=True)
    return output
