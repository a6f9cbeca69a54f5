"""The ``loomvideo`` command line; ``generate`` and ``serve`` stand here, other commands in their packages."""

import atexit
import gc
import sys
from typing import TYPE_CHECKING

import typer

from loomvideo.jobs.cluster import commands as cluster_commands
from loomvideo.jobs.command import config_command
from loomvideo.jobs.data import commands as data_commands
from loomvideo.jobs.evaluation import commands as evaluate_commands
from loomvideo.jobs.kernels import commands as kernels_commands
from loomvideo.jobs.training import commands as training_commands
from loomvideo.jobs.training import plan_commands, simulate_commands
from loomvideo.jobs.weights import checkpoint_commands
from loomvideo.jobs.weights import commands as weights_commands
from loomvideo.platform.errors import UserError, of_the_disk
from loomvideo.platform.machine import make_ordinary

if TYPE_CHECKING:
    from loomvideo.jobs.generation.config import GenerateConfig
    from loomvideo.jobs.serving.config import ServeConfig

app = typer.Typer(
    name="loomvideo",
    help="Train, evaluate and run LoomVideo: video generation and editing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_commands.app)
app.add_typer(cluster_commands.app)
app.add_typer(weights_commands.app)
app.add_typer(kernels_commands.app)
app.add_typer(checkpoint_commands.app)
app.add_typer(evaluate_commands.app)
training_commands.register(app)
plan_commands.register(app)
simulate_commands.register(app, data_commands.app)


@app.callback()
def root() -> None:
    """Train, evaluate and run LoomVideo: video generation and editing."""


def generate_schema() -> type:
    """The schema of ``generate``, imported late: it knows torch."""
    from loomvideo.jobs.generation.config import GenerateConfig

    return GenerateConfig


def preview_generation(config: "GenerateConfig") -> None:
    """What ``generate --dry-run`` adds: the memory it would need."""
    from loomvideo.jobs.generation.job import preview

    preview(config)


@config_command(app, "generate", "generate", generate_schema, preview_generation)
def generate(config: "GenerateConfig") -> None:
    """Generate or edit one video or picture with a checkpoint, or a batch of them."""
    from loomvideo.jobs.generation.job import run

    run(config)


def serve_schema() -> type:
    """The schema of ``serve``, imported late: it knows Ray and torch."""
    from loomvideo.jobs.serving.config import ServeConfig

    return ServeConfig


@config_command(app, "serve", "serve", serve_schema)
def serve(config: "ServeConfig") -> None:
    """Serve a checkpoint as a web page: generate, edit with references, queue, history."""
    from loomvideo.jobs.serving.job import run

    run(config)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    make_ordinary()
    # Looking for garbage among a million objects that the process leaves anyway takes two seconds at its end.
    atexit.register(gc.freeze)
    try:
        app()
    except UserError as error:
        # Ray raises a worker's mistake with its traceback as text, and the mistake itself as cause.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # libraries have many names for a full disk; all else goes on
        told = of_the_disk(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
