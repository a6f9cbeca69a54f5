"""Floating-point operations of a pack: matrix products and attention, two operations a multiply-add.

The backward pass counts what its mathematics needs: twice the forward's, once where a layer's input has no gradient.
Recomputation (activation checkpointing, FlashAttention's scores) is not counted, as usual for model FLOPs utilisation.
"""

from collections.abc import Sequence
from typing import NamedTuple

from loomvideo.model.config import DiTConfig
from loomvideo.model.packing import PackedBatch


class Flops(NamedTuple):
    """Operations of one pass over a pack."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def pack_flops(config: DiTConfig, batch: PackedBatch) -> Flops:
    """Operations of a pack, exactly."""
    plan = batch.cross_plan
    return sequence_flops(config, plan.query_lengths, plan.key_lengths, batch.num_video_tokens)


def sequence_flops(
    config: DiTConfig, lengths: Sequence[int], mllm_lengths: Sequence[int], num_video_tokens: int | None = None
) -> Flops:
    """Operations of samples that are known by their lengths alone.

    Args:
        config: Sizes.
        lengths: Video and reference tokens of each sample.
        mllm_lengths: MLLM tokens of each sample.
        num_video_tokens: Tokens that get a velocity; None where there are no references.
    """
    dim, num_samples = config.inner_dim, len(lengths)
    tokens, mllm_tokens = sum(lengths), sum(mllm_lengths)
    num_video_tokens = tokens if num_video_tokens is None else num_video_tokens

    # Layers whose input has no gradient: patch embeddings and the first of the timestep's.
    num_embeddings = 2 if config.use_source_embedding else 1
    leaf = tokens * config.patch_dim * dim * num_embeddings + num_samples * config.freq_dim * dim
    time = num_samples * 7 * dim * dim
    embedder = mllm_tokens * config.mllm_hidden_dim * (config.mllm_dim + dim)
    self_attention = 4 * tokens * dim * dim + 2 * dim * sum(length * length for length in lengths)
    pairs = sum(length * mllm for length, mllm in zip(lengths, mllm_lengths, strict=True))
    cross_attention = 2 * (tokens + mllm_tokens) * dim * dim + 2 * dim * pairs
    feed_forward = 2 * tokens * dim * config.ffn_dim
    block = embedder + self_attention + cross_attention + feed_forward
    inner = time + config.num_layers * block + num_video_tokens * dim * config.out_patch_dim
    return Flops(forward=2 * (leaf + inner), backward=2 * (leaf + 2 * inner))
