"""``loomvideo pretrain`` and ``loomvideo finetune-edit``."""

import typer

from loomvideo.jobs.command import config_command
from loomvideo.jobs.training.config import TrainingJobConfig


def register(app: typer.Typer) -> None:
    """Add the training commands."""

    @config_command(app, "pretrain", "pretrain", lambda: TrainingJobConfig)
    def pretrain(config: TrainingJobConfig) -> None:
        """Train on all tasks, from scratch or from weights; the same run name continues an interrupted run."""
        from loomvideo.jobs.training.job import run_training

        run_training("pretrain", config)

    @config_command(app, "finetune-edit", "finetune-edit", lambda: TrainingJobConfig)
    def finetune_edit(config: TrainingJobConfig) -> None:
        """Continue the newest (or named) pretrain run on the editing tasks."""
        from loomvideo.jobs.training.job import run_training

        run_training("finetune-edit", config, default_parent="pretrain")
