"""Weights of the transformer put into a model, and written.

A model is built on the meta device and each tensor is read, converted and put in place by itself, so that loading needs
one copy of the weights. Keys that are missing, unexpected or misshapen are errors unless a pattern allows them; the
published text embedder, whose output reaches no block, is left out knowingly.
"""

import fnmatch
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.stored_weights import (
    CONDITIONING_KEYS,
    DEAD_KEYS,
    FORMAT,
    FORMAT_VERSION,
    StoredWeights,
    open_checkpoint,
)
from loomvideo.platform.errors import UserError, full_disk_named

MAX_SHARD_BYTES = 4 * 2**30
_LISTED = 12


class WeightsError(UserError):
    """A checkpoint does not fit the model; the attributes hold every key, the message the first of each kind."""

    def __init__(self, path: Path, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> None:
        self.missing, self.unexpected, self.misshapen = list(missing), list(unexpected), list(misshapen)
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        parts = [f"{len(keys)} {kind} ({_shorten(keys)})" for kind, keys in kinds.items() if keys]
        super().__init__(
            f"{path}: keys do not fit the model: {'; '.join(parts)}; use the right model=, or allow=PATTERN to accept"
        )


def load_dit(
    path: str | Path,
    config: DiTConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    allow: Sequence[str] = (),
) -> LoomVideoDiT:
    """Build a model and load a checkpoint into it, holding one copy of the weights.

    Args:
        path: See :func:`open_checkpoint`.
        config: Sizes; None takes them from the checkpoint, which only our own folders can state.
        device: Where the weights go.
        dtype: The type of the weights; None keeps each tensor's own.
        allow: Patterns (``blocks.0.*``) of keys that may be missing or misshapen, and then start as from scratch, or
            unexpected, and then are ignored.

    Raises:
        WeightsError: naming keys that do not fit.
        UserError: if the checkpoint cannot be read or states other sizes.
    """
    checkpoint, model, start_fresh = match_dit(path, config, allow)
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint.tensors([name for name in parameters if name not in start_fresh]):
        # Files are memory-mapped: copy, so that no parameter is a view of one.
        _assign(model, name, tensor.to(device, dtype or tensor.dtype, copy=True))
    fresh_dtype = dtype or next((p.dtype for p in model.parameters() if not p.is_meta), torch.float32)
    start_parameters(model, start_fresh, device, fresh_dtype)
    return model


def dit_of(
    weights: Mapping[str, Tensor], config: DiTConfig, device: torch.device | str, dtype: torch.dtype
) -> LoomVideoDiT:
    """A model of weights that are in memory, such as Ray's, under the published names; copies them."""
    with torch.device("meta"):
        model = LoomVideoDiT(config)
    for name in dict(model.named_parameters()):
        _assign(model, name, weights[name].to(device, dtype, copy=True))
    return model


def match_dit(
    path: str | Path, config: DiTConfig | None = None, allow: Sequence[str] = ()
) -> tuple[StoredWeights, LoomVideoDiT, set[str]]:
    """A checkpoint, the model on the meta device that it fits, and the names that it lacks; see :func:`load_dit`."""
    checkpoint = open_checkpoint(path)
    if config is None and checkpoint.config is None:
        raise UserError(f"{path}: this checkpoint does not state its sizes; give model=… (5b for the published one)")
    config = config or checkpoint.config
    _check_sizes(checkpoint, config)
    with torch.device("meta"):
        model = LoomVideoDiT(config)
    if checkpoint.kind == "wan":
        allow = (*allow, *CONDITIONING_KEYS)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return checkpoint, model, check_keys(checkpoint, shapes, allow)


def start_parameters(
    model: LoomVideoDiT, names: Collection[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Give the named parameters of a model on the meta device the values that training starts from."""
    parameters = dict(model.named_parameters())
    for name in names:
        _assign(model, name, torch.empty(parameters[name].shape, device=device, dtype=dtype))
    model.init_weights(names)


def check_keys(checkpoint: StoredWeights, expected: Mapping[str, tuple[int, ...]], allow: Sequence[str]) -> set[str]:
    """Compare a checkpoint's keys with a model's.

    Returns:
        The allowed names that the checkpoint lacks or has in another shape.

    Raises:
        WeightsError: if others differ.
    """
    missing, unexpected, misshapen = compare_keys(checkpoint, expected)

    def refused(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
        return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

    problems = (
        refused(missing, allow),
        refused(unexpected, (*allow, *DEAD_KEYS)),
        [_shape_note(checkpoint, expected, name) for name in refused(misshapen, allow)],
    )
    if any(problems):
        raise WeightsError(checkpoint.path, *problems)
    return {*missing, *misshapen}


def compare_keys(
    checkpoint: StoredWeights, expected: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing from, unexpected in and misshapen in a checkpoint; dead keys count as unexpected."""
    missing = [name for name in expected if name not in checkpoint.shapes]
    unexpected = [name for name in checkpoint.shapes if name not in expected]
    common = (name for name in expected if name in checkpoint.shapes)
    return missing, unexpected, [name for name in common if checkpoint.shapes[name] != tuple(expected[name])]


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Key names and shapes of a model, without building it."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in LoomVideoDiT(config).named_parameters()}


def save_dit(
    weights: LoomVideoDiT | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: DiTConfig,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a weights folder: safetensors shards with the published key names, then ``config.json``.

    A folder without ``config.json`` is unfinished. At most one shard is held in memory beyond ``weights``.

    Args:
        weights: The model, its state, or pairs of name and tensor (for states that are never whole).
        config: Sizes, so that the folder loads without a model size.
        folder: Created; must not hold weights already.
        dtype: The type of the saved tensors; None keeps theirs.
        max_shard_bytes: Size at which a new shard starts.

    Raises:
        UserError: if the folder already holds weights.
        WeightsError: if the keys are not the model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: already holds weights; choose another folder or remove this one")
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    pairs = weights.items() if isinstance(weights, Mapping) else weights

    shards: list[dict[str, Tensor]] = [{}]
    names_of_shards: list[list[str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    shard_bytes = total_bytes = 0

    def flush() -> None:
        names_of_shards.append(list(shards[0]))
        partial = folder / f"shard-{len(names_of_shards):05d}.partial"
        with full_disk_named(folder, partial):
            save_file(shards[0], partial, metadata={"format": "pt"})
        shards[0] = {}

    for name, tensor in pairs:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[0] and shard_bytes + num_bytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shards[0][name] = tensor
        shapes[name] = tuple(tensor.shape)
        shard_bytes += num_bytes
        total_bytes += num_bytes
    flush()
    check_keys(StoredWeights(folder, "loomvideo", shapes, {}), expected_shapes(config), allow=())

    count = len(names_of_shards)
    weight_map = {}
    for number, names in enumerate(names_of_shards, start=1):
        file_name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        os.replace(folder / f"shard-{number:05d}.partial", folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    if count > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    stated = {"format": FORMAT, "format_version": FORMAT_VERSION, "dit": config.to_dict()}
    staged = folder / "config.json.partial"
    staged.write_text(json.dumps(stated, indent=2) + "\n")
    os.replace(staged, folder / "config.json")


def _check_sizes(checkpoint: StoredWeights, config: DiTConfig) -> None:
    """Compare sizes that shapes do not show (heads, eps) as well as those they do."""
    stated = checkpoint.stated or (checkpoint.config.to_dict() if checkpoint.config else {})
    values = config.to_dict()
    for name, value in stated.items():
        same = list(value) == values[name] if name == "patch_size" else value == values[name]
        # Whether there is a source embedding differs between stages and shows in the keys.
        if not same and name != "use_source_embedding":
            raise UserError(
                f"{checkpoint.path / 'config.json'}: {name} is {value}, the model's is {values[name]}; "
                f"use the model size of this checkpoint"
            )


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter_name, nn.Parameter(tensor))


def _shape_note(checkpoint: StoredWeights, expected: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"{name}: {list(checkpoint.shapes[name])}, expected {list(expected[name])}"


def _shorten(keys: Sequence[str]) -> str:
    rest = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
