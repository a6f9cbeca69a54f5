"""A pack whose latents are set anew for every pass: the arithmetic of flows on packed tokens.

Distillation and preference tuning ask networks about latents that are made while they train. Everything here is
laid out like the transformer's output, [video tokens, patch dim], a row a token, so that velocities, latents and noises
add up without unpacking; :meth:`PackedFlow.at` turns such latents into the transformer's input.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from loomvideo.model.few_steps import clean_from_velocity, noised_again
from loomvideo.model.flow import EPS, NUM_TRAIN_TIMESTEPS
from loomvideo.model.packing import PackedBatch


@dataclass
class PackedFlow:
    """Conditioning of a pack without its latents.

    Attributes:
        batch: The packed samples; what their video patches hold is replaced.
    """

    batch: PackedBatch

    def rows(self, per_sample: Tensor) -> Tensor:
        """A column [video tokens, 1] from values [samples]."""
        return per_sample[self.batch.video_row_ids.long()][:, None]

    def at(self, latents: Tensor, t: Tensor) -> PackedBatch:
        """The pack with latents [video tokens, patch dim] at levels t [samples], source scales accordingly."""
        batch = self.batch
        patches = input_order(latents, batch.patch_size).to(batch.patches.dtype)
        if batch.video_index is not None:
            patches = batch.patches.index_copy(0, batch.video_index, patches)
        t = t.to(torch.float32)
        return dataclasses.replace(batch, patches=patches, timesteps=NUM_TRAIN_TIMESTEPS * t, source_scale=t)

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents at levels t [samples]."""
        return noised_again(clean, noise, self.rows(t))

    def clean(self, noised: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """x0 of noised latents and their velocity."""
        return clean_from_velocity(noised, velocity.float(), self.rows(t))

    def velocity(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What a network should predict."""
        return (1 - EPS) * noise - clean

    def mean_per_sample(self, values: Tensor) -> Tensor:
        """Means [samples] of values [video tokens, patch dim]."""
        ones = torch.ones_like(values[:, :1]).expand_as(values)
        return self.batch.sum_per_sample(values) / self.batch.sum_per_sample(ones)

    def to(self, device: torch.device, dtype: torch.dtype) -> "PackedFlow":
        """Move to a device; activations in ``dtype``."""
        return PackedFlow(self.batch.to(device, dtype))

    def pin_memory(self) -> "PackedFlow":
        """Copy into page-locked memory."""
        return PackedFlow(self.batch.pin_memory())


def input_order(latents: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Rows [patch * channels], the output head's order, as [channels * patch], the embedding's."""
    pixels = patch_size[0] * patch_size[1] * patch_size[2]
    return latents.unflatten(1, (pixels, -1)).transpose(1, 2).flatten(1)
