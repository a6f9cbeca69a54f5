"""Attention over packed segments: each query attends to the keys of its own segment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "sdpa", "varlen")
"""``sdpa``: one call a segment; ``varlen``: one FlashAttention call a pack (CUDA, half precision)."""


class Exchange(Protocol):
    """Trades tokens for heads between ranks that share a sequence (:class:`loomvideo.model.parallel.HeadExchange`)."""

    def heads_of_all_tokens(self, *tensors: Tensor) -> list[Tensor]:
        """``[own tokens, heads, dim]`` each to ``[all tokens, heads / ranks, dim]`` each."""
        ...

    def tokens_of_all_heads(self, tensor: Tensor) -> Tensor:
        """The way back."""
        ...


@dataclass(frozen=True)
class AttentionPlan:
    """Segment boundaries, known on the host (loops, kernel launch sizes) and on the device (kernels).

    Both copies are made once a pack, so that no layer waits for the device.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_offsets: Tensor
    """Cumulative query lengths, int32 [segments + 1]."""
    key_offsets: Tensor
    """Cumulative key lengths, int32 [segments + 1]."""
    exchange: Exchange | None = None
    """Set where each rank holds a stretch of the tokens; the plan is of all of them."""

    @classmethod
    def build(cls, query_lengths: Sequence[int], key_lengths: Sequence[int] | None = None) -> "AttentionPlan":
        """Plan self-attention (one list of lengths) or cross-attention (two)."""
        key_lengths = query_lengths if key_lengths is None else key_lengths
        return cls(tuple(query_lengths), tuple(key_lengths), _offsets(query_lengths), _offsets(key_lengths))

    def to(self, device: torch.device | str) -> "AttentionPlan":
        """Copy the device side."""
        return replace(
            self,
            query_offsets=self.query_offsets.to(device, non_blocking=True),
            key_offsets=self.key_offsets.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "AttentionPlan":
        """Copy into page-locked memory, from which copies to the device overlap with work."""
        return replace(self, query_offsets=self.query_offsets.pin_memory(), key_offsets=self.key_offsets.pin_memory())


def segment_attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, backend: str = "auto") -> Tensor:
    """Softmax attention inside each segment.

    Args:
        query: [query tokens, heads, head dim], segments one after another.
        key: [key tokens, heads, head dim].
        value: like ``key``.
        plan: Where the segments lie.
        backend: One of :data:`BACKENDS`; ``auto`` takes ``varlen`` for several segments in half precision on CUDA.

    Returns:
        [query tokens, heads, head dim]
    """
    if plan.exchange is not None:
        everyone = plan.exchange.heads_of_all_tokens(query, key, value)
        return plan.exchange.tokens_of_all_heads(segment_attention(*everyone, replace(plan, exchange=None), backend))
    if backend == "auto":
        half_on_cuda = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
        backend = "varlen" if half_on_cuda and len(plan.query_lengths) > 1 else "sdpa"
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

        return varlen_attn(
            query,
            key,
            value,
            plan.query_offsets,
            plan.key_offsets,
            max(plan.query_lengths),
            max(plan.key_lengths),
        )
    if len(plan.query_lengths) == 1:
        return _attend(query, key, value)
    queries = query.split(plan.query_lengths)
    keys, values = key.split(plan.key_lengths), value.split(plan.key_lengths)
    return torch.cat([_attend(*segment) for segment in zip(queries, keys, values, strict=True)])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads_first = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).squeeze(0).transpose(0, 1)


def _offsets(lengths: Sequence[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
