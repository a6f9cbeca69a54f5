"""Direct preference optimisation with the source as the rejected sample: an editor that copies is told so.

The edit's target is preferred to the source that it was made from, at the same noise and level (Wallace et al., 2024,
"Diffusion Model Alignment Using Direct Preference Optimization", with velocities for noises). Nothing is generated: a
shard holds both. With d the mean squared error of a sample's velocity less that of the frozen reference,

    loss = -log sigmoid(beta * min(d(source) - d(target), cap)) + anchor * max(0, d(target))

``cap`` ends the reward for being ever worse at the source, and ``anchor`` charges what preferring costs the target
itself: without them both errors grow together while their difference looks fine.

With ``relative`` errors are counted in parts of what lies between the two, the mean squared difference of their
velocities: the margin is then twice the part of the way from source to target that the velocity was moved, and small
edits, such as another colour of a garment, are pushed as far as a whole new background is.

How far the policy has gone is reported as ``drift``, ``|v - v_reference|^2`` as for DiffusionNFT: the mean of a pair's
two samples, the KL of the paths up to a factor.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loomvideo.model.flops import pack_flops
from loomvideo.model.flow import noised_and_target, sample_timestep
from loomvideo.model.packing import DiTSample, PackedBatch, pack
from loomvideo.model.tasks import wording
from loomvideo.pipelines.training.config import SourcePreferenceConfig
from loomvideo.pipelines.training.dit_recipe import STATES_DTYPE, DiTRecipe, frozen_start
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.order import SampleSizes
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import MODEL, LossOutput, Role, Turn

REFERENCE = "reference"
LEAST_DIFFERENCE = 0.02
"""Added to the squared difference that relative errors are divided by: the two may be all but the same."""


@dataclass
class Pair:
    """An edit's target and its source, noised alike, under the same conditioning."""

    key: str
    task: str
    preferred: DiTSample
    rejected: DiTSample
    targets: tuple[Tensor, Tensor]
    """Velocities of the two."""


@dataclass
class PairPack:
    """All preferred samples, then all rejected ones."""

    keys: list[str]
    tasks: list[str]
    batch: PackedBatch
    target: Tensor
    operations: float

    @property
    def num_tokens(self) -> int:
        """Tokens of self-attention."""
        return self.batch.num_tokens

    @property
    def num_loss_elements(self) -> int:
        """Pairs: each weighs the same, whatever its size."""
        return len(self.keys)

    def to(self, device: torch.device, dtype: torch.dtype) -> "PairPack":
        """Move to a device; activations in ``dtype``, targets in float32."""
        batch, target = self.batch.to(device, dtype), self.target.to(device, non_blocking=True)
        return dataclasses.replace(self, batch=batch, target=target)


class SourcePreferenceRecipe(DiTRecipe):
    """Preferring targets to sources.

    Args:
        preference: How strongly.
        options: What :class:`DiTRecipe` takes; ``initial_weights`` are the reference.
    """

    keeps_steps = True

    def __init__(self, preference: SourcePreferenceConfig, *options: Any, **named: Any):
        super().__init__(*options, **named)
        self.preference = preference

    def roles(self) -> Sequence[Role]:
        """The reference; under adapters it is the model's frozen weights."""
        shares = self.lora is not None
        base = lambda: DiTRecipe.base(self)  # noqa: E731 - asked on one rank alone
        return [Role(REFERENCE, lambda: frozen_start(self), shares_frozen=shares, base=base)]

    def visit_variant(self, random: SampleRandom) -> int:
        """Nothing is dropped: without an instruction neither of the two is better."""
        return 0

    def reads_visual(self, random: SampleRandom) -> bool:
        """Never."""
        return False

    def sample_sizes(self, dataset_index: int, index: Any) -> SampleSizes:
        """Twice those of one sample."""
        one = super().sample_sizes(dataset_index, index)
        return SampleSizes(2 * one.tokens, 2 * one.context_tokens, 2 * one.costs)

    def load_example(
        self, dataset_index: int, row: Mapping[str, Any], sample: ShardSample, random: SampleRandom
    ) -> Pair:
        """The two at one level, with one noise.

        Raises:
            UserError: if the sample has no source.
        """
        task = sample.metadata["task"]
        if not wording(task).needs_source:
            raise UserError(f"task {task} has no source to reject; give it weight 0 in training.mixture.tasks")
        clean, source, references, window = self.latents_of(sample, random)
        states = self.states_of(sample, window, "full", random)
        if source is None or states is None:
            raise ValueError("an edit without source or MLLM states")
        objective, tokens = self.objective, self.num_video_tokens(clean.shape)
        t = sample_timestep(random.generator("timestep"), tokens, *objective.shift(has_source=True))
        noise = random.normal("noise", clean.shape)
        samples, targets = [], []
        for latents in (clean, source):
            noised, velocity = noised_and_target(latents, noise, t)
            samples.append(DiTSample(noised, 1000.0 * t, states.to(STATES_DTYPE), source, t, references))
            targets.append(velocity)
        return Pair(sample.key, task, samples[0], samples[1], (targets[0], targets[1]))

    def collate(self, examples: Sequence[Pair]) -> PairPack:
        """Pack the preferred samples, then the rejected ones."""
        batch = pack([e.preferred for e in examples] + [e.rejected for e in examples], self.config.patch_size)
        self._has_seen_source = True
        target = batch.pack_targets([e.targets[0] for e in examples] + [e.targets[1] for e in examples])
        keys, tasks = [e.key for e in examples], [e.task for e in examples]
        return PairPack(keys, tasks, batch, target, 4.0 * pack_flops(self.config, batch).total)

    def turn_loss(self, turn: Turn, networks: Mapping[str, Callable[..., Any]], pack: PairPack) -> LossOutput:
        """Sum over pairs."""
        with torch.no_grad():
            reference = networks[REFERENCE](pack.batch).float()
            before = _errors(reference, pack)
        velocity = networks[MODEL](pack.batch).float()
        change = _errors(velocity, pack) - before
        drift = _mean_per_sample((velocity.detach() - reference).square(), pack)
        if self.preference.relative:
            change = change / (_differences(pack) + LEAST_DIFFERENCE)
        preferred, rejected = change.chunk(2)
        losses = preference_loss(preferred, rejected, self.preference)
        detached = losses.detach()
        return LossOutput(
            sum=losses.sum(),
            per_sample_sum=detached,
            per_sample_elements=torch.ones_like(detached),
            tags=[{"task": task} for task in pack.tasks],
            figures={
                "margin": (rejected - preferred).detach().sum(),
                "preferred_error_change": preferred.detach().sum(),
                "rejected_error_change": rejected.detach().sum(),
                "accuracy": (rejected > preferred).float().sum(),
                "drift": drift.sum() / 2,
            },
        )

    def flops(self, pack: PairPack) -> float:
        """Of the model's training pass and the reference's."""
        return pack.operations


def preference_loss(preferred: Tensor, rejected: Tensor, config: SourcePreferenceConfig) -> Tensor:
    """Loss [pairs] from changes of the mean squared error [pairs] since the reference, plain or relative."""
    margin = (rejected - preferred).clamp_max(config.cap)
    return -F.logsigmoid(config.beta * margin) + config.anchor * preferred.clamp_min(0)


def _errors(velocity: Tensor, pack: PairPack) -> Tensor:
    return _mean_per_sample((velocity - pack.target).square(), pack)


def _differences(pack: PairPack) -> Tensor:
    """Mean squared difference of a pair's velocities, for its preferred and its rejected sample [samples]."""
    preferred, rejected = pack.target.chunk(2)
    return _mean_per_sample((rejected - preferred).square().repeat(2, 1), pack)


def _mean_per_sample(squared: Tensor, pack: PairPack) -> Tensor:
    return pack.batch.sum_per_sample(squared) / pack.batch.sum_per_sample(torch.ones_like(squared))
