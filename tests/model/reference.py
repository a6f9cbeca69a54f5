"""The published model's vectors: computed by its own code on small random fp32 weights."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loomvideo.model.config import DiTConfig

FOLDER = Path(
    os.environ.get("LOOMVIDEO_REFERENCE_VECTORS", Path(__file__).parents[2] / ".." / "shared" / "reference_vectors")
)
requires_reference_vectors = pytest.mark.skipif(
    not (FOLDER / "vectors.safetensors").is_file(), reason=f"no reference vectors in {FOLDER}"
)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@cache
def reference_config() -> dict:
    """``config.json``: sizes, samples, guidance case, dynamic shifts."""
    return json.loads((FOLDER / "config.json").read_text())


@cache
def reference_vectors() -> dict[str, torch.Tensor]:
    """``vectors.safetensors``: inputs and outputs by name."""
    return load_file(FOLDER / "vectors.safetensors")


@cache
def reference_weights() -> dict[str, torch.Tensor]:
    """``gen_model.safetensors``: the published key names, dead text embedder included."""
    return load_file(FOLDER / "gen_model.safetensors")


def reference_dit_config() -> DiTConfig:
    """Sizes of the transformer of the vectors."""
    sizes, mllm = reference_config()["dit"], reference_config()["mllm"]
    return DiTConfig(
        num_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        attention_head_dim=sizes["attention_head_dim"],
        ffn_dim=sizes["ffn_dim"],
        in_channels=sizes["in_channels"],
        out_channels=sizes["out_channels"],
        mllm_dim=mllm["text_config"]["hidden_size"],
        freq_dim=sizes["freq_dim"],
        patch_size=tuple(sizes["patch_size"]),
        eps=sizes["eps"],
        use_source_embedding="source_patch_embedding.weight" in reference_weights(),
    )
