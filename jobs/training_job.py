"""``loomvideo pretrain`` and ``loomvideo finetune-edit``: train, export, evaluate, record."""

import dataclasses
import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

from loomvideo.jobs import kernels_job
from loomvideo.jobs.heldout import HeldoutResult, evaluate_heldout
from loomvideo.jobs.recipe import LoomVideoRecipe
from loomvideo.jobs.training_config import TrainingJobConfig
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.presets import PIPELINE_FILE, ModelPreset, preset, with_folders
from loomvideo.platform.cluster.doctor import Diagnosis, examine_cluster, preflight
from loomvideo.platform.cluster.metrics import ExportingTracker
from loomvideo.platform.config import flatten, to_yaml
from loomvideo.platform.errors import UserError
from loomvideo.platform.ray_session import in_cluster, ray_session
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.tracking import Tracker
from loomvideo.platform.training.checkpoint import CheckpointFolder
from loomvideo.platform.training.driver import train

logger = logging.getLogger(__name__)
console = Console()


def run_training(job: str, config: TrainingJobConfig, default_parent: str | None = None) -> None:
    """Run or continue one training job.

    Args:
        job: ``pretrain`` or ``finetune-edit``.
        config: The resolved configuration.
        default_parent: The job whose newest finished run is continued when the configuration names no start.

    Raises:
        UserError: for a mistake in configuration or data.
        KeyboardInterrupt: when interrupted, after a checkpoint.
    """
    config.check()
    config = with_absolute_paths(config)
    model = with_folders(preset(config.model), config.codec_folder, config.mllm_folder)
    datasets = [ShardDataset.open(url) for url in config.data.shards]
    for url, dataset in zip(config.data.shards, datasets, strict=True):
        check_fits(url, dataset, datasets[0], model)
    parent = _parent_run(config, default_parent)
    initial_weights = config.from_weights or (str(parent.path / "weights") if parent else None)
    if initial_weights is not None and not Path(initial_weights).exists():
        raise UserError(f"{initial_weights}: no such weights; did that run finish?")
    folder = RunFolder.open(config.runs, job, config.run or None)
    folder.write_text("config.yaml", to_yaml(config))
    tracker = Tracker(folder, config.tracking_uri or None, tags=_lineage(config, datasets, parent))
    console.print(f"{job} {folder.name}: {folder.path}", soft_wrap=True)
    status = "FAILED"
    try:
        tracker.log_params(flatten(config))
        tracker.log_artifact(folder.path / "config.yaml")
        result = _train_and_evaluate(config, model, datasets, initial_weights, folder, tracker)
        tracker.log_artifact(folder.path / "result.json")
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        console.print(f"interrupted; run={folder.name} continues it")
        raise
    finally:
        tracker.finish(status)
    folder.finish(result)


def with_absolute_paths(config: TrainingJobConfig) -> TrainingJobConfig:
    """The same configuration for workers, which run in other folders; URLs and empty values stay."""

    def absolute(path: str) -> str:
        return path if not path or "://" in path else os.path.abspath(path)

    return dataclasses.replace(
        config,
        from_weights=absolute(config.from_weights),
        codec_folder=absolute(config.codec_folder),
        mllm_folder=absolute(config.mllm_folder),
        data=dataclasses.replace(config.data, shards=[absolute(url) for url in config.data.shards]),
        evaluation=dataclasses.replace(config.evaluation, samples=absolute(config.evaluation.samples)),
    )


def check_fits(url: str, dataset: ShardDataset, first: ShardDataset, model: ModelPreset) -> None:
    """Refuse shards that were encoded for another model, or otherwise than the first dataset.

    Raises:
        UserError: naming the dataset and the fix.
    """
    stated = dataset.manifest.config.get("model")
    if stated != model.name:
        raise UserError(
            f"data.shards {url}: encoded for model={stated}, this run is model={model.name}; prepare it again"
        )
    mode = dataset.manifest.features.get("mode", "stored")
    if mode != "stored":
        raise UserError(f"data.shards {url}: features are {mode}, training reads stored ones; use features.mode=stored")
    if dataset.manifest.encoders != first.manifest.encoders:
        raise UserError(
            f"data.shards {url}: encoded by other encoders than the first dataset; prepare one of them again"
        )


def _parent_run(config: TrainingJobConfig, default_parent: str | None) -> RunFolder | None:
    if config.from_weights:
        return None
    if config.from_run:
        job, _, name = config.from_run.rpartition("/")
        parent = RunFolder(Path(config.runs).absolute(), job or default_parent or "pretrain", name)
        if not parent.path.is_dir():
            raise UserError(f"from_run={config.from_run}: {parent.path} does not exist")
        return parent
    if default_parent is None:
        return None
    newest = RunFolder.newest(config.runs, default_parent)
    if newest is None:
        raise UserError(
            f"no finished {default_parent} run in {config.runs}; run it first, or set from_run or from_weights"
        )
    return newest


def _lineage(config: TrainingJobConfig, datasets: list[ShardDataset], parent: RunFolder | None) -> dict[str, str]:
    tags = {"loomvideo.model": config.model}
    for number, (url, dataset) in enumerate(zip(config.data.shards, datasets, strict=True)):
        tags[f"loomvideo.dataset.{number}"] = f"{url} {dataset.digest}"
    if parent is not None:
        tags["loomvideo.parent_run"] = f"{parent.job}/{parent.name}"
        known = parent.read_json("mlflow.json")
        if known:
            tags["loomvideo.parent_mlflow_run"] = known["run_id"]
    return tags


def _train_and_evaluate(
    config: TrainingJobConfig,
    model: ModelPreset,
    datasets: list[ShardDataset],
    initial_weights: str | None,
    folder: RunFolder,
    tracker: Tracker,
) -> dict[str, Any]:
    kernels = dataclasses.replace(
        config.kernels, deepspeed=config.kernels.deepspeed and not config.training.workers.gpus
    )
    recipe_factory = partial(
        LoomVideoRecipe,
        config.model,
        config.objective,
        [dataset.shared()["null"] for dataset in datasets],
        initial_weights,
        config.training.seed,
        kernels,
    )
    with ray_session(num_cpus=_local_cpus(config)):
        if config.doctor and in_cluster():
            _check_cluster(config, folder, tracker)
        exporting = ExportingTracker(tracker, folder.job, folder.name)
        with kernels_job.kernels_on_every_node(kernels, kernels_job.model_shape(model.dit)) as nodes:
            tracker.log_metrics(kernels_job.summary(nodes))
            tracker.log_artifact(folder.write_json("kernels.json", nodes))
            result = train(config.training, recipe_factory, config.data.shards, folder, exporting)
            # Again, with the nodes that joined on the way.
            tracker.log_artifact(folder.write_json("kernels.json", nodes))
        weights = export_weights(config, recipe_factory(), folder)
        result["weights"] = str(weights)
        if config.evaluation.samples:
            cpus = _evaluation_cpus(config)
            task = ray.remote(evaluate_weights).options(num_gpus=min(config.training.workers.gpus, 1), num_cpus=cpus)
            console.print("evaluating on held-out samples")
            tasks = set(datasets[0].index.column("task").to_pylist()) - {
                task for task, weight in config.training.mixture.tasks.items() if weight == 0
            }
            heldout = ray.get(task.remote(config, str(weights), tasks, str(folder.path / "heldout"), cpus))
            _record(heldout, folder, tracker, result["steps"])
            result |= heldout.figures
    folder.write_json("result.json", result)
    return result


def _check_cluster(config: TrainingJobConfig, folder: RunFolder, tracker: Tracker) -> None:
    """Refuse to train on a cluster with a sick node; the findings are kept with the run either way."""
    from loomvideo.jobs.doctor_probes import kernels

    def examine() -> Diagnosis:
        diagnosis = examine_cluster(str(Path(config.runs).absolute()), tracker.uri, extra=(kernels,))
        tracker.log_artifact(folder.write_json("doctor.json", diagnosis.as_dict()))
        return diagnosis

    preflight(examine)


def export_weights(config: TrainingJobConfig, recipe: LoomVideoRecipe, folder: RunFolder) -> Path:
    """Write the averaged weights (the raw ones without an average) of the newest checkpoint to ``weights/``."""
    checkpoint = CheckpointFolder(folder.path / "checkpoints").open()
    kind = "ema" if config.training.ema.decay else "master"
    target, staged = folder.path / "weights", folder.path / "weights.partial"
    shutil.rmtree(staged, ignore_errors=True)
    recipe.export(checkpoint.weights(kind), staged)
    note = {"model": config.model, "step": checkpoint.step, "weights": kind, "run": f"{folder.job}/{folder.name}"}
    (staged / PIPELINE_FILE).write_text(json.dumps(note, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staged, target)
    return target


def evaluate_weights(
    config: TrainingJobConfig, weights: str, tasks: set[str], folder: str, num_threads: int
) -> HeldoutResult:
    """Load exported weights and evaluate them; runs as a Ray task."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(num_threads)
    kernels_job.use_kernels(dataclasses.replace(config.kernels, deepspeed=False), device)
    model = with_folders(preset(config.model), config.codec_folder, config.mllm_folder)
    pipeline = LoomVideoPipeline.from_parts(model, weights, device)
    return evaluate_heldout(pipeline, config.evaluation, tasks, Path(folder))


def _record(heldout: HeldoutResult, folder: RunFolder, tracker: Tracker, step: int) -> None:
    folder.write_json("heldout.json", dataclasses.asdict(heldout))
    tracker.log_metrics({f"heldout/{name}": value for name, value in heldout.figures.items()}, step)
    tracker.log_artifact(folder.path / "heldout", "heldout")


def _evaluation_cpus(config: TrainingJobConfig) -> int:
    """What all workers had, as far as one node has that many."""
    workers = config.training.workers
    if workers.gpus:
        return 1
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return max(1, min(workers.num * workers.cpus, int(largest)))


def _local_cpus(config: TrainingJobConfig) -> int:
    # A laptop with fewer cores than workers still runs them, more slowly.
    workers = config.training.workers
    return max(os.cpu_count() or 1, workers.num * workers.cpus)
