"""The jobs as Python functions: keyword arguments are the configuration keys, results are typed.

What ``loomvideo NAME preset=… key=value`` does on the command line, ``NAME(preset=…, key=value)`` does here: the same
presets, keys, checks and run folders. A section is a mapping (``training={"steps": 100}``) or a dotted key
(``**{"training.steps": 100}``). Nothing heavy is imported before a function is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loomvideo.pipelines.prepare.job import PrepareResult
    from loomvideo.platform.runs import RunFolder

DEFAULT_PRESET = "tiny"


@dataclass(frozen=True)
class TrainingResult:
    """A finished training run.

    Attributes:
        run: The run, as ``JOB/NAME``: what ``checkpoint=`` and ``from_run=`` take.
        folder: Its folder.
        weights: Its exported weights, averaged where the run keeps an average.
        steps: Optimiser steps done.
        figures: Everything in its ``result.json``, such as ``loss`` and ``edit_psnr_db``.
    """

    run: str
    folder: Path
    weights: Path
    steps: int
    figures: dict[str, Any]


@dataclass(frozen=True)
class EvaluationResult:
    """A finished evaluation.

    Attributes:
        run: The run, as ``evaluate/NAME``: what ``compare`` and ``gate`` take.
        folder: Its folder; ``suites/SUITE/review.html`` in it shows every sample.
        checkpoint: What was evaluated.
        status: ``complete``, or ``partial`` when too many samples have no figure.
        figures: Everything in its ``result.json``, as ``SUITE/METRIC``.
    """

    run: str
    folder: Path
    checkpoint: str
    status: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class GenerationResult:
    """Generated files.

    Attributes:
        files: One a request, in order.
    """

    files: tuple[Path, ...]

    @property
    def file(self) -> Path:
        """The file of a single request."""
        (file,) = self.files
        return file


def prepare(*, preset: str = DEFAULT_PRESET, **keys: Any) -> "PrepareResult":
    """Encode samples into a shard dataset, as ``loomvideo data prepare``; what is up to date is left alone.

    Args:
        preset: ``tiny``, ``small``, ``5b`` or a YAML file.
        keys: Configuration keys, at least ``input`` and ``output``; ``loomvideo data prepare --help`` lists all.

    Returns:
        Manifest, counts and what was redone.

    Raises:
        UserError: naming the key or file and the fix.
    """
    from loomvideo.jobs.data.prepare import run
    from loomvideo.pipelines.prepare.config import PrepareConfig

    return run(_config(PrepareConfig, "data-prepare", preset, keys))


def pretrain(*, preset: str = DEFAULT_PRESET, **keys: Any) -> TrainingResult:
    """Train on all tasks, as ``loomvideo pretrain``; the same ``run`` continues an interrupted run.

    Args:
        preset: ``tiny``, ``5b-stage1``, ``5b-stage2``, ``5b-stage3`` or a YAML file.
        keys: Configuration keys, at least ``data={"shards": […]}``; ``loomvideo pretrain --help`` lists all.

    Raises:
        UserError: naming the key or file and the fix.
    """
    from loomvideo.jobs.training.config import TrainingJobConfig
    from loomvideo.jobs.training.job import run_training

    return _train("pretrain", TrainingJobConfig, lambda config: run_training("pretrain", config), preset, keys)


def finetune_edit(*, preset: str = DEFAULT_PRESET, **keys: Any) -> TrainingResult:
    """Continue the newest (or, with ``from_run``, a named) pretrain run on the editing tasks.

    Args:
        preset: ``tiny``, ``5b``, ``5b-lora`` or a YAML file.
        keys: Configuration keys; ``loomvideo finetune-edit --help`` lists all.

    Raises:
        UserError: naming the key or file and the fix.
    """
    from loomvideo.jobs.training.config import TrainingJobConfig
    from loomvideo.jobs.training.job import run_training

    def by(config: TrainingJobConfig) -> None:
        run_training("finetune-edit", config, "pretrain")

    return _train("finetune-edit", TrainingJobConfig, by, preset, keys)


def distill(*, preset: str = DEFAULT_PRESET, **keys: Any) -> TrainingResult:
    """Make a model of 1 to 8 steps from the newest (or, with ``from_run``, a named) finetune-edit run.

    Args:
        preset: ``tiny``, ``5b``, ``5b-lora`` or a YAML file.
        keys: Configuration keys; ``loomvideo distill --help`` lists all.

    Raises:
        UserError: naming the key or file and the fix.
    """
    from loomvideo.jobs.training.config import DistillJobConfig
    from loomvideo.jobs.training.job import run_training

    return _train(
        "distill", DistillJobConfig, lambda config: run_training("distill", config, "finetune-edit"), preset, keys
    )


def prefer(*, preset: str = DEFAULT_PRESET, **keys: Any) -> TrainingResult:
    """Tune the newest (or, with ``from_run``, a named) finetune-edit run by preferences.

    Args:
        preset: ``tiny``, ``5b-lora`` or a YAML file.
        keys: Configuration keys; ``loomvideo prefer --help`` lists all.

    Raises:
        UserError: naming the key or file and the fix.
    """
    from loomvideo.jobs.training.config import PreferJobConfig
    from loomvideo.jobs.training.rounds import run_preference

    return _train("prefer", PreferJobConfig, run_preference, preset, keys)


def evaluate(*, preset: str = DEFAULT_PRESET, **keys: Any) -> EvaluationResult:
    """Generate, measure and judge benchmark suites with a checkpoint, as ``loomvideo evaluate``; a rerun resumes.

    Args:
        preset: ``tiny``, ``5b`` or a YAML file.
        keys: Configuration keys; ``loomvideo evaluate --help`` lists all.

    Raises:
        UserError: naming the key or file and the fix.
    """
    from loomvideo.jobs.evaluation.config import EvaluateConfig
    from loomvideo.jobs.evaluation.job import run

    config = _config(EvaluateConfig, "evaluate", preset, keys)
    folder = _run_folder(config, "evaluate")
    run(config)
    figures = folder.read_json("result.json") or {}
    return EvaluationResult(
        f"{folder.job}/{folder.name}", folder.path, figures["checkpoint"], figures["status"], figures
    )


def generate(*, preset: str = DEFAULT_PRESET, **keys: Any) -> GenerationResult:
    """Make one video or picture, or a batch, with a checkpoint, as ``loomvideo generate``.

    For many requests in one process load :class:`loomvideo.model.LoomVideoPipeline` once instead.

    Args:
        preset: ``tiny``, ``5b`` or a YAML file.
        keys: Configuration keys: ``task``, ``prompt``, ``out``, ``source``, ``refs`` …, or ``batch``;
            ``loomvideo generate --help`` lists all.

    Raises:
        UserError: naming the key or file and the fix.
    """
    from loomvideo.jobs.generation.config import GenerateConfig
    from loomvideo.jobs.generation.job import run
    from loomvideo.pipelines.generation.requests import read_requests

    config = _config(GenerateConfig, "generate", preset, keys)
    run(config)
    outputs = [request.out for request in read_requests(Path(config.batch), [])] if config.batch else [config.out]
    return GenerationResult(tuple(Path(out) for out in outputs))


def _train(job: str, schema: type, train: Callable[[Any], None], preset: str, keys: dict[str, Any]) -> TrainingResult:
    config = _config(schema, job, preset, keys)
    folder = _run_folder(config, job)
    train(config)
    figures = folder.read_json("result.json") or {}
    return TrainingResult(f"{job}/{folder.name}", folder.path, Path(figures["weights"]), int(figures["steps"]), figures)


def _config(schema: type, job: str, preset: str, keys: dict[str, Any]) -> Any:
    from loomvideo.jobs.command import preset_file, preset_names
    from loomvideo.platform.config import load_config

    return load_config(schema, preset_file=preset_file(job, preset) if preset_names(job) else None, values=keys)


def _run_folder(config: Any, job: str) -> "RunFolder":
    """Where the run will be; a run without a name gets its name here."""
    from loomvideo.platform.runs import RunFolder, new_run_name

    config.run = config.run or new_run_name()
    return RunFolder(Path(config.runs).absolute(), job, config.run)
