"""DiffusionNFT (Zheng et al., 2025): learning from scored samples by the forward process alone.

A round's samples were made by the policy of its start, the *old* network, by whatever sampler, and scored. Each comes
with r in [0, 1], its reward among samples of the same prompt. The model's velocity v stands for two policies around the
old one's v_old, one to move to and one to move from:

    v+ = (1 - beta) v_old + beta v      v- = (1 + beta) v_old - beta v
    loss = r |v+ - v*|^2 + (1 - r) |v- - v*|^2

where v* is the velocity to the sample (equations 7 and 8). ``drift_weight`` adds ``|v - v_reference|^2``, the KL of the
two paths up to a factor; the drift is reported in any case.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from loomvideo.pipelines.training.config import NFTConfig
from loomvideo.pipelines.training.dit_recipe import frozen_start
from loomvideo.pipelines.training.recipe import Example, LoomVideoRecipe, TrainingPack
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import MODEL, LossOutput, Role, Turn

OLD, REFERENCE = "old", "reference"


@dataclasses.dataclass
class WeightedExample(Example):
    """A sample and its reward in [0, 1]."""

    reward: float = 0.0


@dataclasses.dataclass
class WeightedPack(TrainingPack):
    """Samples with their rewards [samples]."""

    rewards: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """As :meth:`TrainingPack.to`."""
        moved = super().to(device, dtype)
        return dataclasses.replace(moved, rewards=self.rewards.to(device))


class NFTRecipe(LoomVideoRecipe):
    """Training on the samples of one round.

    Args:
        nft: How.
        old_weights: The weights folder of the policy that made the samples.
        options: What :class:`LoomVideoRecipe` takes; ``initial_weights`` are the reference.
    """

    keeps_steps = True

    def __init__(self, nft: NFTConfig, old_weights: str, *options: Any, **named: Any):
        super().__init__(*options, **named)
        self.nft, self.old_weights = nft, old_weights

    def roles(self) -> Sequence[Role]:
        """The round's policy and the weights of the run's start; under adapters the latter take no memory."""

        def old() -> tuple[nn.Module, Mapping[str, Tensor]]:
            policy = NFTRecipe(self.nft, "", self.model_name, self.objective, [], self.old_weights)
            return frozen_start(policy)

        base = lambda: LoomVideoRecipe.base(self)  # noqa: E731 - asked on one rank alone
        shares = self.lora is not None
        reference = Role(REFERENCE, lambda: frozen_start(self), shares_frozen=shares, base=base)
        return [Role(OLD, old), reference]

    def visit_variant(self, random: SampleRandom) -> int:
        """Nothing is dropped: samples were made with their instructions."""
        return 0

    def reads_visual(self, random: SampleRandom) -> bool:
        """Never."""
        return False

    def load_example(
        self, dataset_index: int, row: Mapping[str, Any], sample: ShardSample, random: SampleRandom
    ) -> WeightedExample:
        """A generated sample at a level of its own."""
        example = self._example(dataset_index, sample, random, dropped=1.0, level=None)
        values = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
        return WeightedExample(**values, reward=float(row["reward"]))

    def collate(self, examples: Sequence[Any]) -> WeightedPack:
        """A pack of :class:`WeightedExample`, with their rewards."""
        packed = super().collate(examples)
        values = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
        values["operations"] *= 5 / 3
        return WeightedPack(**values, rewards=torch.tensor([example.reward for example in examples]))

    def turn_loss(self, turn: Turn, networks: Mapping[str, Callable[..., Any]], pack: WeightedPack) -> LossOutput:
        """Sum over elements."""
        batch, beta = pack.batch, self.nft.beta
        with torch.no_grad():
            old, reference = networks[OLD](batch).float(), networks[REFERENCE](batch).float()
        velocity = networks[MODEL](batch).float()
        r = pack.rewards[batch.video_row_ids.long()][:, None]
        drift = (velocity - reference).square()
        loss = nft_loss(velocity, old, pack.target, r, beta) + self.nft.drift_weight * drift
        elements = batch.sum_per_sample(torch.ones_like(loss))
        return LossOutput(
            sum=loss.sum(),
            per_sample_sum=batch.sum_per_sample(loss.detach()),
            per_sample_elements=elements,
            tags=[{"task": task} for task in pack.tasks],
            figures={"drift": drift.detach().sum(), "drift_of_round": (velocity - old).detach().square().sum()},
        )


def nft_loss(velocity: Tensor, old: Tensor, target: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Loss of every element; ``reward`` broadcasts."""
    positive, negative = (1 - beta) * old + beta * velocity, (1 + beta) * old - beta * velocity
    return reward * (positive - target).square() + (1 - reward) * (negative - target).square()
