"""``loomvideo serve``."""

from typing import TYPE_CHECKING

import typer

from loomvideo.jobs.command import config_command

if TYPE_CHECKING:
    from loomvideo.jobs.serving.config import ServeConfig


def serve_schema() -> type:
    """The schema of ``serve``, imported late: it knows Ray and torch."""
    from loomvideo.jobs.serving.config import ServeConfig

    return ServeConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @config_command(app, "serve", "serve", serve_schema)
    def serve(config: "ServeConfig") -> None:
        """Serve a checkpoint as a web page: generate, edit with references, queue, history."""
        from loomvideo.jobs.serving.job import run

        run(config)
