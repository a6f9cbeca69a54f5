"""What a training job is made of: its start, its datasets, its recipe, and what was planned for it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loomvideo.jobs.training.config import DistillJobConfig, PreferJobConfig, TrainingJobConfig
from loomvideo.jobs.training.methods import recipe_class
from loomvideo.jobs.training.plan import Machine, machine_named, plan
from loomvideo.jobs.weights.lookup import find_weights
from loomvideo.model.sizes import ENCODERS_KEY, PIPELINE_FILE, ModelSize, stated_note
from loomvideo.pipelines.training.dit_recipe import DiTRecipe, StateSource
from loomvideo.pipelines.training.feature_pool import feature_mode
from loomvideo.platform.errors import UserError
from loomvideo.platform.folders import absolute
from loomvideo.platform.nodes.config import KernelConfig
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.training.hardware import peak_tflops
from loomvideo.platform.training.packing import planner_of

START_FILE = "start.json"


def with_absolute_paths(config: TrainingJobConfig) -> TrainingJobConfig:
    """The same configuration for workers, which run in other folders; URLs and empty values stay."""
    checkpoint = config.training.checkpoint
    checkpoint = dataclasses.replace(checkpoint, url=absolute(checkpoint.url))
    if isinstance(config, PreferJobConfig):
        rewards = config.prefer.rewards
        # A name that is no place is a published network's.
        given = {name: absolute(v) if Path(v).exists() else v for name, v in rewards.learned_weights.items()}
        rewards = dataclasses.replace(rewards, learned_weights=given)
        config = dataclasses.replace(config, prefer=dataclasses.replace(config.prefer, rewards=rewards))
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, checkpoint=checkpoint),
        from_weights=absolute(config.from_weights),
        codec_folder=absolute(config.codec_folder),
        mllm_folder=absolute(config.mllm_folder),
        data=dataclasses.replace(
            config.data,
            shards=[absolute(url) for url in config.data.shards],
            reading=dataclasses.replace(config.data.reading, cache=absolute(config.data.reading.cache)),
        ),
        evaluation=dataclasses.replace(config.evaluation, samples=absolute(config.evaluation.samples)),
    )


def check_fits(url: str, dataset: ShardDataset, first: ShardDataset, model: ModelSize) -> None:
    """Refuse shards that were encoded for another model, or otherwise than the first dataset.

    Raises:
        UserError: naming the dataset and the fix.
    """
    stated = dataset.manifest.config.get("model")
    if stated != model.name:
        raise UserError(
            f"data.shards {url}: encoded for model={stated}, this run is model={model.name}; prepare it again"
        )
    if dataset.manifest.encoders != first.manifest.encoders:
        raise UserError(
            f"data.shards {url}: encoded by other encoders than the first dataset; prepare one of them again"
        )


def check_start(weights: str, url: str, dataset: ShardDataset) -> None:
    """Refuse weights that were trained with other encoders than the shards', as far as their folder says with which.

    Nothing else would tell: states and latents have the same shapes, and training only takes long to unlearn.

    Raises:
        UserError: naming both and the fix.
    """
    stated, own = stated_note(weights).get(ENCODERS_KEY, {}), dataset.manifest.encoders
    for part in sorted(stated.keys() & own.keys()):
        if stated[part] != own[part]:
            raise UserError(
                f"data.shards {url}: encoded by {part} {own[part]}, but {weights} was trained with {stated[part]}; "
                f"prepare the shards with that one, or start from weights that fit them (to start from these all the "
                f"same, take {ENCODERS_KEY} out of their {PIPELINE_FILE})"
            )


def check_folders(config: TrainingJobConfig, model: ModelSize, datasets: Sequence[ShardDataset]) -> None:
    """Refuse a run that would find a folder missing only when its MLLM or codec is loaded, after the GPUs are taken.

    Raises:
        UserError: naming the key, what needs it, and the fix.
    """
    streamed = [dataset.storage.url for dataset in datasets if feature_mode(dataset) != "stored"]
    needs_mllm = [f"data.shards {url} (its MLLM states are streamed)" for url in streamed]
    makes_samples = [key for key, on in (
        ("evaluation.samples", config.evaluation.samples), ("samples.every_steps", config.samples.every_steps)
    ) if on]  # fmt: skip
    for key, needed, folder, users in (
        ("mllm_folder", model.mllm.kind == "qwen3_vl", model.mllm.folder, [*needs_mllm, *makes_samples]),
        ("codec_folder", model.codec.kind == "wan", model.codec.folder, makes_samples),
    ):
        if not needed or not users:
            continue
        if not folder:
            raise UserError(f"{key}: set it to a folder that every node sees; {users[0]} needs it")
        if "://" not in folder and not Path(folder).is_dir():
            raise UserError(f"{key}={folder}: no such folder; {users[0]} needs it")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        weights: A weights folder or file; empty for random weights.
        parent: ``JOB/NAME`` of the run they come from, if any.
    """

    weights: str = ""
    parent: str = ""

    def parent_folder(self, runs: str) -> RunFolder | None:
        """The parent's folder."""
        job, _, name = self.parent.rpartition("/")
        return RunFolder(Path(runs).absolute(), job, name) if name else None


def start_of(config: TrainingJobConfig, job: str, default_parent: str | None) -> Start:
    """Where a run starts; one that names no start and is continued keeps that of its first start.

    Otherwise a pretrain run that finished in between would change what a continued finetune run stands on.

    Raises:
        UserError: if the named run or its weights do not exist.
    """
    start = _named_start(config, default_parent)
    if start is None:
        known = RunFolder(Path(config.runs).absolute(), job, config.run).read_json(START_FILE) if config.run else None
        start = Start(**known) if known else _default_start(config, default_parent)
    if start.weights and not Path(start.weights).exists():
        raise UserError(f"{start.weights}: no such weights; did that run finish?")
    return start


def _named_start(config: TrainingJobConfig, default_parent: str | None) -> Start | None:
    if config.from_weights:
        return Start(config.from_weights)
    if not config.from_run:
        return None
    preferred = default_parent or "pretrain"
    parent, weights = find_weights(config.from_run, config.runs, setting="from_run", preferred=preferred)
    return Start(str(weights), f"{parent.job}/{parent.name}" if parent else "")


def _default_start(config: TrainingJobConfig, default_parent: str | None) -> Start:
    if default_parent is None:
        return Start()
    newest = RunFolder.newest(config.runs, default_parent)
    if newest is None:
        raise UserError(
            f"no finished {default_parent} run in {config.runs}; run it first, or set from_run or from_weights"
        )
    return Start(str(newest.path / "weights"), f"{newest.job}/{newest.name}")


def recipe_factory(
    config: TrainingJobConfig,
    datasets: Sequence[ShardDataset],
    initial_weights: str | None = None,
    kernels: KernelConfig | None = None,
    features: StateSource | None = None,
    policy: str = "",
    num_rounds: int = 0,
) -> Callable[[], DiTRecipe]:
    """A picklable function that builds the run's recipe on a worker.

    Args:
        config: The configuration of the job.
        datasets: Its datasets of shards.
        initial_weights: Where the model starts; None from scratch.
        kernels: Which kernels a rank loads.
        features: Computes states that are not stored.
        policy: The weights folder of a round's policy.
        num_rounds: Rounds that are read instead of the shards, whose conditioning they have.
    """
    null_states = [dataset.shared()["null"] for dataset in datasets]
    return partial(
        recipe_class(config, policy),
        config.model,
        config.objective,
        null_states[:1] * num_rounds or null_states,
        initial_weights,
        config.training.seed,
        kernels,
        config.lora,
        features,
    )


def tasks_of(config: TrainingJobConfig, datasets: Sequence[ShardDataset]) -> set[str]:
    """The tasks that a run trains."""
    present = {task for dataset in datasets for task in dataset.index.column("task").to_pylist()}
    return present - {task for task, weight in config.training.mixture.tasks.items() if weight == 0}


def predictor(
    config: TrainingJobConfig, model: ModelSize, datasets: Sequence[ShardDataset]
) -> Callable[[dict[str, Any]], dict[str, float]]:
    """What ``loomvideo plan`` expects of a step of this run, from the workers' ``ready`` report.

    The pack is the middle one of the first step by cost. Nothing is predicted for a device whose peak is not known.
    """

    def predict(ready: dict[str, Any]) -> dict[str, float]:
        if isinstance(config, DistillJobConfig | PreferJobConfig):
            return {}  # `loomvideo plan` knows their turns; a single step's time says little
        machine = machine_named(ready["device_name"])
        if machine is None:
            peak = peak_tflops(ready["device_name"], config.training.peak_tflops)
            machine = Machine(peak, float("inf"), float("inf"), float("inf"), ready["world_size"])
        if not machine.peak_tflops:
            return {}
        training, num_packs, ranks = config.training, ready["packs_per_step"], ready["world_size"]
        recipe = recipe_factory(config, datasets)()
        packs = planner_of(recipe, datasets, training, num_packs).next_step()
        draws = packs[len(packs) // 2]
        planned = plan(
            dataclasses.replace(model.dit, use_source_embedding=config.objective.use_source_embedding),
            [draw.tokens for draw in draws],
            [draw.context_tokens for draw in draws],
            machine,
            ranks,
            recompute=training.activation_checkpointing,
            prefetch_steps=training.prefetch_steps,
            efficiency=training.efficiency,
            average=training.ema.decay > 0,
            hpz=training.zero.hpz_partition_size > 1,
            micro_steps=-(-num_packs // ranks),
        )
        return {"step_s": planned.step_s, "memory_gib": planned.memory_bytes / 2**30}

    return predict
