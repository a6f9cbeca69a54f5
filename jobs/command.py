"""Commands run from a typed configuration: ``preset=…``, ``section.key=value``, ``--dry-run``, documented keys."""

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from loomvideo.platform.config import document_keys, load_config, split_overrides, to_yaml
from loomvideo.platform.console import console, table
from loomvideo.platform.errors import UserError

DEFAULT_PRESET = "tiny"


def preset_names(job: str) -> list[str]:
    """The presets that ship for a job: ``jobs/configs/<job>.<preset>.yaml``."""
    files = resources.files("loomvideo.jobs.configs").iterdir()
    return sorted(
        f.name[len(job) + 1 : -len(".yaml")] for f in files if f.name.startswith(f"{job}.") and f.name.endswith(".yaml")
    )


def preset_file(job: str, preset: str) -> Path:
    """A preset's file: one that ships, or a path to the user's own YAML.

    Raises:
        UserError: naming the presets that exist.
    """
    if preset.endswith((".yaml", ".yml")):
        return Path(preset)
    names = preset_names(job)
    if preset not in names:
        raise UserError(
            f"preset={preset}: not found for {job}; use one of {', '.join(names)} or a path to a .yaml file"
        )
    return Path(str(resources.files("loomvideo.jobs.configs") / f"{job}.{preset}.yaml"))


def job_config(schema: type, job: str, arguments: list[str]) -> Any:
    """The configuration of a job from its command-line arguments."""
    preset = split_overrides(arguments).get("preset", DEFAULT_PRESET)
    overrides = [argument for argument in arguments if not argument.startswith("preset=")]
    return load_config(schema, overrides, preset_file(job, preset) if preset_names(job) else None)


def config_command(
    app: typer.Typer,
    name: str,
    job: str,
    schema: Callable[[], type],
    preview: Callable[[Any], None] | None = None,
    words: Mapping[str, str] | None = None,
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register ``run(config)`` as a command; its docstring is the help.

    Args:
        app: The Typer application or sub-application.
        name: The command's name.
        job: The name in ``jobs/configs/<job>.<preset>.yaml``; a job without such files has no presets.
        schema: Returns the configuration dataclass; called late, so that ``--help`` of other commands stays fast.
        preview: What ``--dry-run`` does after it has printed the configuration.
        words: Words that stand for a ``key=value``.
    """

    class DocumentedCommand(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            keys = table("key", "default", "meaning", title="Configuration keys")
            presets = preset_names(job)
            if presets:
                keys.add_row("preset", DEFAULT_PRESET, f"{', '.join(presets)}, or a path to a .yaml file")
            for row in document_keys(schema()):
                keys.add_row(*row)
            console().print(keys)

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        def command(
            overrides: Annotated[
                list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="preset=NAME and section.key=value")
            ] = None,
            dry_run: Annotated[
                bool, typer.Option("--dry-run", help="print the resolved configuration and stop")
            ] = False,
        ) -> None:
            config = job_config(schema(), job, [(words or {}).get(text, text) for text in overrides or []])
            if dry_run:
                print(to_yaml(config), end="")
                if preview is not None:
                    preview(config)
                return
            run(config)

        command.__doc__ = run.__doc__
        app.command(name, cls=DocumentedCommand)(command)
        return run

    return register
