"""``loomvideo generate``."""

from typing import TYPE_CHECKING

import typer

from loomvideo.jobs.command import config_command

if TYPE_CHECKING:
    from loomvideo.jobs.generation.config import GenerateConfig


def generate_schema() -> type:
    """The schema of ``generate``, imported late: it knows torch."""
    from loomvideo.jobs.generation.config import GenerateConfig

    return GenerateConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    def preview(config: "GenerateConfig") -> None:
        from loomvideo.jobs.generation.job import preview

        preview(config)

    @config_command(app, "generate", "generate", generate_schema, preview)
    def generate(config: "GenerateConfig") -> None:
        """Generate or edit one video or picture with a checkpoint, or a batch of them."""
        from loomvideo.jobs.generation.job import run

        run(config)
