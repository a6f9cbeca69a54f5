"""Low-rank adapters of linear layers: LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024).

LoRA learns y = x (W + s B A)^T + b with W frozen and s = alpha / rank. DoRA also learns the length of every row,
y = x (m V / |V|)^T + b with V = W + s B A, where |V| counts as a constant for gradients (its section 4.3).

An adapted layer holds W, A, B and m itself, so that W keeps its published name, and every parameter is used in the
``forward`` of the module that owns it: ZeRO-3 gathers parameters by module. Adapters are saved in PEFT's format.
"""

import fnmatch
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from loomvideo.model.config import LoRAConfig
from loomvideo.platform.errors import UserError, full_disk_named

ADAPTER_FILE = "adapter_model.safetensors"
DOWN, UP, MAGNITUDE = ".lora_A", ".lora_B", ".lora_magnitude"


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter; it computes what the layer did until it is trained.

    Args:
        linear: Its parameters are taken over.
        rank: The rank of the adapter.
        scale: The scale of B A.
        dora: Whether row lengths are learned.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dora: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        weight = linear.weight.detach()
        self.lora_A = nn.Parameter(weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(linear.out_features, rank))
        self.lora_magnitude = nn.Parameter(torch.linalg.norm(weight, dim=1)) if dora else None
        if not weight.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        if self.lora_magnitude is None:
            return torch.add(F.linear(x, self.weight, self.bias), update, alpha=self.scale)
        with torch.no_grad():
            lengths = torch.linalg.norm(self.weight + self.scale * (self.lora_B @ self.lora_A), dim=1)
        y = torch.add(F.linear(x, self.weight), update, alpha=self.scale) * (self.lora_magnitude / lengths)
        return y if self.bias is None else y + self.bias


def adapt(model: nn.Module, config: LoRAConfig) -> None:
    """Replace the targeted linear layers and freeze all else but what ``unfreeze`` names.

    Raises:
        UserError: if a pattern names nothing.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = _matching(config.targets, layers, "lora.targets", "linear layer")
    also = _matching(config.unfreeze, dict(model.named_parameters()), "lora.unfreeze", "parameter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in also)
    # In the model's order, so that every rank draws the same values.
    for name in [name for name in layers if name in names]:
        parent, _, child = name.rpartition(".")
        adapted = AdaptedLinear(layers[name], config.rank, config.scale, config.dora)
        setattr(model.get_submodule(parent), child, adapted)


def _matching(patterns: Sequence[str], things: Mapping[str, object], key: str, kind: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(things, pattern)
        if not matches:
            raise UserError(f"{key}: {pattern!r} matches no {kind} (e.g. {next(iter(things))})")
        found.update(matches)
    return found


class MergedWeights(Mapping[str, Tensor]):
    """A state dict whose adapters are added to the weights they adapt: published names, one parameter at a time.

    Args:
        state: The state of an adapted model; may read lazily.
        config: Its adapters.
    """

    def __init__(self, state: Mapping[str, Tensor], config: LoRAConfig) -> None:
        self.state, self.config = state, config
        self._names = [name for name in state if not name.endswith((DOWN, UP, MAGNITUDE))]

    def __getitem__(self, name: str) -> Tensor:
        weight, layer = self.state[name], name.removesuffix(".weight")
        if name == layer or layer + DOWN not in self.state:
            return weight
        merged = weight.float() + self.config.scale * (
            self.state[layer + UP].float() @ self.state[layer + DOWN].float()
        )
        if layer + MAGNITUDE in self.state:
            merged *= (self.state[layer + MAGNITUDE].float() / torch.linalg.norm(merged, dim=1))[:, None]
        return merged.to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_adapter(
    state: Mapping[str, Tensor], config: LoRAConfig, folder: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write the adapters alone in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        UserError: if the folder already holds an adapter.
    """
    folder = Path(folder)
    if (folder / ADAPTER_FILE).exists():
        raise UserError(f"{folder}: already holds an adapter; choose another folder or remove this one")
    folder.mkdir(parents=True, exist_ok=True)
    suffixes = {DOWN: ".lora_A.weight", UP: ".lora_B.weight", MAGNITUDE: ".lora_magnitude_vector"}
    tensors, layers = {}, []
    for name in state:
        layer, _, kind = name.rpartition(".")
        if f".{kind}" in suffixes:
            tensors[f"base_model.model.{layer}{suffixes[f'.{kind}']}"] = state[name].to("cpu", dtype).contiguous()
            layers += [layer] if f".{kind}" == DOWN else []
    with full_disk_named(folder / ADAPTER_FILE, folder / ADAPTER_FILE):
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    stated = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha or config.rank,
        "use_dora": config.dora,
        "target_modules": sorted(layers),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(stated, indent=2) + "\n")
