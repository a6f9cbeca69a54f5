"""Checkpoints of the transformer, recognised: our folders, the published file, and Wan2.2's diffusers folder.

All share the published key names. Tensors are read when they are asked for.
"""

import fnmatch
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loomvideo.model.checkpoint_names import (
    is_official_wan,
    meant,
    official_wan_sizes,
    our_names,
    why_unreadable,
    without_prefixes,
)
from loomvideo.model.config import DiTConfig
from loomvideo.platform.errors import UserError

FORMAT = "loomvideo-dit"
FORMAT_VERSION = 1
DEAD_KEYS = ("condition_embedder.text_embedder.*",)
"""Weights of Wan that LoomVideo never uses: T5's embedder, replaced by the MLLM's."""
CONDITIONING_KEYS = ("mllm_embedder.*", "source_patch_embedding.*")
"""Weights of LoomVideo that a Wan checkpoint lacks; they start such that Wan's function is unchanged."""
PUBLISHED_FILE = "gen_model.pth"
DIFFUSERS_CLASS = "LoomVideoTransformer3DModel"
"""``_class_name`` of the transformer in a diffusers folder of ours."""


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
