"""The LoomVideo training recipe: stored latents and MLLM features to the flow-matching loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from loomvideo.model.flops import pack_flops
from loomvideo.model.flow import noised_and_target, sample_timestep
from loomvideo.model.packing import DiTSample, PackedBatch, pack
from loomvideo.pipelines.training.dit_recipe import STATES_DTYPE, DiTRecipe
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import LossOutput


@dataclass
class Example:
    """A sample of a pack with what the loss needs."""

    key: str
    task: str
    sample: DiTSample
    target: Tensor
    """Velocity [channels, frames, height, width]."""


@dataclass
class TrainingPack:
    """A packed batch with its targets."""

    keys: list[str]
    tasks: list[str]
    batch: PackedBatch
    target: Tensor
    """Velocity patches [video tokens, patch dim], float32."""
    timesteps: list[float]
    """As in the batch, on the host: to read them from a GPU would make it wait."""
    operations: float
    """Of forward and backward, without recomputation: of this rank's share, where ranks share the pack."""

    @property
    def num_tokens(self) -> int:
        """Tokens of self-attention."""
        return self.batch.num_tokens

    @property
    def num_loss_elements(self) -> int:
        """Elements of all velocities."""
        return self.batch.num_loss_elements

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to a device; activations in ``dtype``, targets in float32."""
        return dataclasses.replace(
            self, batch=self.batch.to(device, dtype), target=self.target.to(device, non_blocking=True)
        )

    def pin_memory(self) -> Self:
        """Copy into page-locked memory, from which copies to a GPU overlap with work."""
        return dataclasses.replace(self, batch=self.batch.pin_memory(), target=self.target.pin_memory())


class LoomVideoRecipe(DiTRecipe):
    """Flow matching on packed LoomVideo samples."""

    def load_example(
        self, dataset_index: int, row: Mapping[str, Any], sample: ShardSample, random: SampleRandom
    ) -> Example:
        """Draw window, posterior sample, dropout, timestep and noise of one visit."""
        dropped = random.uniform("dropout")
        return self._example(dataset_index, sample, random, dropped=dropped, level=None)

    def load_validation_example(
        self, dataset_index: int, row: Mapping[str, Any], sample: ShardSample, random: SampleRandom, level: float
    ) -> Example:
        """The same at a fixed noise level in (0, 1), nothing dropped."""
        return self._example(dataset_index, sample, random, dropped=1.0, level=level)

    def _example(
        self, dataset_index: int, sample: ShardSample, random: SampleRandom, dropped: float, level: float | None
    ) -> Example:
        clean, source_latents, reference_latents, window = self.latents_of(sample, random)
        has_source = source_latents is not None
        variant = self._variant(dropped)
        states = None if variant is None else self.states_of(sample, window, variant, random)
        if variant is None:
            source_latents, reference_latents = None, []
        if states is None:
            states = self.null_states[dataset_index].to(STATES_DTYPE)
        num_tokens, objective = self.num_video_tokens(clean.shape), self.objective
        t = level
        if t is None:
            generator = random.generator("timestep")
            t = sample_timestep(generator, num_tokens, *objective.shift(has_source))
        noise = random.normal("noise", clean.shape)
        noised, velocity = noised_and_target(clean, noise, t)
        dit_sample = DiTSample(
            latents=noised,
            timestep=1000.0 * t,
            mllm_states=states,
            source=source_latents,
            source_scale=t,
            references=reference_latents,
        )
        return Example(key=sample.key, task=sample.metadata["task"], sample=dit_sample, target=velocity)

    def collate(self, examples: Sequence[Example]) -> TrainingPack:
        """Pack the examples into one sequence."""
        batch = pack([example.sample for example in examples], self.config.patch_size)
        self._has_seen_source |= any(example.sample.source is not None for example in examples)
        target = batch.pack_targets([example.target for example in examples])
        operations, num_ranks = 3.0 * pack_flops(self.config, batch).total, 1
        if self.ranks is not None:
            shard = self.ranks.shard(batch, self.config.num_attention_heads)
            batch, target = shard.local, target[shard.video_tokens]
            num_ranks = shard.num_ranks
        return TrainingPack(
            keys=[example.key for example in examples],
            tasks=[example.task for example in examples],
            batch=batch,
            target=target,
            timesteps=[example.sample.timestep for example in examples],
            operations=operations / num_ranks,
        )

    def loss(self, model: nn.Module, pack: TrainingPack) -> LossOutput:
        """Squared error of the velocity, summed."""
        batch = self._watch.attach(pack.batch) if torch.is_grad_enabled() else pack.batch
        squared_error = (model(batch).float() - pack.target).square()
        return LossOutput(
            sum=squared_error.sum(),
            per_sample_sum=pack.batch.sum_per_sample(squared_error.detach()),
            per_sample_elements=pack.batch.sum_per_sample(torch.ones_like(squared_error)),
            tags=[
                {"task": task, "noise": f"{int(min(timestep, 999.0) // 250)}"}
                for task, timestep in zip(pack.tasks, pack.timesteps, strict=True)
            ],
        )

    def flops(self, pack: TrainingPack) -> float:
        """Forward and backward without recomputation."""
        return pack.operations
