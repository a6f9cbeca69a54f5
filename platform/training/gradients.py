"""Forward and backward of one step on one rank: packs in, loss sums out, and what is said when something is amiss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.collectives import AllRanks
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.recipe import Recipe, Turn
from loomvideo.platform.training.roles import Roles

PROBE_STEP = 10
"""Updates after which everything that is trained must have had a gradient: layers that start at zero let nothing
through to those before them at first."""
FIGURE = "figure"
"""The tag of what a recipe reports beside its loss."""
WATCHED_STEPS = 100
"""Steps from then on in which the inputs are followed until each kind was seen to matter."""


@dataclass
class StepLoss:
    """What a rank's packs of a step gave.

    Attributes:
        sum: The sum over all loss elements.
        bad_keys: Samples whose loss is not finite.
        dead_inputs: Conditioning on which the loss of a pack does not depend.
    """

    sum: float = 0.0
    bad_keys: list[str] = field(default_factory=list)
    dead_inputs: list[str] = field(default_factory=list)


class GradientSteps:
    """Computes the gradients of a rank's packs.

    Args:
        config: The run's configuration.
        recipe: Computes losses.
        roles: Hold the networks.
        ranks: All ranks.
    """

    def __init__(self, config: TrainingConfig, recipe: Recipe, roles: Roles, ranks: AllRanks):
        self.config, self.recipe, self.roles, self.ranks = config, recipe, roles, ranks
        self._most_tokens = 0
        self._tags: dict[tuple[str, str], list[float]] = {}

    def take_tags(self) -> list[list[Any]]:
        """Rows (name, value, loss sum, elements) of the samples since the last call."""
        rows = [[*tag, *sums] for tag, sums in self._tags.items()]
        self._tags = {}
        return rows

    def forward_backward(
        self, turn: Turn, packs: Sequence[tuple[Any, bool]], elements: float, updates: int
    ) -> StepLoss:
        """Gradients of this rank's packs, one a micro-step.

        Args:
            turn: Which role learns.
            packs: Each with whether its loss counts.
            elements: Loss elements of all ranks in this step.
            updates: Updates of the role's weights so far.

        Raises:
            UserError: if a pack does not fit into memory.
        """
        result, outputs = StepLoss(), []
        for number, (pack, counts) in enumerate(packs):
            if number:
                self.roles.step_micro(turn)
            # A pack that does not count has a gradient of zeros.
            watched = counts and PROBE_STEP <= updates < PROBE_STEP + WATCHED_STEPS
            self.recipe.watch_inputs(watched)
            try:
                placed = pack.to(self.roles.model.device, self.roles.model.dtype)
                output = self.roles.forward_backward(turn, placed, elements, counts)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise UserError(self._out_of_memory(pack)) from error
            self._most_tokens = max(self._most_tokens, pack.num_tokens)
            if watched:
                result.dead_inputs += self.recipe.dead_inputs()
            if counts:
                outputs.append((pack.keys, output))
        # Read when all is queued: a number that is asked for earlier makes the device wait for the host.
        for keys, output in outputs:
            result.sum += float(output.sum.detach())
            sums = output.per_sample_sum.float().cpu().tolist()
            numbers = output.per_sample_elements.float().cpu().tolist()
            result.bad_keys += [key for key, value in zip(keys, sums, strict=True) if not math.isfinite(value)]
            for name, value in output.figures.items():
                entry = self._tags.setdefault((FIGURE, name), [0.0, 0.0])
                entry[0] += float(value)
                entry[1] += sum(numbers)
            for value, number_of_elements, tags in zip(sums, numbers, output.tags, strict=False):
                for tag in tags.items():
                    entry = self._tags.setdefault(tag, [0.0, 0.0])
                    entry[0] += value
                    entry[1] += number_of_elements
        return result

    def refuse_dead(self, dead_inputs: Sequence[str]) -> None:
        """End the run, on all ranks together, because of what some of them found.

        Raises:
            UserError: naming the inputs.
        """
        names = list(dict.fromkeys(name for part in self.ranks.gather(list(dead_inputs)) for name in part))
        raise UserError(
            f"after {PROBE_STEP} steps the loss does not depend on {_shown(names)}: what reads them is cut off, or has "
            "weights of zero that are not trained (training.optimizer.trainable, lora.targets)"
        )

    def probe(self, role: str) -> None:
        """Refuse to go on when something that a role trains never gets a gradient: it would look like slow learning.

        Raises:
            UserError: naming the parameters.
        """
        idle = self.roles.engines[role].without_gradient()
        if not idle:
            return
        expected = self.ranks.gather(list(self.recipe.should_learn(idle)))
        dead = [name for name in idle if any(name in part for part in expected)]
        if dead:
            raise UserError(
                f"after {PROBE_STEP} steps no gradient has reached {_shown(dead)}: what they read is cut off from the "
                "loss; leave them out of training.optimizer.trainable, or find what cuts them off"
            )

    def _out_of_memory(self, pack: Any) -> str:
        passed = f"packs of {self._most_tokens} tokens passed" if self._most_tokens else "no pack passed before"
        advice = f"about {int(0.8 * self.config.pack.tokens)}"
        if self.config.activation_checkpointing != "full":
            advice += ", or set training.activation_checkpointing=full"
        return (
            f"out of memory in a pack of {pack.num_tokens} tokens ({', '.join(pack.keys)}; {passed}): lower "
            f"training.pack.tokens={self.config.pack.tokens} to {advice}"
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU allocator has no error class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
