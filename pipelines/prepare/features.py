"""MLLM features of a sample in the form they are kept: the states themselves, or the MLLM's inputs.

``stored`` members hold ``full.{i}`` and ``visual.{i}`` [layers, tokens, dim], in bf16 or in eight bits with
``full.{i}.scale`` [layers, tokens]. ``streamed`` members hold what the MLLM reads: ``input_ids.{i}``,
``visual_input_ids.{i}`` and the pictures both share, as uint8 patches ``pixel_values.{i}`` or
``pixel_values_videos.{i}`` with their grids; :func:`streamed_inputs` gives the MLLM's inputs back exactly.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loomvideo.model.conditioning.inputs import MLLMInputs, ProcessorConfig
from loomvideo.platform.shards.layers import expanded
from loomvideo.platform.shards.quantize import SCALE_SUFFIX, quantize, restore

_PIXELS = ("pixel_values", "pixel_values_videos")
_GRIDS = ("image_grid_thw", "video_grid_thw")


def stored_members(states: Mapping[str, Tensor], dtype: str, layers: Sequence[int] = ()) -> dict[str, Tensor]:
    """Store form of ``{"full.0": states [layers, tokens, dim], ...}``, of all layers or of those listed."""
    tensors = {}
    for name, state in states.items():
        values, scale = quantize(state[list(layers)].cpu() if layers else state.cpu(), dtype)
        tensors[name] = values
        if scale is not None:
            tensors[name + SCALE_SUFFIX] = scale
    return tensors


def streamed_members(
    inputs: Mapping[str, MLLMInputs], processor: ProcessorConfig, num_entries: int | None = None
) -> dict[str, Tensor]:
    """Store form of ``{"full.0": inputs, "visual.0": inputs, ...}``; the variants of an entry share their pictures.

    Args:
        inputs: Those of each entry; from ``num_entries`` on they are of other wordings, whose pictures are the first's.
        processor: How pictures became patches.
        num_entries: Entries of one wording; None for all.
    """
    tensors: dict[str, Tensor] = {}
    for name, entry in inputs.items():
        variant, i = name.split(".")
        tensors[f"input_ids.{i}" if variant == "full" else f"{variant}_input_ids.{i}"] = entry.input_ids
        if num_entries is not None and int(i) >= num_entries:
            continue
        for kind, value in entry.tensors().items():
            if kind in _PIXELS and variant == "full":
                tensors[f"{kind}.{i}"] = _to_uint8(value, processor)
            elif kind in _GRIDS:
                tensors[f"{kind}.{i}"] = value
    return tensors


def of_text(tensors: Mapping[str, Tensor], entry: int, text_entry: int) -> dict[str, Tensor]:
    """A streamed member in which an entry has another wording: the token ids of ``text_entry``."""
    return {**tensors, f"input_ids.{entry}": tensors[f"input_ids.{text_entry}"]}


def streamed_inputs(tensors: Mapping[str, Tensor], i: int, variant: str, processor: ProcessorConfig) -> MLLMInputs:
    """The MLLM's inputs of entry ``i``, ``full`` or ``visual``, from a streamed member."""
    ids = tensors[f"input_ids.{i}" if variant == "full" else f"{variant}_input_ids.{i}"]
    values = {"input_ids": ids}
    values |= {kind: _to_float(tensors[f"{kind}.{i}"], processor) for kind in _PIXELS if f"{kind}.{i}" in tensors}
    values |= {kind: tensors[f"{kind}.{i}"] for kind in _GRIDS if f"{kind}.{i}" in tensors}
    return MLLMInputs.from_tensors(values)


def _statistics(patches: Tensor, processor: ProcessorConfig) -> tuple[Tensor, Tensor]:
    # Patches lie channel first: [patches, 3 * pair * side * side].
    repeats = patches.shape[-1] // 3
    return (torch.tensor(values).repeat_interleave(repeats) for values in (processor.mean, processor.std))


def _to_uint8(patches: Tensor, processor: ProcessorConfig) -> Tensor:
    mean, std = _statistics(patches, processor)
    return ((patches.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _to_float(patches: Tensor, processor: ProcessorConfig) -> Tensor:
    mean, std = _statistics(patches, processor)
    return (patches / 255 - mean) / std


class FeatureError:
    """Mean relative error of features as they are read back, per layer and behind the embedder.

    The embedder that will read the features is not trained yet; one of its form (RMSNorm, linear, GELU, linear) with
    seeded random weights and a narrow middle stands for it.
    """

    def __init__(self, dim: int, hidden: int = 256):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._embedder = nn.Sequential(
                nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, hidden)
            ).requires_grad_(False)

    def measure(
        self, states: Mapping[str, Tensor], members: Mapping[str, Tensor], layers: Sequence[int] = ()
    ) -> dict[str, Any]:
        """The error of one sample.

        Args:
            states: Exact, ``{"full.0": [layers, tokens, dim], ...}``.
            members: Their store form, see :func:`stored_members`.
            layers: Stored ones; empty: all.

        Returns:
            ``{"layers": [...], "embedder": ..., "tokens": ...}``.
        """
        read = restore(dict(members))
        if layers:
            read = expanded(read, layers, len(next(iter(states.values()))))
        exact = torch.cat([states[name].float().cpu() for name in states], 1)
        kept = torch.cat([read[name].float() for name in states], 1)
        # The embedder reads every layer; the first, the middle and the last stand for all.
        some = sorted({0, len(exact) // 2, len(exact) - 1})
        behind = _relative(self._embedder(kept[some]), self._embedder(exact[some]))
        return {
            "layers": [round(float(value), 6) for value in _relative(kept, exact).double().mean(1)],
            "embedder": round(float(behind.double().mean()), 6),
            "tokens": exact.shape[1],
        }


def _relative(values: Tensor, exact: Tensor) -> Tensor:
    return (values - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-12)


def combined_error(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The errors of several samples or shards as one, weighted by tokens; tokens 0 when nothing was measured."""
    parts = [part for part in parts if part and part["tokens"]]
    tokens = sum(part["tokens"] for part in parts)
    if not tokens:
        return {"layers": [], "embedder": 0.0, "tokens": 0}
    layers = zip(*(part["layers"] for part in parts), strict=True)
    weights = [part["tokens"] / tokens for part in parts]
    return {
        "layers": [round(sum(w * v for w, v in zip(weights, values, strict=True)), 6) for values in layers],
        "embedder": round(sum(w * part["embedder"] for w, part in zip(weights, parts, strict=True)), 6),
        "tokens": tokens,
    }


def keeps_states(mode: str, has_media: bool) -> bool:
    """Whether a sample's states are stored in this mode."""
    return mode == "stored" or (mode == "text" and not has_media)
