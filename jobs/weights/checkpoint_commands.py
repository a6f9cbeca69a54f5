"""``loomvideo checkpoint``: list, check, compare and export the checkpoints of a training run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from loomvideo.platform.training.checkpoint import Checkpoint, CheckpointFolder

app = typer.Typer(name="checkpoint", help="List, check, compare and export training checkpoints.", no_args_is_help=True)

Place = Annotated[str, typer.Argument(help="a run's folder, RUN_FOLDER@STEP, or one step-… folder")]


def _folder(run: Path) -> "CheckpointFolder":
    from loomvideo.platform.training.checkpoint import CheckpointFolder

    for path in (run / "checkpoints", run):
        folder = CheckpointFolder(path)
        if folder.steps():
            return folder
    raise UserError(f"{run}: no checkpoints; name a run's folder such as runs/pretrain/NAME")


def _open(place: str) -> "Checkpoint":
    from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint

    path, _, step = place.partition("@")
    if step and not step.isdigit():
        raise UserError(f"{place}: the part after @ is a step, such as 500")
    try:
        if (Path(path) / "manifest.json").is_file():
            return Checkpoint(path)
        return _folder(Path(path)).open(int(step) if step else None)
    except DamagedCheckpoint as damage:
        raise UserError(f"damaged checkpoint {damage}") from damage


@app.command("ls")
def list_checkpoints(run: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """List a run's checkpoints."""
    import datetime

    from rich.console import Console
    from rich.table import Table

    from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint

    folder = _folder(run)
    table = Table("step", "written", "ranks", "size", "weights", "digest", box=None, padding=(0, 2, 0, 0))
    for step in folder.steps():
        try:
            checkpoint = Checkpoint(folder.at(step))
            time = datetime.datetime.fromtimestamp(checkpoint.state["time"]).isoformat(" ", "seconds")
            size = f"{checkpoint.num_bytes / 1e6:,.1f} MB"
            kinds = ", ".join(checkpoint.kinds)
            table.add_row(str(step), time, str(checkpoint.manifest["world_size"]), size, kinds, checkpoint.digest)
        except DamagedCheckpoint as damage:
            table.add_row(str(step), "damaged:", "", "", str(damage), "")
    Console(markup=False).print(table)


@app.command()
def verify(place: Place) -> None:
    """Check the size and hash of every file; all checkpoints of a run's folder, or the named one."""
    from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint

    path = Path(place)
    one = "@" in place or (path / "manifest.json").is_file()
    paths = [_open(place).path] if one else [_folder(path).at(step) for step in _folder(path).steps()]
    damaged = 0
    for checkpoint in paths:
        try:
            Checkpoint(checkpoint).verify()
            print(f"{checkpoint.name}  whole")
        except DamagedCheckpoint as damage:
            damaged += 1
            print(f"{checkpoint.name}  damaged: {damage}")
    if damaged:
        raise UserError(f"{damaged} of {len(paths)} checkpoints are damaged; resuming passes them over")


@app.command()
def diff(
    first: Place,
    second: Place,
    kind: Annotated[str, typer.Option(help="master, ema, exp_avg or exp_avg_sq")] = "master",
    top: Annotated[int, typer.Option(help="parameters to show, most changed first")] = 15,
) -> None:
    """Compare two checkpoints: state, and weights one parameter at a time."""
    from rich.console import Console
    from rich.table import Table

    one, other = _open(first), _open(second)
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
    weights, other_weights = one.weights(kind), other.weights(kind)
    for name, shape in one.shapes.items():
        if other.shapes.get(name) == shape:
            value = weights[name]
            change = other_weights[name] - value
            rows.append((float(change.norm() / value.norm().clamp_min(1e-12)), float(change.abs().max()), name))
    equal = sum(largest == 0 for _, largest, _ in rows)
    print(f"{equal} of {len(rows)} parameters are equal bit by bit")
    table = Table("relative change", "largest change", "parameter", box=None, padding=(0, 2, 0, 0))
    for relative, largest, name in sorted(rows, reverse=True)[:top]:
        if largest > 0:
            table.add_row(f"{relative:.3e}", f"{largest:.3e}", name)
    if table.row_count:
        Console(markup=False).print(table)


@app.command()
def export(
    place: Place,
    output: Annotated[Path, typer.Argument(help="weights folder to write")],
    weights: Annotated[str, typer.Option(help="ema or raw; default: ema where the checkpoint has it")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "float32",
    adapter: Annotated[bool, typer.Option("--adapter", help="write LoRA adapters alone, in PEFT's format")] = False,
) -> None:
    """Write a weights folder that `generate`, `evaluate` and diffusers' key names understand; adapters are merged.

    One parameter at a time is in memory, whatever the number of ranks that wrote the checkpoint.
    """
    import json

    import torch

    from loomvideo.jobs.training.config import TrainingJobConfig
    from loomvideo.model.lora import save_adapter
    from loomvideo.model.sizes import PIPELINE_FILE
    from loomvideo.model.weights import save_dit
    from loomvideo.pipelines.training.recipe import LoomVideoRecipe
    from loomvideo.platform.config import load_config

    if weights not in ("", "ema", "raw") or dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--weights={weights} --dtype={dtype}: use ema or raw; bfloat16, float16 or float32")
    checkpoint = _open(place)
    run = checkpoint.path.parent.parent
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}/config.yaml: not found; it says which model the checkpoint is of")
    config = load_config(TrainingJobConfig, preset_file=run / "config.yaml")
    kind = {"ema": "ema", "raw": "master"}.get(weights) or ("ema" if "ema" in checkpoint.kinds else "master")
    state, precision = checkpoint.weights(kind), getattr(torch, dtype)
    if adapter:
        if not config.lora.rank:
            raise UserError(f"{run}: --adapter: the run trained no adapters (lora.rank=0)")
        save_adapter(state, config.lora, output, precision)
    else:
        recipe = LoomVideoRecipe(config.model, config.objective, [], lora=config.lora)
        save_dit(recipe.published(state), recipe.config, output, dtype=precision)
        note = {"model": config.model, "step": checkpoint.step, "weights": kind, "run": f"{run.parent.name}/{run.name}"}
        (output / PIPELINE_FILE).write_text(json.dumps(note, indent=2) + "\n")
    print(f"{output}: {kind} {'adapters' if adapter else 'weights'} of step {checkpoint.step}")
