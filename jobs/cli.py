"""The ``loomvideo`` command line."""

import sys

import typer

from loomvideo.jobs.cluster import commands as cluster_commands
from loomvideo.jobs.data import commands as data_commands
from loomvideo.jobs.evaluation import commands as evaluate_commands
from loomvideo.jobs.generation import commands as generate_commands
from loomvideo.jobs.kernels import commands as kernels_commands
from loomvideo.jobs.serving import commands as serve_commands
from loomvideo.jobs.training import commands as training_commands
from loomvideo.jobs.training import plan_commands, simulate_commands
from loomvideo.jobs.weights import checkpoint_commands
from loomvideo.jobs.weights import commands as weights_commands
from loomvideo.platform.errors import UserError
from loomvideo.platform.machine import make_ordinary

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
generate_commands.register(app)
plan_commands.register(app)
simulate_commands.register(app, data_commands.app)
serve_commands.register(app)


@app.callback()
def root() -> None:
    """Train, evaluate and run LoomVideo: video generation and editing."""


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    make_ordinary()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
