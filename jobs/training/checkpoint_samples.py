"""Held-out samples made from a run's checkpoints while it trains: ``samples/step-00000500/`` and MLflow."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loomvideo.jobs.training.config import TrainingJobConfig
from loomvideo.jobs.training.heldout import STRIP, HeldoutResult, evaluate_heldout
from loomvideo.model.loading import dtype_on
from loomvideo.model.pipeline import pipeline_around
from loomvideo.model.sizes import model_size, with_folders
from loomvideo.pipelines.training.dit_recipe import DiTRecipe
from loomvideo.platform.nodes.devices import device_for
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.tracking import Tracker
from loomvideo.platform.training.beside import CheckpointTask, load_checkpoint_weights
from loomvideo.platform.training.checkpoint import Checkpoint

SAMPLES_FOLDER = "samples"


def sampling_tasks(
    config: TrainingJobConfig,
    build_recipe: Callable[[], DiTRecipe],
    folder: RunFolder,
    tracker: Tracker,
    tasks: set[str],
    say: Callable[[str], None],
) -> list[CheckpointTask]:
    """The task that samples from checkpoints; none when ``samples.every_steps`` is 0 or no samples are named.

    Args:
        config: The configuration of the run.
        build_recipe: Builds the model.
        folder: The folder of the run.
        tracker: Gets figures and files.
        tasks: What the run trains.
        say: Shows a line to the user.
    """
    samples = config.samples
    if not samples.every_steps:
        return []
    if not config.evaluation.samples:
        say(f"samples.every_steps={samples.every_steps}: no strips are made; set evaluation.samples to a sample file")
        return []
    heldout = dataclasses.replace(
        config.evaluation, num_edits=samples.num_edits, num_generated=samples.num_generated, num_films=2
    )

    def sample(path: str) -> HeldoutResult:
        checkpoint = Checkpoint(path)
        device = device_for(samples.gpus, "samples.gpus")
        model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
        recipe = build_recipe()
        dit = recipe.build_model().to(device, dtype_on(device))
        load_checkpoint_weights(dit, checkpoint, "ema" if "ema" in checkpoint.kinds else "master")
        pipeline = pipeline_around(dit, model, recipe.few_steps)
        return evaluate_heldout(pipeline, heldout, tasks, _folder_of(folder, checkpoint.step), controls=False)

    def record(step: int, result: Any) -> None:
        where = _folder_of(folder, step)
        tracker.log_metrics({f"samples/{name}": value for name, value in result.figures.items()}, step)
        for picture in sorted(where.glob("*.png")):
            tracker.log_picture(picture, f"samples/{picture.stem}", step)
        tracker.log_artifact(where, f"{SAMPLES_FOLDER}/{where.name}")
        shown = where / STRIP if (where / STRIP).is_file() else where
        say(f"step {step}: {', '.join([*result.summary, f'to look at: {shown}'])}")

    resources = {"num_cpus": samples.cpus, "num_gpus": samples.gpus}
    return [CheckpointTask("samples", samples.every_steps, sample, record, resources)]


def _folder_of(folder: RunFolder, step: int) -> Path:
    return folder.path / SAMPLES_FOLDER / f"step-{step:08d}"
