"""``loomvideo checkpoint``: list, check, compare and export the checkpoints of a training run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loomvideo.jobs.weights.references import CHECKPOINT_HELP, REFERENCE_HELP
from loomvideo.platform.console import console, table
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from loomvideo.platform.training.checkpoint import Checkpoint

app = typer.Typer(name="checkpoint", help="List, check, compare and export training checkpoints.", no_args_is_help=True)

URL_HELP = ", or URL/JOB/NAME of one with checkpoint.url"
Reference = Annotated[str, typer.Argument(metavar="RUN[@STEP]", help=CHECKPOINT_HELP + URL_HELP)]
Runs = Annotated[Path, typer.Option(help="folder of all runs")]
RUNS = Path("runs")


def _open(reference: str, runs: Path) -> "Checkpoint":
    from loomvideo.jobs.weights.export import RunCheckpoints

    return RunCheckpoints.find(reference, runs).open()


@app.command("ls")
def list_checkpoints(
    run: Annotated[str, typer.Argument(metavar="RUN", help=REFERENCE_HELP + URL_HELP)], runs: Runs = RUNS
) -> None:
    """List a run's checkpoints."""
    import datetime

    from loomvideo.jobs.weights.export import NAMES, RunCheckpoints
    from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint

    folder = RunCheckpoints.find(run, runs).folder
    listed = table("step", "written", "ranks", "size", "weights", "digest")
    for step in folder.steps():
        try:
            checkpoint = Checkpoint(folder.at(step))
            time = datetime.datetime.fromtimestamp(checkpoint.state["time"]).isoformat(" ", "seconds")
            size = f"{checkpoint.num_bytes / 1e6:,.1f} MB"
            kinds = ", ".join(NAMES.get(kind, kind) for kind in checkpoint.kinds)
            listed.add_row(str(step), time, str(checkpoint.manifest["world_size"]), size, kinds, checkpoint.digest)
        except DamagedCheckpoint as damage:
            listed.add_row(str(step), "damaged:", "", "", str(damage), "")
    console().print(listed)


@app.command()
def verify(reference: Reference, runs: Runs = RUNS) -> None:
    """Check the size and hash of every file; of all checkpoints of a run, or of the named one."""
    from loomvideo.jobs.weights.export import RunCheckpoints
    from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint

    found = RunCheckpoints.find(reference, runs)
    paths = [found.folder.at(step) for step in found.folder.steps()] if found.step is None else [found.open().url]
    damaged = 0
    for url in paths:
        name = url.rsplit("/", 1)[-1]
        try:
            Checkpoint(url).verify()
            print(f"{name}  whole")
        except DamagedCheckpoint as damage:
            damaged += 1
            print(f"{name}  damaged: {damage}")
    if damaged:
        raise UserError(f"{damaged} of {len(paths)} checkpoints are damaged; resuming passes them over")


@app.command()
def diff(
    first: Reference,
    second: Reference,
    weights: Annotated[str, typer.Option(help="raw or ema weights, or the moments exp_avg or exp_avg_sq")] = "raw",
    top: Annotated[int, typer.Option(help="parameters to show, most changed first")] = 15,
    runs: Runs = RUNS,
) -> None:
    """Compare two checkpoints: state, and weights one parameter at a time."""
    from loomvideo.jobs.weights.export import KINDS

    one, other = _open(first, runs), _open(second, runs)
    for key in ("step", "optimizer_step", "world_size", "datasets"):
        if one.state.get(key) != other.state.get(key):
            print(f"{key}: {one.state.get(key)} | {other.state.get(key)}")
    for section in sorted(one.state["config"]):
        if one.state["config"][section] != other.state["config"].get(section):
            print(f"config.{section}: {one.state['config'][section]} | {other.state['config'].get(section)}")
    only = sorted(set(one.shapes.items()) ^ set(other.shapes.items()))
    for name, shape in only:
        print(f"only in one: {name} {list(shape)}")
    rows = []
    kind = KINDS.get(weights, weights)
    values, other_values = one.weights(kind), other.weights(kind)
    for name, shape in one.shapes.items():
        # What a run did not train is in neither, but in the weights it started from.
        if other.shapes.get(name) == shape and values.is_stored(name) and other_values.is_stored(name):
            value = values[name]
            change = other_values[name] - value
            rows.append((float(change.norm() / value.norm().clamp_min(1e-12)), float(change.abs().max()), name))
    equal = sum(largest == 0 for _, largest, _ in rows)
    print(f"{equal} of {len(rows)} parameters are equal bit by bit")
    changes = table("relative change", "largest change", "parameter")
    for relative, largest, name in sorted(rows, reverse=True)[:top]:
        if largest > 0:
            changes.add_row(f"{relative:.3e}", f"{largest:.3e}", name)
    if changes.row_count:
        console().print(changes)


@app.command()
def export(
    reference: Reference,
    output: Annotated[Path, typer.Argument(help="weights folder to write")],
    weights: Annotated[str, typer.Option(help="ema or raw; default: ema where the checkpoint has it")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "float32",
    adapter: Annotated[bool, typer.Option("--adapter", help="write LoRA adapters alone, in PEFT's format")] = False,
    base: Annotated[str, typer.Option(help="weights an adapter run started from, if they have moved")] = "",
    runs: Runs = RUNS,
) -> None:
    """Write a weights folder that `generate`, `evaluate` and diffusers' key names understand; adapters are merged.

    One parameter at a time is in memory, whatever the number of ranks that wrote the checkpoint.
    """
    import torch

    from loomvideo.jobs.weights.export import (
        KINDS,
        RunCheckpoints,
        default_kind,
        export_weights,
        run_recipe,
        staged_folder,
    )
    from loomvideo.model.lora import save_adapter

    if weights not in ("", *KINDS) or dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--weights={weights} --dtype={dtype}: use ema or raw; bfloat16, float16 or float32")
    found, precision = RunCheckpoints.find(reference, runs), getattr(torch, dtype)
    config, checkpoint = found.config(), found.open()
    if adapter:
        if not config.lora.rank:
            raise UserError(f"{reference}: --adapter: the run trained no adapters (lora.rank=0)")
        kind = weights or default_kind(checkpoint)
        with staged_folder(output) as staged:
            save_adapter(checkpoint.weights(KINDS[kind]), config.lora, staged, precision)
    else:
        kind = export_weights(run_recipe(config), config, found.run, checkpoint, output, weights, precision, base=base)
    print(f"{output}: {kind} {'adapters' if adapter else 'weights'} of step {checkpoint.step}")
