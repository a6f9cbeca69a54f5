"""``loomvideo pretrain``, ``finetune-edit``, ``distill`` and ``prefer``."""

from typing import TYPE_CHECKING

import typer

from loomvideo.jobs.command import config_command

if TYPE_CHECKING:
    from loomvideo.jobs.training.config import DistillJobConfig, PreferJobConfig, TrainingJobConfig


def training_schema() -> type:
    """The schema of training jobs, imported late: it knows torch."""
    from loomvideo.jobs.training.config import TrainingJobConfig

    return TrainingJobConfig


def distill_schema() -> type:
    """The schema of distillations, imported late."""
    from loomvideo.jobs.training.config import DistillJobConfig

    return DistillJobConfig


def prefer_schema() -> type:
    """The schema of preference tunings, imported late."""
    from loomvideo.jobs.training.config import PreferJobConfig

    return PreferJobConfig


def _check(config: "TrainingJobConfig") -> None:
    """A dry run also says what values do not fit."""
    config.check()


def register(app: typer.Typer) -> None:
    """Add the training commands."""

    @config_command(app, "pretrain", "pretrain", training_schema, _check)
    def pretrain(config: "TrainingJobConfig") -> None:
        """Train on all tasks, from scratch or from weights; the same run name continues an interrupted run."""
        from loomvideo.jobs.training.job import run_training

        run_training("pretrain", config)

    @config_command(app, "finetune-edit", "finetune-edit", training_schema, _check)
    def finetune_edit(config: "TrainingJobConfig") -> None:
        """Continue the newest (or named) pretrain run on the editing tasks."""
        from loomvideo.jobs.training.job import run_training

        run_training("finetune-edit", config, default_parent="pretrain")

    @config_command(app, "distill", "distill", distill_schema, _check)
    def distill(config: "DistillJobConfig") -> None:
        """Make a model of 1 to 8 steps without guidance from the newest (or named) finetune-edit run."""
        from loomvideo.jobs.training.job import run_training

        run_training("distill", config, default_parent="finetune-edit")

    @config_command(app, "prefer", "prefer", prefer_schema, _check)
    def prefer(config: "PreferJobConfig") -> None:
        """Tune the newest (or named) finetune-edit run by preferences: targets over sources, or scored results."""
        from loomvideo.jobs.training.rounds import run_preference

        run_preference(config)
