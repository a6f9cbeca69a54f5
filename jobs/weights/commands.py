"""``loomvideo weights``: look into checkpoints of the transformer and convert them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from loomvideo.model.config import DiTConfig
    from loomvideo.model.sizes import ModelSize

app = typer.Typer(name="weights", help="Inspect and convert checkpoints of the transformer.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(help="weights folder, gen_model.pth, .safetensors, or a Wan2.2 folder")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="model=NAME, dtype=NAME, source=true|false, allow=PATTERN,…"),
]
_DTYPES = ("keep", "bfloat16", "float16", "float32")


def _settings(arguments: list[str] | None, valid: tuple[str, ...]) -> dict[str, str]:
    from loomvideo.platform.config import split_overrides

    settings = split_overrides(arguments or [])
    for key in settings:
        if key not in valid:
            raise UserError(f"command line: unknown key {key}; valid keys: {', '.join(valid)}")
    return settings


def _dit_config(settings: dict[str, str]) -> "DiTConfig | None":
    """Sizes from ``model=`` and ``source=``; None without a model size."""
    return _dit_of(settings["model"], settings) if "model" in settings else None


def _dit_of(model: str, settings: dict[str, str]) -> "DiTConfig":
    """Sizes of a model size, with ``source=``."""
    import dataclasses

    from loomvideo.model.sizes import model_size

    source = settings.get("source", "true")
    if source not in ("true", "false"):
        raise UserError(f"source={source}: use true or false")
    return dataclasses.replace(model_size(model).dit, use_source_embedding=source == "true")


def _whole_size(path: Path, settings: dict[str, str]) -> "ModelSize":
    """The model size that a checkpoint states or ``model=`` says, the transformer's part as the checkpoint states."""
    import dataclasses

    from loomvideo.model.loading import ModelSource
    from loomvideo.model.stored_weights import open_checkpoint

    folders = settings.get("codec_folder", ""), settings.get("mllm_folder", "")
    size = ModelSource(str(path), settings.get("model", ""), *folders).size
    stated = open_checkpoint(path).config or _dit_of(settings.get("model", size.name), settings)
    return dataclasses.replace(size, dit=stated)


@app.command()
def inspect(path: Source, settings: Settings = None) -> None:
    """Print what a checkpoint holds and, with model=NAME, every key that does not fit that model."""
    import fnmatch
    import math
    from collections import Counter

    from loomvideo.model.stored_weights import DEAD_KEYS, open_checkpoint
    from loomvideo.model.weights import compare_keys, expected_shapes

    config = _dit_config(_settings(settings, ("model", "source")))
    checkpoint = open_checkpoint(path)
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    dead = [name for name in sizes if any(fnmatch.fnmatchcase(name, pattern) for pattern in DEAD_KEYS)]
    dtypes = Counter(checkpoint.dtypes.values())
    print(f"path        {checkpoint.path}")
    print(f"kind        {checkpoint.kind}")
    print(f"tensors     {len(sizes)}")
    print(f"parameters  {sum(sizes.values()):,}")
    print(f"unused      {sum(sizes[name] for name in dead):,} (text embedder, {len(dead)} tensors)")
    print(f"dtypes      {', '.join(f'{dtype} x {count}' for dtype, count in sorted(dtypes.items()))}")
    stated = checkpoint.config.to_dict() if checkpoint.config else checkpoint.stated
    for name, value in stated.items():
        print(f"{name:<22}{value}")
    config = config or checkpoint.config
    if config is None:
        print("give model=NAME to compare the keys with a model's")
        return
    expected = expected_shapes(config)
    missing, unexpected, misshapen = compare_keys(checkpoint, expected)
    unexpected = [name for name in unexpected if name not in dead]
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        for name in names:
            print(f"{kind:<12}{name}")
    for name in misshapen:
        print(f"{'misshapen':<12}{name} {list(checkpoint.shapes[name])}, expected {list(expected[name])}")
    if not (missing or unexpected or misshapen):
        print("keys        all fit")


@app.command()
def adapter(
    path: Annotated[Path, typer.Argument(help="adapter: a .safetensors file of any dialect, or PEFT's folder")],
    output: Annotated[Path, typer.Argument(help="new file; a folder for peft")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="model=NAME, format=NAME, dtype=NAME")
    ] = None,
) -> None:
    """Write an adapter for another program: format=comfyui, diffusers, kohya or peft, for model=5b unless said."""
    import torch

    from loomvideo.model.adapters import read_adapter, save_as
    from loomvideo.model.dit import LoomVideoDiT
    from loomvideo.model.sizes import PUBLISHED, model_size

    values = _settings(settings, ("model", "format", "dtype"))
    dtype_name = values.get("dtype", "bfloat16")
    if dtype_name not in _DTYPES[1:]:
        raise UserError(f"dtype={dtype_name}: use one of {', '.join(_DTYPES[1:])}")
    with torch.device("meta"):
        model = LoomVideoDiT(model_size(values.get("model", PUBLISHED)).dit)
    read = read_adapter(path, model)
    save_as(read, output, values.get("format", "comfyui"), getattr(torch, dtype_name))
    print(f"wrote {output} ({len(read.layers)} layers)")


@app.command()
def convert(
    path: Source,
    output: Annotated[Path, typer.Argument(help="new weights folder")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…",
            help="model=NAME, dtype=NAME, source=true|false, allow=PATTERN,…, format=loomvideo|diffusers; "
            "for diffusers codec_folder=FOLDER, mllm_folder=FOLDER",
        ),
    ] = None,
) -> None:
    """Write a checkpoint as a weights folder (safetensors and config.json) that loads without a model size.

    A Wan2.2 folder gets the conditioning a fresh LoomVideo starts with: an embedder whose last layer is zero and a zero
    source embedding. With format=diffusers codec, MLLM and scheduler come along, and diffusers opens the folder.
    """
    import torch

    from loomvideo.model import weights

    values = _settings(settings, ("model", "source", "dtype", "allow", "format", "codec_folder", "mllm_folder"))
    layout = values.get("format", "loomvideo")
    if layout not in ("loomvideo", "diffusers"):
        raise UserError(f"format={layout}: use loomvideo or diffusers")
    dtype_name = values.get("dtype", "keep")
    if dtype_name not in _DTYPES:
        raise UserError(f"dtype={dtype_name}: use one of {', '.join(_DTYPES)}")
    dtype = None if dtype_name == "keep" else getattr(torch, dtype_name)
    allow = [pattern for pattern in values.get("allow", "").split(",") if pattern]
    if layout == "diffusers":
        from loomvideo.model.interchange.folder import write_folder

        model = write_folder(path, _whole_size(path, values), output, dtype, allow)
    else:
        model = weights.load_dit(path, _dit_config(values), dtype=dtype, allow=allow)
        weights.save_dit(model, model.config, output)
    print(f"wrote {output} ({sum(parameter.numel() for parameter in model.parameters()):,} parameters)")
