"""Attention over packed segments: each query attends to the keys of its own segment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loomvideo.model import attention_choice

LONG_SEGMENT = 1024
"""Tokens from which cuDNN computes a segment: it prepares a plan for every length, and short ones are many."""


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


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, implementation: str = "sdpa"
) -> Tensor:
    """Softmax attention inside each segment.

    Args:
        query: [query tokens, heads, head dim], segments one after another.
        key: [key tokens, heads, head dim].
        value: like ``key``.
        plan: Where the segments lie.
        implementation: One of :data:`loomvideo.model.attention_choice.IMPLEMENTATIONS`, from
            :func:`settled_attention`.

    Returns:
        [query tokens, heads, head dim]
    """
    if plan.exchange is not None:
        everyone = plan.exchange.heads_of_all_tokens(query, key, value)
        alone = replace(plan, exchange=None)
        return plan.exchange.tokens_of_all_heads(segment_attention(*everyone, alone, implementation))
    if implementation == "cudnn" and not _is_long(plan):
        implementation = "flash2"
    if implementation.startswith("flash"):
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
    if implementation == "sdpa":
        return _by_segment(query, key, value, plan)
    # Torch raises where the one named cannot compute, instead of taking another.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if implementation == "cudnn" else SDPBackend.MATH):
        return _by_segment(query, key, value, plan)


def settled_attention(like: Tensor, head_dim: int) -> str:
    """What computes attention of tensors like this one: on CUDA chosen and checked at the first call."""
    if not like.is_cuda:
        return "sdpa"
    attention_choice.settle(like.device, like.dtype, head_dim, _packed)
    return attention_choice.chosen(like.dtype)


def _is_long(plan: AttentionPlan) -> bool:
    return plan.query_lengths == plan.key_lengths and min(plan.query_lengths) >= LONG_SEGMENT


def _packed(name: str, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    if name != "cudnn":
        return segment_attention(query, key, value, AttentionPlan.build(lengths).to(query.device), name)
    # A pack with a short segment is none of cuDNN's.
    parts = [tensor.split(tuple(lengths)) for tensor in (query, key, value)]
    plans = [AttentionPlan.build([length]).to(query.device) for length in lengths]
    return torch.cat([segment_attention(*part, name) for part in zip(*parts, plans, strict=True)])


def _by_segment(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
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
