"""Shards that are built while a stage before them still works: those whose samples have all that they wait for.

Which samples lie in which shard follows from what the last stage before encoding leaves, and it leaves nearly all of
its samples. So shards are planned from its inputs; one whose samples' units are done gets what they gave its samples,
and is built at once, under the recipe that the plan of the end will give it. Where that plan says otherwise, because
samples were lost on the way, the shard is stale and built again as any other. So bytes and accounts are those of stages
after each other.

Builders work in waves, each through the shards that are ready when it begins: with a pool of its own, which gives its
GPUs back at the end and never waits for a text.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.inputs import Inputs
from loomvideo.pipelines.prepare.stages import ENCODE, Stage
from loomvideo.pipelines.prepare.unit_rows import WorkRow
from loomvideo.pipelines.prepare.units import UnitPlan, commit_ahead
from loomvideo.platform.shards.commits import commits, read_all
from loomvideo.platform.shards.storage import Storage

# Shards of a wave at least: every wave starts workers, which load encoders.
FEWEST_SHARDS = 8


def may_build_beside(stage: Stage, stages: Sequence[Stage], config: PrepareConfig) -> bool:
    """Whether shards may be built beside a stage: the last before encoding, whose results are of single samples.

    A stage that holds GPUs itself would lose to builders what they gain.
    """
    return config.workers.ahead and stage.is_by_sample and stages[-2] is stage and not stage.pool(config).gpus


class ReadyShards:
    """Finds shards that can be built before the stage beside them is over.

    Args:
        storage: The dataset folder.
        stage: The stage beside them.
        plan: Its plan, committed.
        inputs: What it was planned from.
        config: The configuration of the job.
    """

    def __init__(self, storage: Storage, stage: Stage, plan: UnitPlan, inputs: Inputs, config: PrepareConfig):
        self._storage, self._stage, self._config = storage, stage, config
        self._files = dict(zip((unit.name for unit in plan.units), plan.recipes, strict=True))
        self._shards = ENCODE.plan(storage, inputs, config)
        self._needs = _needs(self._shards, plan)
        open_units = {plan.units[number].name for number in plan.stale}
        self._waits = [set(needs) & open_units for needs in self._needs]
        self._waiting: dict[str, list[int]] = defaultdict(list)
        for number, waits in enumerate(self._waits):
            for unit in waits:
                self._waiting[unit].append(number)
        self._ready = [number for number, waits in enumerate(self._waits) if not waits]

    def __len__(self) -> int:
        return len(self._ready)

    def done(self, unit: str) -> None:
        """Note that a unit of the stage is done."""
        for number in self._waiting.pop(unit, ()):
            self._waits[number].discard(unit)
            if not self._waits[number]:
                self._ready.append(number)

    def take(self) -> list[int]:
        """Numbers of the shards that have become ready."""
        ready, self._ready = self._ready, []
        return ready

    def rows(self, numbers: Sequence[int], run: str) -> list[WorkRow]:
        """The work of ready shards, without those that are there already."""
        found = commits(self._storage, self._stage.folder)
        return [row for number in numbers if (row := self._row(number, found, run)) is not None]

    def _row(self, number: int, found: dict, run: str) -> WorkRow | None:
        files = [
            next(commit.file for commit in found[unit] if commit.recipe == self._files[unit])
            for unit in self._needs[number]
        ]
        members = Inputs(self._shards.table.take(pa.array(self._shards.units[number].rows)), [])
        results = read_all(self._storage, self._stage.folder, files)
        table = self._stage.after(results, members, self._config).table
        return commit_ahead(self._storage, self._shards, number, table, ENCODE.recipe(self._config), run)


def _needs(shards: UnitPlan, plan: UnitPlan) -> list[list[str]]:
    """The units of the stage beside that samples of each shard are in."""
    unit_of = np.full(len(plan.table), -1)
    for number, unit in enumerate(plan.units):
        unit_of[unit.rows] = number
    places = pc.index_in(shards.table.column("key"), plan.table.column("key")).fill_null(-1).to_numpy()
    # Of what the stage is not asked, nothing is waited for.
    units = np.where(places >= 0, unit_of[places] if len(unit_of) else -1, -1)
    return [[plan.units[at].name for at in np.unique(units[shard.rows]) if at >= 0] for shard in shards.units]


class BuildingAhead:
    """Builds ready shards in waves, in a thread.

    Args:
        ready: What finds them.
        build: Builds the shards of rows, and calls what it is given with the name of each that is done.
        run: The run of the prepare.

    Attributes:
        built: Names of the shards that were built.
    """

    def __init__(self, ready: ReadyShards, build: Callable[[list[WorkRow], Callable[[str], None]], object], run: str):
        self._ready, self._build, self._run = ready, build, run
        self._changed = threading.Condition()
        self._is_over = self._is_aborted = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="building ahead", daemon=True)
        self.built: set[str] = set()

    def __enter__(self) -> "BuildingAhead":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._is_over, self._is_aborted = True, exception[0] is not None
            self._changed.notify_all()
        self._thread.join()
        if not self._is_aborted:
            self._raise()

    def done(self, unit: str) -> None:
        """Note that a unit of the stage beside is done; raises what ended the building."""
        with self._changed:
            self._ready.done(unit)
            self._changed.notify_all()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_over or len(self._ready) >= FEWEST_SHARDS)
                    if self._is_over:
                        return
                    ready = self._ready.take()
                if rows := self._ready.rows(ready, self._run):
                    self._build(rows, self._note)
        except BaseException as error:  # raised by whoever reports the next unit, or at the end
            self._error = error

    def _note(self, shard: str) -> None:
        self.built.add(shard)
        if self._is_aborted:
            raise InterruptedError("the stage beside has failed")
