"""``loomvideo generate``."""

import typer

from loomvideo.jobs.command import config_command
from loomvideo.jobs.generate_config import GenerateConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @config_command(app, "generate", "generate", lambda: GenerateConfig)
    def generate(config: GenerateConfig) -> None:
        """Generate or edit one video or picture with a checkpoint, or a batch of them."""
        from loomvideo.jobs.generate_job import run

        run(config)
