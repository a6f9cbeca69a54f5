"""Checkpoints of the transformer: our folders, the published file, and Wan2.2's diffusers folder.

All share the published key names. A model is built on the meta device and each tensor is read, converted and put in
place by itself, so that loading needs one copy of the weights. Keys that are missing, unexpected or misshapen are
errors unless a pattern allows them; the published text embedder, whose output reaches no block, is left out knowingly.
"""

import fnmatch
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loomvideo.model.checkpoint_names import (
    is_official_wan,
    meant,
    official_wan_sizes,
    our_names,
    why_unreadable,
    without_prefixes,
)
from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.platform.errors import UserError, full_disk_named

FORMAT = "loomvideo-dit"
FORMAT_VERSION = 1
DEAD_KEYS = ("condition_embedder.text_embedder.*",)
"""Weights of Wan that LoomVideo never uses: T5's embedder, replaced by the MLLM's."""
CONDITIONING_KEYS = ("mllm_embedder.*", "source_patch_embedding.*")
"""Weights of LoomVideo that a Wan checkpoint lacks; they start such that Wan's function is unchanged."""
PUBLISHED_FILE = "gen_model.pth"
DIFFUSERS_CLASS = "LoomVideoTransformer3DModel"
"""``_class_name`` of the transformer in a diffusers folder of ours."""
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


@dataclass
class StoredWeights:
    """Tensors of a checkpoint by name, read only when asked for."""

    path: Path
    kind: str
    """``loomvideo``, ``published`` or ``wan``."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    config: DiTConfig | None = None
    """Sizes, where the checkpoint states them all (our own folders)."""
    stated: dict[str, Any] = field(default_factory=dict)
    """What a Wan folder's ``config.json`` states, by our names."""
    _files: dict[str, Path] = field(default_factory=dict)
    _tensors: Mapping[str, Tensor] = field(default_factory=dict)
    _stored_names: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._files.values())) or [self.path]

    def tensors(self, names: Collection[str]) -> Iterable[tuple[str, Tensor]]:
        """Read tensors one by one, file by file."""
        for name in names:
            if name in self._tensors:
                yield name, self._tensors[name]
        for file in sorted({self._files[name] for name in names if name in self._files}):
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    if self._files.get(name) == file:
                        yield name, handle.get_tensor(self._stored_names.get(name, name))


def open_checkpoint(path: str | Path) -> StoredWeights:
    """Recognise a checkpoint.

    Args:
        path: Our folder; ``gen_model.pth``, its folder, or a ``.safetensors`` file of the same keys; a diffusers
            folder of LoomVideo or Wan, or its ``transformer`` folder.

    Raises:
        UserError: if it is none of these.
    """
    path = Path(path)
    if path.is_file():
        _refuse_unreadable(path)
        return _open_file(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; give a weights folder, gen_model.pth or a .safetensors file")
    config_file = path / "config.json"
    if config_file.is_file():
        stated = _stated(config_file)
        if stated.get("format") == FORMAT:
            if stated["format_version"] != FORMAT_VERSION:
                raise UserError(f"{config_file}: format_version {stated['format_version']}, expected {FORMAT_VERSION}")
            config = DiTConfig.from_dict(stated["dit"], source=str(config_file))
            return _open_safetensors(path, "loomvideo", _shard_files(path, "model"), config=config)
        if stated.get("_class_name") == DIFFUSERS_CLASS:
            sizes = {name: value for name, value in stated.items() if not name.startswith("_")}
            files = _shard_files(path, "diffusion_pytorch_model")
            config = DiTConfig.from_dict(sizes, source=str(config_file))
            return _open_safetensors(path, "loomvideo", files, config=config)
        if stated.get("_class_name") == "WanTransformer3DModel":
            files = _shard_files(path, "diffusion_pytorch_model")
            return _open_safetensors(path, "wan", files, stated=_wan_sizes(stated))
        if stated.get("_class_name") == "WanModel":
            # Wan's own repository keeps diffusers' file names and its own names of tensors and sizes.
            files = _shard_files(path, "diffusion_pytorch_model")
            return _open_safetensors(path, "wan", files, stated=official_wan_sizes(stated))
    for candidate in (path / PUBLISHED_FILE, path / "transformer" / "config.json"):
        if candidate.is_file():
            return open_checkpoint(candidate if candidate.name == PUBLISHED_FILE else candidate.parent)
    below = meant(path)
    hint = f"; did you mean {' or '.join(map(str, below[:3]))}?" if below else ""
    expected = f"config.json of LoomVideo or WanTransformer3DModel, or {PUBLISHED_FILE}"
    raise UserError(f"{path}: not a checkpoint; expected {expected}{hint}")


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


def _stated(config_file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config_file}: is no JSON ({error})") from error
    if not isinstance(stated, dict):
        raise UserError(f"{config_file}: expected an object with the model's sizes")
    return stated


def _refuse_unreadable(file: Path) -> None:
    reason = why_unreadable(file)
    if reason:
        raise UserError(f"{file}: {reason}")


def _kind_and_names(path: Path, kind: str, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """What a file holds (Wan's own names make it ``wan``), and our name of each of its weights."""
    names = list(names)
    try:
        ours = our_names(names)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    lacks_ours = not any(fnmatch.fnmatchcase(name, pattern) for name in ours.values() for pattern in CONDITIONING_KEYS)
    return ("wan" if is_official_wan(map(without_prefixes, names)) and lacks_ours else kind), ours


def _open_file(path: Path) -> StoredWeights:
    if path.suffix == ".safetensors":
        return _open_safetensors(path, "published", [path])
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable state dict ({first})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict of tensors by name")
    kind, ours = _kind_and_names(path, "published", state)
    tensors = {ours[name]: tensor for name, tensor in state.items() if name in ours}
    return StoredWeights(
        path,
        kind,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        _tensors=tensors,
    )


def _open_safetensors(path: Path, kind: str, files: Sequence[Path], **stated: Any) -> StoredWeights:
    checkpoint = StoredWeights(path, kind, {}, {}, **stated)
    slices: dict[str, tuple[Path, Any]] = {}
    with ExitStack() as stack:
        for file in files:
            _refuse_unreadable(file)
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({str(error).splitlines()[0]})") from error
            slices |= {name: (file, handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118 - no mapping
        checkpoint.kind, ours = _kind_and_names(path, kind, slices)
        for stored, name in ours.items():
            file, tensor = slices[stored]
            checkpoint.shapes[name] = tuple(tensor.get_shape())
            checkpoint.dtypes[name] = tensor.get_dtype()
            checkpoint._files[name], checkpoint._stored_names[name] = file, stored
    return checkpoint


def _shard_files(folder: Path, stem: str) -> list[Path]:
    for variant in ("", ".bf16", ".fp16"):
        whole = folder / f"{stem}{variant}.safetensors"
        # diffusers has written both names of a variant's index, by version.
        indices = (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json")
        index = next((folder / name for name in indices if (folder / name).is_file()), None)
        if index is not None or whole.is_file():
            break
    else:
        raise UserError(f"{folder / stem}.safetensors: not found; the checkpoint is incomplete")
    if index is None:
        return [whole]
    mapped = _stated(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise UserError(f"{index}: has no weight_map; download it again")
    files = sorted({folder / str(name) for name in mapped.values()})
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: not found; the checkpoint is incomplete")
    return files


def _wan_sizes(stated: Mapping[str, Any]) -> dict[str, Any]:
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "out_channels")
    sizes = {name: stated[name] for name in (*names, "freq_dim", "eps") if name in stated}
    return {**sizes, "patch_size": tuple(stated["patch_size"])} if "patch_size" in stated else sizes


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
