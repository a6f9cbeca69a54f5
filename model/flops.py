"""Floating-point operations of a pack: matrix products and attention, two operations a multiply-add.

The backward pass counts what its mathematics needs: twice the forward's, once where a layer's input has no gradient.
Recomputation (activation checkpointing, FlashAttention's scores) is not counted, as usual for model FLOPs utilisation.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

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


Lengths = TypeVar("Lengths")  # an int, or an int64 array of many samples


def sample_flops(
    config: DiTConfig, tokens: Lengths, mllm_tokens: Lengths, num_video_tokens: Lengths
) -> tuple[Lengths, Lengths]:
    """Forward and backward operations of one sample, or of many at once (arrays of their lengths).

    Args:
        config: Sizes.
        tokens: Video and reference tokens.
        mllm_tokens: Tokens of conditioning.
        num_video_tokens: Tokens that get a velocity.
    """
    dim = config.inner_dim
    # Layers whose input has no gradient: patch embeddings and the first of the timestep's.
    num_embeddings = 2 if config.use_source_embedding else 1
    leaf = tokens * (config.patch_dim * dim * num_embeddings) + config.freq_dim * dim
    embedder = mllm_tokens * (config.mllm_hidden_dim * (config.mllm_dim + dim))
    self_attention = 4 * dim * dim * tokens + 2 * dim * tokens * tokens
    cross_attention = 2 * dim * dim * (tokens + mllm_tokens) + 2 * dim * tokens * mllm_tokens
    feed_forward = 2 * dim * config.ffn_dim * tokens
    block = embedder + self_attention + cross_attention + feed_forward
    inner = 7 * dim * dim + config.num_layers * block + num_video_tokens * (dim * config.out_patch_dim)
    return 2 * (leaf + inner), 2 * (leaf + 2 * inner)


def sequence_flops(
    config: DiTConfig, lengths: Sequence[int], mllm_lengths: Sequence[int], num_video_tokens: int | None = None
) -> Flops:
    """Operations of samples that are known by their lengths alone.

    Args:
        config: Sizes.
        lengths: Video and reference tokens of each sample.
        mllm_lengths: MLLM tokens of each sample.
        num_video_tokens: Tokens of all that get a velocity; None where there are no references.
    """
    samples = [sample_flops(config, *pair, 0) for pair in zip(lengths, mllm_lengths, strict=True)]
    video_tokens = sum(lengths) if num_video_tokens is None else num_video_tokens
    head = 2 * video_tokens * config.inner_dim * config.out_patch_dim
    forward, backward = (sum(values) for values in zip(*samples, strict=True))
    return Flops(forward + head, backward + 2 * head)


def token_flops(config: DiTConfig) -> int:
    """Forward and backward operations of one video token in the linear layers: the unit of a pack's budget."""
    return sum(sample_flops(config, 1, 0, 1)) - sum(sample_flops(config, 0, 0, 0))


def relative_cost(config: DiTConfig, tokens: Lengths, mllm_tokens: Lengths, num_video_tokens: Lengths) -> Lengths:
    """Operations of samples (see :func:`sample_flops`) in units of one token's linear layers, as a pack counts them."""
    return sum(sample_flops(config, tokens, mllm_tokens, num_video_tokens)) / token_flops(config)
