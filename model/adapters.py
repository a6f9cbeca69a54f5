"""Adapters (LoRA) that people bring: five ways to name the same layers, several at once, each with a strength.

| dialect | a key of block 0's query | scale |
|---|---|---|
| ``peft`` | ``base_model.model.blocks.0.attn1.to_q.lora_A.weight`` | ``adapter_config.json`` beside it |
| ``diffusers`` | ``transformer.blocks.0.attn1.to_q.lora_A.weight`` | ``.alpha`` keys, or 1 |
| ``comfyui`` | ``diffusion_model.blocks.0.self_attn.q.lora_down.weight`` | ``.alpha`` keys, or 1 |
| ``kohya``, ``musubi`` | ``lora_unet_blocks_0_self_attn_q.lora_down.weight`` | ``.alpha`` keys |
| ``wan`` | ``blocks.0.self_attn.q.lora_A.weight`` | ``.alpha`` keys, or 1 |

An adapter is added beside a layer, not into its weight: unloading gives back exactly what was there, and layers in few
bits take adapters too. Every key of a file must belong to a layer of the model, or the file is refused, naming them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loomvideo.model.fingerprints import weights_fingerprint
from loomvideo.model.float8 import Float8Linear
from loomvideo.model.lora import ADAPTER_FILE
from loomvideo.model.quantize import QuantizedLinear
from loomvideo.platform.errors import UserError, full_disk_named

DIALECTS = ("peft", "diffusers", "comfyui", "kohya")
"""What adapters are written as; all are read, as are musubi's and bare Wan keys."""
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_", "model.")
_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
_ALPHA = (".alpha",)
# Wan's own names of what diffusers renamed.
_WAN = (
    ("attn1.to_out.0", "self_attn.o"), ("attn2.to_out.0", "cross_attn.o"), ("attn1.to_", "self_attn."),
    ("attn2.to_", "cross_attn."), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"), ("proj_out", "head.head"),
)  # fmt: skip
_LISTED = 5


@dataclass(frozen=True)
class Adapter:
    """An adapter as read: ``{layer: (down [rank, in], up [out, rank], scale)}`` and the strength it is wanted at."""

    name: str
    layers: Mapping[str, tuple[Tensor, Tensor, float]]
    strength: float = 1.0


class AdaptedLayer(nn.Module):
    """A linear layer with adapters beside it.

    Args:
        base: The layer, of any kind.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.downs, self.ups = nn.ParameterList(), nn.ParameterList()

    def add(self, down: Tensor, up: Tensor, factor: float, like: Tensor) -> None:
        """Add one, on the device and in the dtype of a tensor."""
        self.downs.append(nn.Parameter(down.to(like.device, like.dtype), requires_grad=False))
        self.ups.append(nn.Parameter((up * factor).to(like.device, like.dtype), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y = self.base(x)
        for down, up in zip(self.downs, self.ups, strict=True):
            y = y + F.linear(F.linear(x, down), up)
        return y


def parse_choice(choice: str) -> tuple[str, float]:
    """``file`` or ``file:strength``.

    Raises:
        UserError: if the strength is no number.
    """
    path, colon, strength = choice.rpartition(":")
    if not colon or Path(choice).exists():
        return choice, 1.0
    try:
        return path, float(strength)
    except ValueError as error:
        raise UserError(f"lora={choice}: write FILE or FILE:STRENGTH, such as style.safetensors:0.8") from error


def fingerprints(choices: Sequence[str]) -> list[list[str | float]]:
    """Content and strength of adapters written ``FILE`` or ``FILE:STRENGTH``, for the facts of results.

    Raises:
        UserError: if a file is not there.
    """
    found: list[list[str | float]] = []
    for path, strength in map(parse_choice, choices):
        if not Path(path).exists():
            raise UserError(f"lora={path}: no such file")
        found.append([weights_fingerprint(path), strength])
    return found


def read_adapter(path: str | Path, model: nn.Module, strength: float = 1.0) -> Adapter:
    """Read an adapter of any dialect for a model.

    Args:
        path: A safetensors file, or PEFT's folder.
        model: The model whose layers it adapts.
        strength: What its contribution is multiplied by.

    Raises:
        UserError: if it cannot be read, or naming the keys that belong to no layer, are incomplete or misshapen.
    """
    path = Path(path)
    file = path / ADAPTER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"lora={path}: no such file; give a .safetensors file or a folder with {ADAPTER_FILE}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - the handle is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"lora={path}: not a readable safetensors file ({str(error).splitlines()[0]})") from error
    layers, names = _linears(model), _layer_names(model)
    found: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        layer, kind = _match(key, names)
        if layer is None:
            unmatched.append(key)
        else:
            found.setdefault(layer, {})[kind] = tensor
    if unmatched:
        raise UserError(
            f"lora={path}: {len(unmatched)} of {len(tensors)} keys belong to no linear layer of this model, "
            f"{_listed(unmatched)}; is it an adapter of another model?"
        )
    stated = _stated_alpha(file)
    read = {}
    for layer, parts in found.items():
        if not {"down", "up"} <= set(parts):
            raise UserError(f"lora={path}: {layer} lacks its {'up' if 'down' in parts else 'down'} matrix")
        down, up = parts["down"].flatten(1).float(), parts["up"].flatten(1).float()
        expected = layers[layer].out_features, layers[layer].in_features
        if (up.shape[0], down.shape[1]) != expected or up.shape[1] != down.shape[0]:
            raise UserError(f"lora={path}: {layer} is {list(up.shape)} x {list(down.shape)}, "
                            f"the layer is {list(expected)}; is it of another model size?")  # fmt: skip
        alpha = float(parts["alpha"]) if "alpha" in parts else stated
        read[layer] = down, up, 1.0 if alpha is None else alpha / down.shape[0]
    if not read:
        raise UserError(f"lora={path}: holds no adapter")
    return Adapter(str(path), read, strength)


def set_adapters(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Give a model exactly these adapters; those it had before are taken off."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLayer):
            _put(model, name, module.base)
    like = next(model.parameters())
    model.adapters = tuple(adapters)
    for adapter in adapters:
        for layer, (down, up, scale) in adapter.layers.items():
            module = model.get_submodule(layer)
            if not isinstance(module, AdaptedLayer):
                module = AdaptedLayer(module)
                _put(model, layer, module)
            module.add(down, up, scale * adapter.strength, like)


def save_as(adapter: Adapter, path: str | Path, dialect: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an adapter for another program, at strength 1.

    Args:
        adapter: What :func:`read_adapter` gave.
        path: The file; for ``peft`` a folder.
        dialect: One of :data:`DIALECTS`.
        dtype: The type of the written matrices.

    Raises:
        UserError: for an unknown dialect, or a file that is there.
    """
    path = Path(path)
    if dialect not in DIALECTS:
        raise UserError(f"format={dialect}: choose one of {', '.join(DIALECTS)}")
    file = path / ADAPTER_FILE if dialect == "peft" else path
    if file.exists():
        raise UserError(f"{file}: is there already; choose another name or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    down_suffix, up_suffix = (".lora_A.weight", ".lora_B.weight") if dialect in ("peft", "diffusers") else (
        ".lora_down.weight", ".lora_up.weight")  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for layer, (down, up, scale) in adapter.layers.items():
        name = written_name(layer, dialect)
        # PEFT's one alpha a file cannot say a scale a layer: it goes into the matrix.
        tensors[name + up_suffix] = (up * scale if dialect == "peft" else up).to(dtype).contiguous()
        tensors[name + down_suffix] = down.to(dtype).contiguous()
        if dialect != "peft":
            tensors[f"{name}.alpha"] = torch.tensor(scale * down.shape[0])
    with full_disk_named(file, file):
        save_file(tensors, file, metadata={"format": "pt"})
    if dialect == "peft":
        rank = max(down.shape[0] for down, _, _ in adapter.layers.values())
        ranks = {layer: down.shape[0] for layer, (down, _, _) in adapter.layers.items()}
        stated = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks,
                  "target_modules": sorted(adapter.layers), "bias": "none", "inference_mode": True}  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(stated, indent=2) + "\n")


def written_name(layer: str, dialect: str) -> str:
    """A layer's key in a dialect, without what says which matrix it is."""
    if dialect == "peft":
        return f"base_model.model.{layer}"
    if dialect == "diffusers":
        return f"transformer.{layer}"
    if dialect == "comfyui":
        return f"diffusion_model.{_wan_name(layer)}"
    return "lora_unet_" + _wan_name(layer).replace(".", "_")


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by the names they have without adapters."""
    kinds = (nn.Linear, QuantizedLinear, Float8Linear)
    return {name.replace(".base", ""): module for name, module in model.named_modules() if isinstance(module, kinds)}


def _layer_names(model: nn.Module) -> dict[str, str]:
    """Every spelling of a layer's name to our own."""
    names = {}
    for layer in _linears(model):
        for spelling in (layer, _wan_name(layer)):
            names[spelling] = names[spelling.replace(".", "_")] = layer
    return names


def _wan_name(layer: str) -> str:
    for ours, theirs in _WAN:
        layer = layer.replace(ours, theirs)
    return layer


def _match(key: str, names: Mapping[str, str]) -> tuple[str | None, str]:
    for kind, suffixes in (("down", _DOWN), ("up", _UP), ("alpha", _ALPHA)):
        for suffix in suffixes:
            if key.endswith(suffix):
                layer = key.removesuffix(suffix)
                candidates = [layer, *(layer.removeprefix(prefix) for prefix in _PREFIXES if layer.startswith(prefix))]
                return next((names[name] for name in candidates if name in names), None), kind
    return None, ""


def _stated_alpha(file: Path) -> float | None:
    config = file.with_name("adapter_config.json")
    if not config.is_file():
        return None
    stated = json.loads(config.read_text(encoding="utf-8"))
    if stated.get("use_dora"):
        raise UserError(f"lora={file}: a DoRA; export the run's merged weights and use those")
    if stated.get("rank_pattern"):
        return None  # a scale of 1 in each layer, as `save_as` writes it
    alpha = stated.get("lora_alpha")
    return None if alpha is None else float(alpha)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
