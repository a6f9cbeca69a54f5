"""Attention of prompts, or pictures, that lie one behind another, as transformers calls it: each attends to itself.

On CUDA in half precision it is torch's own FlashAttention for sequences of any length, one kernel for all of them;
elsewhere each is attended to by itself. Both read the same offsets.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

# With "flash" in its name, Qwen3-VL's vision tower hands over all pictures at once, with their offsets.
PACKED = "flash_of_segments"
_HALF = (torch.bfloat16, torch.float16)


def attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention inside each segment; keys and values may have fewer heads than queries.

    Args:
        module: The layer, whose ``is_causal`` counts where it is not given.
        query: [1, heads, tokens, head dim], segments one after another.
        key: [1, key heads, tokens, head dim].
        value: Like ``key``.
        attention_mask: None; segments and causality are all that is masked.
        cu_seq_lens_q: Where segments begin, and the end, int32 [segments + 1].
        max_length_q: Tokens of the longest.
        scaling: Factor of the products; None for the usual.
        is_causal: Whether a token sees only those before it.

    Returns:
        [1, tokens, heads, head dim], and None for the weights.
    """
    if attention_mask is not None or len(query) != 1:
        raise ValueError(f"packed attention takes one row and no mask, not {list(query.shape)} and a mask")
    causal = bool(module.is_causal) if is_causal is None else is_causal
    if query.is_cuda and query.dtype in _HALF:
        from torch.nn.attention.varlen import varlen_attn

        flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        found = varlen_attn(
            *flat, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
            scale=scaling, window_size=(-1, 0) if causal else (-1, -1), enable_gqa=True,
        )  # fmt: skip
        return found[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(*part, is_causal=causal, scale=scaling, enable_gqa=True) for part in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, attend_packed)
