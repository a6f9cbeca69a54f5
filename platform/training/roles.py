"""The networks of a run: the model, and what its recipe trains or asks beside it.

Each trained role has a ZeRO engine with its own optimiser, schedule and average, and takes whole steps of the loop
(``Recipe.role_at``); frozen ones are partitioned alike and only compute. Parameters that several roles hold frozen
exist once. A run of the model alone is the case without other roles, and its checkpoints are the same.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.checkpoint import Checkpoint
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.engine import ZeroEngine
from loomvideo.platform.training.frozen import FrozenEngine
from loomvideo.platform.training.recipe import MODEL, LossOutput, Recipe, Role, Turn
from loomvideo.platform.training.slices import ParameterSlice, Request, Source

SEPARATOR = ":"


class Roles:
    """All networks of one rank.

    Args:
        config: The run's configuration; roles replace its optimiser and average by their own.
        recipe: Names the roles.
        device: This worker's.
        num_micro_steps: Micro-steps of a rank in a step.
        load: Whether to read the starting weights of what is trained; a run that continues reads its checkpoint.

    Attributes:
        model: The engine of :data:`MODEL`.
        engines: Engines of all that is trained, by role.
    """

    def __init__(
        self, config: TrainingConfig, recipe: Recipe, device: torch.device, num_micro_steps: int, load: bool = True
    ):
        self.config, self.recipe = config, recipe
        model, initial = recipe.start()
        self._others = list(recipe.roles())
        mine = dataclasses.replace(config, steps=self._count(MODEL, config.steps)) if self._others else config
        self.model = ZeroEngine(mine, recipe, model, device, num_micro_steps, initial, load=load)
        self.engines = {MODEL: self.model}
        self._frozen: dict[str, FrozenEngine] = {}
        for role in self._others:
            self._add(role, device, num_micro_steps, load)
        self._networks: dict[str, Callable[..., Any]] = {name: each.engine for name, each in self.engines.items()}
        self._networks |= {name: each.engine for name, each in self._frozen.items()}
        self.updates = dict.fromkeys(self.engines, 0)
        self._counted: dict[str, tuple[int, int]] = {}
        # Hashing a teacher of 10 GB takes long enough for one rank.
        bases = {role.name: role.base() for role in self._others if role.base} if not dist.get_rank() else {}
        box = [bases]
        dist.broadcast_object_list(box, src=0, device=device)
        self._bases: dict[str, dict[str, str]] = box[0]

    def _add(self, role: Role, device: torch.device, num_micro_steps: int, load: bool) -> None:
        network, initial = role.start()
        shared = self.model.frozen if role.shares_frozen else {}
        if role.optimizer is None:
            self._frozen[role.name] = FrozenEngine(self.config, self.recipe, network, device, initial, shared)
            return
        steps = self._count(role.name, self.config.steps)
        config = dataclasses.replace(self.config, optimizer=role.optimizer, ema=role.ema, steps=steps)
        self.engines[role.name] = ZeroEngine(
            config, self.recipe, network, device, num_micro_steps, initial, load, shared, role.optimizer_key
        )

    # -- training -------------------------------------------------------------------------------------------------

    def turn(self, step: int) -> Turn:
        """Whose turn step ``step`` is.

        Raises:
            UserError: if the recipe names a role that is not trained.
        """
        role = self.recipe.role_at(step)
        if role not in self.engines:
            raise UserError(f"step {step + 1} is the turn of {role!r}; trained are {', '.join(self.engines)}")
        return Turn(step, role)

    def num_turns(self, role: str, step: int) -> int:
        """Turns of a role before step ``step``."""
        known, count = self._counted.get(role, (0, 0))
        if step < known:
            known, count = 0, 0
        count += sum(self.recipe.role_at(number) == role for number in range(known, step))
        self._counted[role] = step, count
        return count

    def _count(self, role: str, steps: int) -> int:
        return sum(self.recipe.role_at(step) == role for step in range(steps))

    def forward_backward(self, turn: Turn, pack: Any, total_elements: float, counts: bool) -> LossOutput:
        """Loss and gradients of one pack; one that does not count has weight 0."""
        output = self.recipe.turn_loss(turn, self._networks, pack)
        self.engines[turn.role].backward(output.sum * (1.0 if counts else 0.0), total_elements)
        return output

    def step_micro(self, turn: Turn) -> None:
        """Tell the engine that a micro-step other than the last is done."""
        self.engines[turn.role].step_micro()

    def step(self, turn: Turn, skip: bool) -> bool:
        """Update the role whose turn it is, at the place it has reached in its own schedule; see ZeroEngine.step."""
        updated = self.engines[turn.role].step(self.num_turns(turn.role, turn.step), skip)
        self.updates[turn.role] += updated
        return updated

    def learning_rate(self, turn: Turn) -> float:
        """The rate of a turn."""
        return self.engines[turn.role].learning_rate(self.num_turns(turn.role, turn.step))

    # -- state ----------------------------------------------------------------------------------------------------

    def slices(self) -> Iterator[ParameterSlice]:
        """This rank's part of everything trained beside the model, by ``ROLE:NAME``."""
        for name, engine in self._trained_beside():
            for part in itertools.chain(engine.slices(), engine.frozen_slices()):
                yield dataclasses.replace(part, name=f"{name}{SEPARATOR}{part.name}")

    def state(self) -> dict[str, Any]:
        """For the checkpoint: shapes and updates of what is trained beside the model, and which weights are frozen."""
        trained: dict[str, Any] = {
            name: {"shapes": {n: list(shape) for n, shape in engine.shapes.items()}, "updates": self.updates[name]}
            for name, engine in self._trained_beside()
        }
        frozen = {role.name: {"base": self._base(role)} for role in self._others if role.optimizer is None}
        return trained | frozen

    def load(self, checkpoint: Checkpoint, model_frozen: Source | None) -> None:
        """Continue from a checkpoint.

        Args:
            checkpoint: A checkpoint of the same recipe, of any number of ranks.
            model_frozen: Gives the model's parameters that are not trained; None where the checkpoint holds them.

        Raises:
            UserError: if the checkpoint lacks a role, or has another network of it.
        """
        state = checkpoint.state
        self.model.load_slices(checkpoint.read_many, state["optimizer_step"], model_frozen)
        self.updates[MODEL] = state["optimizer_step"]
        stored = state.get("roles") or {}
        if set(stored) != {role.name for role in self._others}:
            have, want = (", ".join(sorted(names)) or "none" for names in (stored, [r.name for r in self._others]))
            raise UserError(
                f"{checkpoint.url}: was written with other roles beside the model ({have}) than this run has ({want}); "
                "use another run name"
            )
        for role in self._others:
            base = stored[role.name].get("base")
            if base is not None and base["digest"] != self._base(role)["digest"]:
                raise UserError(
                    f"{checkpoint.url}: its {role.name} was {base['path']} ({base['digest']}), not "
                    f"{self._base(role)['path']} ({self._base(role)['digest']}); put those weights back, or use "
                    "another run name"
                )
        for name, engine in self._trained_beside():
            shapes = {n: tuple(shape) for n, shape in stored[name]["shapes"].items()}
            if shapes != engine.shapes:
                differing = min(set(shapes.items()) ^ set(engine.shapes.items()))[0]
                raise UserError(f"{checkpoint.url}: its {name} is another network ({differing}); use another run name")
            self.updates[name] = stored[name]["updates"]
            engine.load_slices(_named(checkpoint, name), self.updates[name])

    def _trained_beside(self) -> list[tuple[str, ZeroEngine]]:
        return [(name, engine) for name, engine in self.engines.items() if name != MODEL]

    def _base(self, role: Role) -> dict[str, str]:
        return self._bases.get(role.name, {"path": "", "digest": ""})


def _named(checkpoint: Checkpoint, role: str) -> Source:
    def answer(requests: Sequence[Request]) -> Iterator[Tensor | None]:
        return checkpoint.read_many(
            [(kind, f"{role}{SEPARATOR}{name}", start, stop) for kind, name, start, stop in requests]
        )

    return answer
