"""How far a run is: everything but the tensors that a checkpoint holds, and what is checked when a run goes on."""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.checkpoint import Checkpoint
from loomvideo.platform.training.collectives import AllRanks
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.engine import ZeroEngine
from loomvideo.platform.training.guard import SpikeGuard
from loomvideo.platform.training.order import continued_data, data_entry
from loomvideo.platform.training.recipe import MODEL, Recipe, TrainingDataset
from loomvideo.platform.training.roles import Roles
from loomvideo.platform.training.slices import read_from

RECENT_STEPS = 200


class RunState:
    """The state of a run that is the same on all ranks.

    Args:
        config: The run's configuration.
        datasets: The run's datasets.
        roles: Hold the tensors.
        base: Which weights hold what is not trained, from :func:`base_of`.
        ranks: All ranks.

    Attributes:
        step: Steps planned and done.
        planner: State of the planner after the last step; None before the first.
        guard: Judges losses.
        data: Which datasets and mixture the run had from which step on.
        best_loss, best_step: The best validation so far and its step.
        recent: Records of the newest steps, kept with checkpoints: a driver that was killed may not have recorded what
            the workers did until they ended.
    """

    def __init__(
        self,
        config: TrainingConfig,
        datasets: Sequence[TrainingDataset],
        roles: Roles,
        base: dict[str, str],
        ranks: AllRanks,
    ):
        self.config, self.datasets, self.roles, self.base, self.ranks = config, datasets, roles, base, ranks
        self.engine = roles.model
        self.step = 0
        self.planner: dict[str, Any] | None = None
        self.guard = SpikeGuard(config.guard)
        self.data = [data_entry(0, [dataset.digest for dataset in datasets], config.mixture)]
        self.best_loss, self.best_step = math.inf, None
        self.recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=RECENT_STEPS)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take weights and state of a checkpoint.

        Raises:
            UserError: if it is of another model, or of data that is no longer there.
        """
        state = checkpoint.state
        if checkpoint.shapes != self.engine.shapes:
            differing = set(checkpoint.shapes.items()) ^ set(self.engine.shapes.items())
            raise UserError(
                f"{checkpoint.url}: was written for another model ({min(differing)[0]} differs); use another run name"
            )
        self.data = continued_data(checkpoint.url, state, self.datasets, self.config.mixture)
        frozen = read_from(self.engine.initial) if checkpoint.base else None
        self.roles.load(checkpoint, frozen)
        self.step, self.planner = state["step"], state["planner"]
        self.guard.load_state(state["guard"])
        if not self.recent:
            self.recent.extend(state.get("records", ()))
        best_loss, self.best_step = state.get("best", (None, None))
        # On other samples a loss means something else.
        if best_loss is not None and self.data[-1]["datasets"] == state["datasets"]:
            self.best_loss = best_loss

    def roll_back(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint and go on with the samples after those of now.

        Steps are counted on, so that what is recorded never rewinds.
        """
        step, planner, quarantined = self.step, self.planner, self.guard.quarantined
        self.restore(checkpoint)
        self.step, self.planner, self.guard.quarantined = step, planner, quarantined
        self.guard.consecutive_skips = 0

    def contents(self) -> tuple[dict[str, torch.Tensor], dict[str, list[int]], dict[str, Any]]:
        """What a checkpoint of now holds of this rank: tensors by ``<kind>/<name>``, ranges by name, and the state."""
        tensors, ranges = {}, {}
        frozen = () if self.base else self.engine.frozen_slices()
        for part in itertools.chain(self.engine.slices(), frozen, self.roles.slices()):
            ranges[part.name] = [part.start, part.stop]
            for kind, view in part.views.items():
                tensors[f"{kind}/{part.name}"] = view
        return tensors, ranges, self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "optimizer_step": self.roles.updates[MODEL],
            "roles": self.roles.state(),
            "planner": self.planner,
            "guard": self.guard.state(),
            "best": [None if math.isinf(self.best_loss) else self.best_loss, self.best_step],
            "records": list(self.recent),
            "shapes": {name: list(shape) for name, shape in self.engine.shapes.items()},
            "datasets": [dataset.digest for dataset in self.datasets],
            "data": self.data,
            "base": self.base,
            "config": dataclasses.asdict(self.config),
            "world_size": self.ranks.size,
            "time": time.time(),
        }


def base_of(engine: ZeroEngine, recipe: Recipe, resumed: Checkpoint | None, ranks: AllRanks) -> dict[str, str]:
    """Which weights hold the parameters that are not trained; empty when checkpoints hold them themselves.

    Raises:
        UserError: if the checkpoint to go on from was trained on others.
    """
    if not engine.num_frozen or (resumed is not None and not resumed.base):
        return {}
    # Hashing 20 GB takes long enough for one rank.
    base = ranks.from_rank_0(recipe.base() if ranks.rank == 0 else None)
    if resumed is not None and base["digest"] != resumed.base["digest"]:
        raise UserError(
            f"{resumed.url}: was trained on other weights, {resumed.base['path']} ({resumed.base['digest']}), than "
            f"{base['path'] or 'random ones'} ({base['digest'] or 'seeded'}); "
            "put those back, or use another run name"
        )
    return base if base["digest"] else {}
