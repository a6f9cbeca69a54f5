"""Training jobs from start to end: train, export, evaluate, record."""

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from loomvideo.jobs.kernels import build as kernels_job
from loomvideo.jobs.training.checkpoint_samples import sampling_tasks
from loomvideo.jobs.training.config import PreferJobConfig, TrainingJobConfig
from loomvideo.jobs.training.heldout import STRIP, WORDS_STRIP, HeldoutResult, evaluate_heldout
from loomvideo.jobs.training.records import record_datasets, record_model
from loomvideo.jobs.training.setup import (
    START_FILE,
    Start,
    check_fits,
    check_folders,
    check_start,
    predictor,
    recipe_factory,
    start_of,
    tasks_of,
    with_absolute_paths,
)
from loomvideo.jobs.weights.export import ENCODERS_FILE, export_weights, open_checkpoint
from loomvideo.model.kernels.node import model_shape, use_kernels
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import load_pipeline
from loomvideo.model.sizes import ModelSize, model_size, with_folders
from loomvideo.pipelines.evaluation.mlflow_report import NOTE
from loomvideo.pipelines.training.dit_recipe import DiTRecipe
from loomvideo.pipelines.training.feature_pool import feature_pool
from loomvideo.platform.cluster.doctor import Diagnosis, examine_cluster, preflight
from loomvideo.platform.cluster.metrics import ExportingTracker
from loomvideo.platform.config import flatten, to_yaml
from loomvideo.platform.console import console
from loomvideo.platform.machine import usable_cpus
from loomvideo.platform.nodes.devices import device_for
from loomvideo.platform.ray_session import in_cluster, ray_session
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.tracking import Tracker
from loomvideo.platform.training.beside import CheckpointTask
from loomvideo.platform.training.driver import open_shards, train
from loomvideo.platform.training.progress import COMPUTES_FILE, WARNINGS_FILE

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What a way of training is given.

    Attributes:
        config: The resolved configuration.
        model: The model's size, its folders filled in.
        datasets: The shards.
        start: The weights to start from, if any.
        folder: The run's folder.
        tracker: Gets the metrics of training.
        build_recipe: ``build_recipe(policy, number of rounds)`` gives the factory of the run's recipe.
        tasks: What is done with checkpoints beside training.
    """

    config: TrainingJobConfig
    model: ModelSize
    datasets: list[ShardDataset]
    start: str | None
    folder: RunFolder
    tracker: Any
    build_recipe: Callable[..., Callable[[], DiTRecipe]]
    tasks: list[CheckpointTask]


def run_training(
    job: str,
    config: TrainingJobConfig,
    default_parent: str | None = None,
    train_by: Callable[[TrainingRun], dict[str, Any]] | None = None,
) -> None:
    """Run or continue one training job.

    Args:
        job: ``pretrain``, ``finetune-edit``, ``distill`` or ``prefer``.
        config: The resolved configuration.
        default_parent: The job whose newest finished run is continued when the configuration names no start.
        train_by: How it trains; None for one training on the shards.

    Raises:
        UserError: for a mistake in configuration or data.
        KeyboardInterrupt: when interrupted, after a checkpoint.
    """
    config.check()
    config = with_absolute_paths(config)
    model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
    datasets = [ShardDataset.open(url) for url in config.data.shards]
    for url, dataset in zip(config.data.shards, datasets, strict=True):
        check_fits(url, dataset, datasets[0], model)
    check_folders(config, model, datasets)
    start = start_of(config, job, default_parent)
    if start.weights:
        check_start(start.weights, config.data.shards[0], datasets[0])
    folder = RunFolder.open(config.runs, job, config.run or None)
    folder.write_text("config.yaml", to_yaml(config))
    folder.write_json(START_FILE, dataclasses.asdict(start))
    folder.write_json(ENCODERS_FILE, datasets[0].manifest.encoders)
    tracker = Tracker(folder, config.tracking_uri or None, tags=_lineage(config, datasets, start))
    console().print(f"{job} {folder.name}: {folder.path}", soft_wrap=True)
    status = "FAILED"
    try:
        tracker.log_params(flatten(config))
        tracker.log_artifact(folder.path / "config.yaml")
        record_datasets(tracker, config.data.shards, datasets)
        weights, train_by = start.weights or None, train_by or _train_on_shards
        result = _train_and_evaluate(config, model, datasets, weights, folder, tracker, train_by)
        tracker.log_artifact(folder.path / "result.json")
        record_model(tracker, folder, config.model, result, _lineage(config, datasets, start))
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        print(f"interrupted; run={folder.name} continues it")
        raise
    finally:
        tracker.finish(status)
    folder.finish(result)


def _lineage(config: TrainingJobConfig, datasets: list[ShardDataset], start: Start) -> dict[str, str]:
    tags = {"loomvideo.model": config.model}
    for number, (url, dataset) in enumerate(zip(config.data.shards, datasets, strict=True)):
        tags[f"loomvideo.dataset.{number}"] = f"{url} {dataset.digest}"
    parent = start.parent_folder(config.runs)
    if parent is not None:
        tags["loomvideo.parent_run"] = start.parent
        known = parent.read_json("mlflow.json")
        if known:
            tags["loomvideo.parent_mlflow_run"] = known["run_id"]
    return tags


def _train_and_evaluate(
    config: TrainingJobConfig,
    model: ModelSize,
    datasets: list[ShardDataset],
    initial_weights: str | None,
    folder: RunFolder,
    tracker: Tracker,
    train_by: Callable[[TrainingRun], dict[str, Any]],
) -> dict[str, Any]:
    with ray_session(num_cpus=_local_cpus(config)):
        if config.doctor and in_cluster():
            _check_cluster(config, folder, tracker)
        exporting = ExportingTracker(tracker, folder.job, folder.name)
        shape = model_shape(model.dit)
        with (
            kernels_job.kernels_on_every_node(config.kernels, shape) as nodes,
            feature_pool(config.features, model, datasets) as features,
        ):
            tracker.log_metrics(kernels_job.summary(nodes))
            tracker.log_artifact(folder.write_json("kernels.json", nodes))
            build = partial(recipe_factory, config, datasets, initial_weights, config.kernels, features)
            build_recipe, say = build(), partial(console().print, soft_wrap=True)
            tasks = sampling_tasks(config, build_recipe, folder, tracker, tasks_of(config, datasets), say)
            result = train_by(TrainingRun(config, model, datasets, initial_weights, folder, exporting, build, tasks))
            # Again, with the nodes that joined on the way.
            tracker.log_artifact(folder.write_json("kernels.json", nodes))
            for name in (WARNINGS_FILE, COMPUTES_FILE):
                if (folder.path / name).exists():
                    tracker.log_artifact(folder.path / name)
        if result["first_step"] == result["steps"]:
            # Nothing was left to train: what the run said when it did stays.
            result |= folder.read_json("result.json") or {}
        weights = folder.path / "weights"
        kind = "ema" if config.training.ema.decay else "raw"
        export_weights(build_recipe(), config, folder, open_checkpoint(folder), weights, kind, replace=True)
        result["weights"] = str(weights)
        if config.evaluation.samples:
            cpus = _evaluation_cpus(config)
            task = ray.remote(evaluate_weights).options(num_gpus=min(config.training.workers.gpus, 1), num_cpus=cpus)
            console().print("evaluating on held-out samples")
            tasks = tasks_of(config, datasets)
            heldout = ray.get(task.remote(config, str(weights), tasks, str(folder.path / "heldout"), cpus))
            _record(heldout, folder, tracker, result["steps"])
            result |= heldout.figures
            _show(heldout, folder)
    folder.write_json("result.json", result)
    return result


def _train_on_shards(run: TrainingRun) -> dict[str, Any]:
    return train(
        run.config.training,
        run.build_recipe(),
        run.config.data.shards,
        run.folder,
        run.tracker,
        open_dataset=partial(open_shards, reading=run.config.data.reading),
        predict=predictor(run.config, run.model, run.datasets),
        checkpoint_tasks=run.tasks,
    )


def _check_cluster(config: TrainingJobConfig, folder: RunFolder, tracker: Tracker) -> None:
    """Refuse to train on a cluster with a sick node; the findings are kept with the run either way."""
    from loomvideo.jobs.kernels.build import MODEL_PROBES

    def examine() -> Diagnosis:
        diagnosis = examine_cluster(str(Path(config.runs).absolute()), tracker.uri, extra=MODEL_PROBES)
        tracker.log_artifact(folder.write_json("doctor.json", diagnosis.as_dict()))
        return diagnosis

    preflight(examine)


def evaluate_weights(
    config: TrainingJobConfig, weights: str, tasks: set[str], folder: str, num_threads: int
) -> HeldoutResult:
    """Load exported weights and evaluate them; runs as a Ray task."""
    device = device_for(config.training.workers.gpus, "training.workers.gpus")
    if device.type == "cpu":
        torch.set_num_threads(num_threads)
    use_kernels(config.kernels)
    # The job's own kernels stay in use.
    folders = config.codec_folder, config.mllm_folder
    pipeline = load_pipeline(ModelSource(weights, config.model, *folders, kernels="", device=device.type))
    return evaluate_heldout(pipeline, config.evaluation, tasks, Path(folder))


def _record(heldout: HeldoutResult, folder: RunFolder, tracker: Tracker, step: int) -> None:
    folder.write_json("heldout.json", heldout.as_dict())
    tracker.log_metrics({f"heldout/{name}": value for name, value in heldout.figures.items()}, step)
    tracker.log_artifact(folder.path / "heldout", "heldout")
    for strip in (STRIP, WORDS_STRIP):
        if strip in heldout.files:
            tracker.log_picture(folder.path / "heldout" / strip, Path(strip).stem, step)
    tracker.set_tags({NOTE: "\n".join(f"- {line}" for line in heldout.summary)})


def _show(heldout: HeldoutResult, folder: RunFolder) -> None:
    """The figures in words, and last of all what to look at."""
    for line in heldout.summary:
        console().print(f"  {line}", soft_wrap=True)
    if WORDS_STRIP in heldout.files:
        console().print(f"from words alone: {folder.path / 'heldout' / WORDS_STRIP}", soft_wrap=True)
    name = STRIP if STRIP in heldout.files else ""
    console().print(f"to look at: {folder.path / 'heldout' / name}", soft_wrap=True)


def _evaluation_cpus(config: TrainingJobConfig) -> int:
    """What all workers had, as far as one node has that many."""
    workers = config.training.workers
    if workers.gpus:
        return 1
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return max(1, min(workers.num * workers.cpus, int(largest)))


def _local_cpus(config: TrainingJobConfig) -> int:
    # A laptop with fewer cores than a job asks for still runs it, more slowly.
    training, wanted = config.training, config.training.workers.num * config.training.workers.cpus
    if training.validation.beside:
        wanted += training.validation.cpus
    if config.samples.every_steps:
        wanted += config.samples.cpus
    if isinstance(config, PreferJobConfig) and config.prefer.method == "nft":
        # They end before training starts.
        judges = config.judge.actors * math.ceil(config.judge.cpus) if config.judge.kind == "transformers" else 0
        wanted = max(wanted, config.prefer.nft.actors * config.prefer.nft.cpus + judges)
    return max(usable_cpus(), wanted + config.features.actors * config.features.cpus)
