"""A start from which training need not discover that an edit is mostly its source.

From scratch a transformer takes most of a short run to learn to pass its input on. Here its first weights are
such that the velocity of an edit is that of the source itself: the noised latents and the source enter orthogonal
directions of the residual stream, every block starts as the identity, and the head reads both directions back. The form
of the network is unchanged, and so is every weight's freedom. Without a source the start predicts the mean.
"""

import torch
from torch import nn

from loomvideo.model.dit import LoomVideoDiT

NOISED, SOURCE = 1.0, -1.1
"""Weights of the noised latents z and of t times the source s in the first velocity.

At t near 1 the clean latents can only be guessed from the source, so that the velocity is z - s; nearer to 0 they are
in z itself. What it takes there is learned within a few steps, through the head's modulation.
"""
CONSTANT = 2.0
"""Variance of a constant direction over that of the inputs: it keeps the head's layer norm nearly linear."""


@torch.no_grad()
def start_as_copy(model: LoomVideoDiT, generator: torch.Generator | None = None) -> None:
    """Give a transformer that was initialised from scratch a first velocity that copies the source.

    Args:
        model: With a source embedding. Where it is narrower than two patches, only part of the source gets through.
        generator: The generator of the random directions.
    """
    config = model.config
    dim, patch = config.inner_dim, config.patch_dim
    basis = torch.randn(dim, dim, generator=generator)
    basis[:, 0] = 1.0  # the mean, which layer norm takes away
    basis = torch.linalg.qr(basis).Q[:, 1:]
    width = min(patch, dim - 2 - patch)
    noised, source, constant = basis[:, :patch], basis[:, patch : patch + width], basis[:, -1]
    readable = torch.eye(width, patch)
    model.patch_embedding.weight.copy_(noised.view_as(model.patch_embedding.weight))
    model.patch_embedding.bias.copy_(constant * (CONSTANT * patch) ** 0.5)
    model.source_patch_embedding.weight.copy_((source @ readable).view_as(model.source_patch_embedding.weight))
    model.source_patch_embedding.bias.zero_()
    # Squared norm of a token: the noised latents', the scaled source's, the constant's.
    deviation = (patch * (0.7 + 0.4 + CONSTANT) / dim) ** 0.5
    head = deviation * (NOISED * noised.T + SOURCE * readable.T @ source.T)
    # The embeddings take a patch as [channels, rows, columns], the head gives [rows, columns, channels].
    cells = patch // config.in_channels
    order = torch.arange(patch).view(config.in_channels, cells).T.reshape(-1)
    model.proj_out.weight.copy_(head[order])
    model.proj_out.bias.zero_()
    model.scale_shift_table.zero_()
    for block in model.blocks:
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
