"""The LoomVideo training recipe: stored latents and MLLM features to the flow-matching loss.

Everything random about a sample (clip window, posterior sample, guidance dropout, timestep, noise) is drawn from
(run seed, key, visit), so that world size, packing and resume cannot change it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loomvideo.jobs.kernels_job import use_kernels
from loomvideo.jobs.training_config import ObjectiveConfig
from loomvideo.model import weights
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.flops import pack_flops
from loomvideo.model.flow import noised_and_target, sample_timestep
from loomvideo.model.packing import DiTSample, PackedBatch, pack
from loomvideo.model.presets import preset
from loomvideo.platform.nodes.config import KernelConfig
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import BaseRecipe, LossOutput


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

    @property
    def num_tokens(self) -> int:
        """Tokens of self-attention."""
        return self.batch.num_tokens

    @property
    def num_loss_elements(self) -> int:
        """Elements of all velocities."""
        return self.batch.num_loss_elements

    def to(self, device: torch.device, dtype: torch.dtype) -> "TrainingPack":
        """Move to a device; activations in ``dtype``, targets in float32."""
        return dataclasses.replace(
            self, batch=self.batch.to(device, dtype), target=self.target.to(device, non_blocking=True)
        )


class LoomVideoRecipe(BaseRecipe):
    """Flow matching on packed LoomVideo samples.

    Args:
        model: Name of the model preset.
        objective: What is learned.
        null_states: For each dataset, MLLM states of the empty message [layers, tokens, dim].
        initial_weights: A weights folder or file to start from; None starts from seeded random weights.
        seed: Seed of the random weights.
        kernels: Which kernels a rank loads before it builds the model; None keeps what is in use.
    """

    def __init__(
        self,
        model: str,
        objective: ObjectiveConfig,
        null_states: Sequence[Tensor],
        initial_weights: str | None = None,
        seed: int = 0,
        kernels: KernelConfig | None = None,
    ):
        self.config = dataclasses.replace(preset(model).dit, use_source_embedding=objective.use_source_embedding)
        self.objective = objective
        self.null_states = null_states
        self.initial_weights = initial_weights
        self.seed = seed
        self.kernels = kernels

    def build_model(self) -> nn.Module:
        """The transformer in float32 with its starting weights."""
        if self.kernels is not None:
            use_kernels(self.kernels, "cuda" if torch.cuda.is_available() else "cpu")
        if self.initial_weights is not None:
            return weights.load_dit(self.initial_weights, config=self.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return LoomVideoDiT(self.config)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks."""
        return model.blocks

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
        window = int(random.uniform("window") * sample.metadata["num_windows"])
        target, source = sample.tensors["target"], sample.tensors.get("source")
        clean = _posterior_sample(target, window, random, "target")
        states, visual = _mllm_states(sample, window), _mllm_states(sample, window, "visual")
        source_latents = None if source is None else _posterior_sample(source, window, random, "source")
        references = sample.tensors.get("refs", {})
        num_references = sum(name.startswith("mean.") for name in references)
        reference_latents = [_posterior_sample(references, j, random, f"reference{j}") for j in range(num_references)]
        if dropped < self.objective.drop_all:
            states, source_latents, reference_latents = self.null_states[dataset_index], None, []
        elif dropped < self.objective.drop_all + self.objective.drop_text:
            states = self.null_states[dataset_index] if visual is None else visual
        _, frames, height, width = clean.shape
        num_tokens = frames * (height // self.config.patch_size[1]) * (width // self.config.patch_size[2])
        objective = self.objective
        t = level
        if t is None:
            generator = random.generator("timestep")
            t = sample_timestep(generator, num_tokens, objective.shift_scale, objective.shift_base_tokens)
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
        return TrainingPack(
            keys=[example.key for example in examples],
            tasks=[example.task for example in examples],
            batch=batch,
            target=batch.pack_targets([example.target for example in examples]),
        )

    def loss(self, model: nn.Module, pack: TrainingPack) -> LossOutput:
        """Squared error of the velocity, summed."""
        squared_error = (model(pack.batch).float() - pack.target).square()
        return LossOutput(
            sum=squared_error.sum(),
            per_sample_sum=pack.batch.sum_per_sample(squared_error.detach()),
            per_sample_elements=pack.batch.sum_per_sample(torch.ones_like(squared_error)),
            tags=[
                {"task": task, "noise": f"{int(min(timestep, 999.0) // 250)}"}
                for task, timestep in zip(pack.tasks, pack.batch.timesteps.tolist(), strict=True)
            ],
        )

    def flops(self, pack: TrainingPack) -> float:
        """Forward and backward without recomputation."""
        return 3.0 * pack_flops(self.config, pack.batch).total

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write a LoomVideo weights folder."""
        weights.save_dit(state, self.config, folder)


def _posterior_sample(tensors: Mapping[str, Tensor], index: int, random: SampleRandom, name: str) -> Tensor:
    mean = tensors[f"mean.{index}"].float()
    std = tensors.get(f"std.{index}")
    if std is None:
        return mean
    return mean + std.float() * random.normal(f"posterior.{name}", mean.shape)


def _mllm_states(sample: ShardSample, window: int, variant: str = "full") -> Tensor | None:
    states = sample.tensors["mllm"].get(f"{variant}.{sample.metadata['mllm_index'][window]}")
    return None if states is None else states.float()
