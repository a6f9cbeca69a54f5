"""The names that weights have in the checkpoints people bring, and what a file that is no checkpoint is instead.

Trainers and user interfaces put prefixes before names (``_orig_mod.``, ``model.diffusion_model.``), and Wan's own files
name modules otherwise than diffusers, whose names LoomVideo's published file has. The renaming is that of diffusers'
``scripts/convert_wan_to_diffusers.py``.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

PREFIXES = (
    "_orig_mod.", "module.", "model.diffusion_model.", "diffusion_model.", "base_model.model.", "transformer.", "dit.",
    "model.",
)  # fmt: skip
_WAN_NAMES = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(\.attn[12])\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attn[12])\.o\.", r"\1.to_out.0."),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)
# One of these stands in every official file and in no other.
_OFFICIAL = re.compile(r"(^|\.)(time_projection\.1|head\.head|blocks\.0\.self_attn)\.")
_ADAPTER = re.compile(r"lora_(down|up|A|B|unet|te)|\.hada_w|\.lokr_|\.(alpha|dora_scale)$")
# What quantised files and trainers store beside the weights.
_NO_WEIGHTS = re.compile(r"(^|\.)(scaled_fp8|global_step|step|epoch|num_updates|num_batches_tracked|_metadata)$")
_SCALES = re.compile(r"\.(scale_weight|weight_scale|scale_input|input_scale)$")
LFS_START = b"version https://git-lfs"


def without_prefixes(name: str) -> str:
    """A tensor's name without what trainers, compilers and user interfaces put before it."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def is_official_wan(names: Iterable[str]) -> bool:
    """Whether names are those of Wan's own files."""
    return any(_OFFICIAL.search(name) for name in names)


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Our name of every stored tensor that is a weight, by its stored name.

    Raises:
        ValueError: when two tensors would have one name, or the file is of a kind that holds no such weights.
    """
    stored = [name for name in names if not _NO_WEIGHTS.search(name)]
    if any(_ADAPTER.search(name) for name in stored):
        raise ValueError("an adapter (LoRA), not a whole model; give it as an adapter beside the model's weights")
    if any(_SCALES.search(name) for name in stored):
        raise ValueError("8-bit weights with scales; use the bf16 or fp16 file of the same model")
    plain = {name: without_prefixes(name) for name in stored}
    if is_official_wan(plain.values()):
        plain = {name: _from_official(short) for name, short in plain.items()}
    seen: dict[str, str] = {}
    for name, ours in plain.items():
        if ours in seen:
            raise ValueError(f"{seen[ours]} and {name} are both {ours}; keep one model (or its EMA) in the file")
        seen[ours] = name
    return plain


def _from_official(name: str) -> str:
    for pattern, ours in _WAN_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def official_wan_sizes(stated: Mapping[str, object]) -> dict[str, object]:
    """The sizes in an official ``config.json`` (``WanModel``) by diffusers' names."""
    names = {
        "num_layers": "num_layers", "num_heads": "num_attention_heads", "ffn_dim": "ffn_dim", "in_dim": "in_channels",
        "out_dim": "out_channels", "freq_dim": "freq_dim", "eps": "eps",
    }  # fmt: skip
    sizes = {ours: stated[theirs] for theirs, ours in names.items() if theirs in stated}
    if "dim" in stated and "num_heads" in stated:
        sizes["attention_head_dim"] = int(stated["dim"]) // int(stated["num_heads"])  # type: ignore[call-overload]
    return sizes


def why_unreadable(file: Path) -> str | None:
    """What keeps a weights file from being read, where its first bytes and its size tell; None when nothing does."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(64)
        if size == 0:
            return "the file is empty"
        if head.startswith(LFS_START):
            return "a Git LFS pointer, not the weights; run `git lfs pull`"
        if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            return "a web page; the download failed"
        if file.suffix != ".safetensors":
            return None
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > size:
            return "cut off, or no safetensors file; download it again"
        opened.seek(8)
        try:
            header = json.loads(opened.read(length))
            wanted = (
                8 + length + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return "its header is damaged; download it again"
    return f"cut off at {size} of {wanted} bytes; download it again" if size < wanted else None


def meant(folder: Path) -> list[Path]:
    """Checkpoints in the folders below one that is none itself: what its user may have meant."""
    configs = sorted(folder.glob("*/config.json")) + sorted(folder.glob("*/*/config.json"))
    return [file.parent for file in configs] + sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.pth"))
