"""Weights folders from checkpoints: staged beside their place, renamed when whole, with a note of what they are."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from loomvideo.jobs.training.config import TrainingJobConfig
from loomvideo.model.sizes import PIPELINE_FILE
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.training.recipe import LoomVideoRecipe
from loomvideo.platform.config import load_config
from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.training.checkpoint import Checkpoint, CheckpointFolder, DamagedCheckpoint

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
    file = run.path / "config.yaml"
    if not file.is_file():
        raise UserError(f"{file}: not found; it says which model the run trains")
    return load_config(TrainingJobConfig, preset_file=file)


def open_checkpoint(run: RunFolder, step: int | None = None) -> Checkpoint:
    """A checkpoint of a run, by default the newest.

    Raises:
        UserError: if it does not exist or is damaged.
    """
    try:
        return CheckpointFolder(run.path / "checkpoints").open(step)
    except DamagedCheckpoint as damage:
        raise UserError(f"damaged checkpoint {damage}") from damage


def run_recipe(config: TrainingJobConfig) -> LoomVideoRecipe:
    """The recipe of a run as far as its weights go, without its data."""
    return LoomVideoRecipe(config.model, config.objective, [], lora=config.lora)


def export_weights(
    recipe: LoomVideoRecipe,
    config: TrainingJobConfig,
    run: RunFolder,
    checkpoint: Checkpoint,
    output: Path,
    kind: str = "",
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
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
        dtype: Of the written tensors.
        replace: Whether a folder that is there already is replaced.

    Raises:
        UserError: if the folder holds weights already, or the checkpoint has none of this kind.
    """
    kind = kind or default_kind(checkpoint)
    if output.exists() and any(output.iterdir()) and not replace:
        raise UserError(f"{output}: already holds weights or other files; name a new folder")
    state = checkpoint.weights(KINDS[kind])
    note = {"model": config.model, "step": checkpoint.step, "weights": kind, "run": f"{run.job}/{run.name}"}
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
