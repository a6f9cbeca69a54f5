"""A start from which training need not discover that an edit is mostly its source.

From scratch a transformer takes most of a short run to learn to pass its input on. Here its first weights are such that
the velocity of an edit is the best guess for a clip that is the source plus something unknown: the noised latents and
the source enter dimensions of their own of the residual stream, every block starts as the identity, and the head reads
both back with gains that the timestep sets. The form of the network is unchanged, and so is every weight's freedom.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loomvideo.model.dit import LoomVideoDiT, timestep_frequencies
from loomvideo.platform.errors import UserError

RESIDUAL = 0.1
"""Variance of what an edit changes, over the variance 1 of latents: small, as most of a picture is kept."""
CONSTANT = 64.0
"""Variance of a constant pair of dimensions over that of the inputs: layer norms then divide every token by nearly the
same number, without which noise would leave with a gain that depends on what it lies over, and stay in the picture."""
NOISED_SEEN = 0.125
"""Gain of the noised latents before the blocks: under much noise they tell little, and blocks make noise of noise."""
RIDGE = 1e-6


def copy_gains(t: Tensor, residual: float = RESIDUAL) -> tuple[Tensor, Tensor]:
    """What of the noised latents z and of t times the source s the expected velocity is, for t in (0, 1].

    With clean latents s + r, r of variance :data:`RESIDUAL`, noise n and z = (1 - t)(s + r) + t n, the expectation of
    n - s - r is linear in z and s.
    """
    noised = (t - (1 - t) * residual) / (t**2 + (1 - t) ** 2 * residual)
    return noised, -(1 + (1 - t) * noised) / t


@torch.no_grad()
def start_as_copy(model: LoomVideoDiT, generator: torch.Generator | None = None, residual: float = RESIDUAL) -> None:
    """Give a transformer that was initialised from scratch a first velocity that copies the source.

    Args:
        model: A transformer with a source embedding. Where it is narrower than two patches and four dimensions, only
            part of the source gets through.
        generator: The generator of the random signs.
        residual: See :data:`RESIDUAL`.

    Raises:
        UserError: if the model has no room for a source beside the noised latents.
    """
    config = model.config
    dim, patch = config.inner_dim, config.patch_dim
    width = min(patch, dim - 4 - patch)
    if width < 1:
        raise UserError(
            f"objective.start_as_copy: a width of {dim} has no room for two patches of {patch}; set it false"
        )
    # Random signs keep the mean, which layer norm takes away, small.
    signs = torch.randint(0, 2, (patch + width,), generator=generator) * 2.0 - 1
    noised, source = torch.zeros(dim, patch), torch.zeros(dim, patch)
    noised[:patch] = torch.diag(signs[:patch])
    source[patch : patch + width, :width] = torch.diag(signs[patch:])
    constant = torch.zeros(dim)
    constant[patch + width], constant[patch + width + 1] = 1.0, -1.0
    model.patch_embedding.weight.copy_(noised.view_as(model.patch_embedding.weight))
    model.patch_embedding.bias.copy_(constant * (CONSTANT * patch / 2) ** 0.5)
    model.source_patch_embedding.weight.copy_(source.view_as(model.source_patch_embedding.weight))
    model.source_patch_embedding.bias.zero_()

    timesteps = torch.arange(1.0, 1001.0)
    t = timesteps / 1000
    gains = torch.stack(copy_gains(t, residual))  # [2, times]
    # The layer norm divides by the root of a token's mean square.
    square = patch * ((1 - t) ** 2 + t**2 + CONSTANT) + width * t**2
    deviation = (square / dim).sqrt()
    wanted = gains * deviation
    wanted[1] *= -1
    # Scale and shift of the head are both the embedding: dimensions without content carry what cancels the shift.
    first, second = dim - 2, dim - 1
    pattern = torch.zeros(2, dim)
    pattern[0, :patch] = pattern[0, first] = 1.0
    pattern[1, patch : patch + width] = pattern[1, second] = 1.0
    embedder = model.condition_embedder.time_embedder
    nn.init.normal_(embedder.linear_1.weight, std=0.3, generator=generator)
    # Of the frequencies only the slow half: a gain that trembles with the timestep would leave noise in the picture.
    embedder.linear_1.weight.unflatten(1, (2, -1))[:, :, : config.freq_dim // 4] = 0
    features = F.silu(embedder.linear_1(timestep_frequencies(timesteps, config.freq_dim))).double()
    gram = features.T @ features / len(features)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solved = torch.linalg.solve(gram, features.T @ (wanted.T.double() - 1) / len(features)).float()  # [hidden, 2]
    embedder.linear_2.weight.copy_((solved @ pattern).T)
    embedder.linear_2.bias.zero_()
    model.condition_embedder.time_proj.weight.zero_()

    head = noised.T - source.T
    head[:, first] = -noised.T[:, :patch].sum(1)
    head[:, second] = source.T[:, patch : patch + width].sum(1)
    # The embeddings take a patch as [channels, rows, columns], the head gives [rows, columns, channels].
    cells = patch // config.in_channels
    order = torch.arange(patch).view(config.in_channels, cells).T.reshape(-1)
    model.proj_out.weight.copy_(head[order])
    model.proj_out.bias.zero_()
    model.scale_shift_table.zero_()
    # Blocks see their inputs as if there were no constant, and the noised latents dimmed.
    seen = torch.full((dim,), deviation.mean().item())
    seen[constant != 0] /= constant.max()
    seen[:patch] *= NOISED_SEEN
    for block in model.blocks:
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, (1, 4)] = seen - 1
        block.norm2.weight.copy_(seen)
        # Open gates: what a block learns counts at once.
        block.scale_shift_table[:, (2, 5)] = 1.0
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
