"""Units of work: how every stage deals samples, plans, finds what is stale and hands it to workers.

A stage's plan says which sample lies in which unit (a shard, or a chunk of samples to look at). It is kept, and the
next plan places the same samples in the same units, so what is added or removed moves nothing. A unit's recipe is a
digest of all that its result depends on: its samples, what their files look like, and the stage's configuration. It
stands in the name of the committed result, so one listing says what is stale.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loomvideo.pipelines.prepare.inputs import SAMPLE_SCHEMA, Inputs
from loomvideo.pipelines.prepare.unit_rows import PlannedRow, WorkRow
from loomvideo.platform.shards.commits import Commit, commits
from loomvideo.platform.shards.plan import PlannedShard, digest, plan_shards
from loomvideo.platform.shards.storage import Storage

PLAN_FOLDER = "work/plans"
# Before plans were kept in parts; says in which shards the samples of such a dataset lie.
OLD_PLAN_FILE = "work/plan.parquet"
# A part's footer lists its units: small enough to be read for each of them.
_UNITS_IN_A_PART = 64
_COLUMNS = [("unit", pa.string()), ("slot", pa.int32()), ("was", pa.string())]
_PLAN_SCHEMA = pa.schema([*_COLUMNS, *SAMPLE_SCHEMA])
CONTENT_COLUMNS = ("sample", "assessed", "media")
"""Columns of a plan that a unit's result depends on."""


@dataclass(frozen=True)
class Dealing:
    """How a stage deals samples into units.

    Attributes:
        name: Prefix of the units; empty takes the samples' split.
        max_samples: Samples aimed at for a unit at most.
        target_bytes: Size aimed at for a unit.
        seed: The seed of the order.
    """

    name: str
    max_samples: int
    target_bytes: int = 2**62
    seed: int = 0


@dataclass
class UnitPlan:
    """The units of a stage.

    Attributes:
        stage: Name of the stage.
        folder: The folder of its results.
        table: The samples, of :data:`~loomvideo.pipelines.prepare.inputs.SAMPLE_SCHEMA`; without rows once the plan is
            committed and they are let go.
        units: The units, with the rows of the table that each holds, in slot order.
        recipes: The recipes of the units.
        was: Unit that the earlier plan placed each sample in, where that differs; None if it never does.
        committed: Results that are there, by unit.
        stale: Indices of units without a result that holds.
    """

    stage: str
    folder: str
    table: pa.Table
    units: list[PlannedShard]
    recipes: list[str]
    was: pa.ChunkedArray | None
    committed: dict[str, list[Commit]]
    stale: list[int]


def plan_units(
    storage: Storage,
    stage: str,
    folder: str,
    inputs: Inputs,
    dealing: Dealing,
    parts: Sequence[object],
    again: Collection[str] = (),
    redeal: bool = False,
    sound: Callable[[Commit], bool] = lambda commit: True,
) -> UnitPlan:
    """Deal the inputs into units, as the earlier plan did where it can, and find what is stale.

    Args:
        storage: The dataset folder.
        stage: Name of the stage.
        folder: The folder of its results.
        inputs: All of them are dealt.
        dealing: How.
        parts: What every result depends on besides its samples.
        again: Names of units to do again though nothing they depend on has changed.
        redeal: Place every sample anew.
        sound: Whether what a result vouches for is there.
    """
    table = inputs.table
    before = kept_plan(storage, stage, ["key", "unit", "was"])
    committed = {unit: kept for unit, found in commits(storage, folder).items() if (kept := list(filter(sound, found)))}
    placed = was_before = None
    if before is not None:
        found = pc.index_in(table.column("key"), before.column("key"))
        placed, was_before = _names(before.column("unit").take(found)), _names(before.column("was").take(found))
    splits = [dealing.name or name or "" for name in _names(table.column("split"))]
    units = plan_shards(
        table.column("key").to_pylist(),
        splits,
        table.column("num_bytes").to_numpy(),
        dealing.target_bytes,
        dealing.max_samples,
        dealing.seed,
        None if redeal else placed,
        () if before is None else pc.unique(before.column("unit")).to_pylist(),
    )
    was = None if placed is None or was_before is None else _moved(units, placed, was_before, committed)
    recipes = [digest(*parts, unit.name, rows) for unit, rows in zip(units, _content(table, units), strict=True)]
    stale = [
        number
        for number, (unit, recipe) in enumerate(zip(units, recipes, strict=True))
        if unit.name in again or recipe not in {commit.recipe for commit in committed.get(unit.name, ())}
    ]
    return UnitPlan(stage, folder, table, units, recipes, was, committed, stale)


def _names(column: pa.ChunkedArray) -> list[str | None]:
    """A column of few different values as a list that holds each of them once."""
    encoded = column.combine_chunks().dictionary_encode()
    names = [*encoded.dictionary.to_pylist(), None]
    return [names[code] for code in encoded.indices.fill_null(len(names) - 1).to_numpy()]


def _moved(
    units: list[PlannedShard], earlier: list[str | None], unfinished: list[str | None], committed: Collection[str]
) -> pa.ChunkedArray | None:
    """Where samples lay that lie elsewhere now, or that an unfinished run was to move."""
    found: list[str | None] = [None] * len(earlier)
    anything = False
    for unit in units:
        for row in unit.rows.tolist():
            name = earlier[row] if earlier[row] != unit.name else unfinished[row]
            if name is not None and name in committed:
                found[row], anything = name, True
    return pa.chunked_array([pa.array(found, pa.string())]) if anything else None


def _content(table: pa.Table, units: list[PlannedShard]) -> Iterator[str]:
    """All that is known of each unit's samples, as one text; some units at a time, for memory."""
    columns = table.select(list(CONTENT_COLUMNS))
    for start in range(0, len(units), _UNITS_IN_A_PART):
        yield from map(_text, _members(columns, units[start : start + _UNITS_IN_A_PART]))


def _text(rows: pa.Table) -> str:
    return "\n".join("\t".join(row) for row in zip(*(column.to_pylist() for column in rows.columns), strict=True))


def unit_recipe(parts: Sequence[object], name: str, rows: pa.Table) -> str:
    """The recipe of a unit of a stage.

    Args:
        parts: What every result of the stage depends on besides its samples.
        name: The name of the unit.
        rows: Its samples in slot order, with the columns :data:`CONTENT_COLUMNS`.
    """
    return digest(*parts, name, _text(rows.select(list(CONTENT_COLUMNS))))


def _members(table: pa.Table, units: list[PlannedShard]) -> Iterator[pa.Table]:
    """The rows of each unit, taken for all of them at once: a take goes through the whole table."""
    rows = table.take(pa.array(np.concatenate([unit.rows for unit in units])))
    start = 0
    for unit in units:
        yield rows.slice(start, len(unit.rows))
        start += len(unit.rows)


def commit_plan(storage: Storage, plan: UnitPlan, run: str = "") -> list[WorkRow]:
    """Write the plan, parts that are there already left as they lie; returns the rows of stale work."""
    known = set(storage.names(PLAN_FOLDER))
    files: dict[int, tuple[str, int]] = {}
    listed = []
    for start in range(0, len(plan.units), _UNITS_IN_A_PART):
        units = plan.units[start : start + _UNITS_IN_A_PART]
        was = [_was(plan, unit) for unit in units]
        recipes = plan.recipes[start : start + len(units)]
        name = f"{plan.stage}-{digest([unit.name for unit in units], recipes, was)}.parquet"
        listed.append(name)
        if name not in known:
            with (
                storage.staged(f"{PLAN_FOLDER}/{name}") as path,
                pq.ParquetWriter(path, _PLAN_SCHEMA, compression="zstd") as out,
            ):
                for unit, earlier, part in zip(units, was, _members(plan.table, units), strict=True):
                    _write_unit(out, unit, earlier, part)
        files |= {start + group: (name, group) for group in range(len(units))}
    storage.write_bytes(_plan_list(plan.stage), json.dumps(listed).encode())
    for name in known - set(listed):
        if name.startswith(f"{plan.stage}-"):
            storage.delete(f"{PLAN_FOLDER}/{name}")
    return [_work_row(plan, number, *files[number], run) for number in plan.stale]


def commit_ahead(
    storage: Storage, plan: UnitPlan, number: int, table: pa.Table, parts: Sequence[object], run: str
) -> WorkRow | None:
    """Write a unit of a plan that is not committed yet, by itself; the committed plan will delete the file.

    Args:
        storage: The dataset folder.
        plan: The plan.
        number: The unit's.
        table: Its samples as they are now, in slot order; some may have left.
        parts: What every result of the stage depends on besides its samples.
        run: The run of the prepare.

    Returns:
        The row of its work; None if no sample is left, or its result is there.
    """
    unit = plan.units[number]
    recipe = unit_recipe(parts, unit.name, table)
    if not len(table) or recipe in {commit.recipe for commit in plan.committed.get(unit.name, ())}:
        return None
    keys = plan.table.column("key").take(pa.array(unit.rows)).to_pylist()
    was = dict(zip(keys, _was(plan, unit), strict=True))
    name = f"{plan.stage}-ahead-{digest(unit.name, recipe, was)}.parquet"
    with (
        storage.staged(f"{PLAN_FOLDER}/{name}") as path,
        pq.ParquetWriter(path, _PLAN_SCHEMA, compression="zstd") as out,
    ):
        _write_unit(out, unit, [was[key] for key in table.column("key").to_pylist()], table)
    row = _work_row(plan, number, name, 0, run)
    row["recipe"] = recipe
    return row


def _write_unit(out: pq.ParquetWriter, unit: PlannedShard, earlier: list[str | None], part: pa.Table) -> None:
    columns = [pa.array([unit.name] * len(part)), pa.array(range(len(part)), pa.int32())]
    columns += [pa.array(earlier, pa.string()), *part.columns]
    out.write_table(pa.table(columns, schema=_PLAN_SCHEMA))


def _was(plan: UnitPlan, unit: PlannedShard) -> list[str | None]:
    return [None] * len(unit.rows) if plan.was is None else plan.was.take(pa.array(unit.rows)).to_pylist()


def _work_row(plan: UnitPlan, number: int, part: str, group: int, run: str) -> WorkRow:
    unit = plan.units[number]
    earlier = sorted({name for name in _was(plan, unit) if name is not None})
    moved = {name: plan.committed[name][0].file for name in earlier}
    before = [commit.file for commit in plan.committed.get(unit.name, ())]
    return WorkRow(
        unit=unit.name,
        split=unit.split,
        recipe=plan.recipes[number],
        part=part,
        group=group,
        before=before,
        moved=json.dumps(moved),
        run=run,
    )


def kept_plan(storage: Storage, stage: str, columns: list[str]) -> pa.Table | None:
    """Columns of the plan that a stage wrote last, None without one."""
    if not storage.exists(_plan_list(stage)):
        return None
    schema = pa.schema([_PLAN_SCHEMA.field(name) for name in columns])
    files = planned_files(storage, stage)
    tables = [pq.read_table(pa.BufferReader(data), columns=columns) for data in storage.read_many(files)]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def planned_files(storage: Storage, stage: str) -> list[str]:
    """The files of the plan that a stage wrote last."""
    if not storage.exists(_plan_list(stage)):
        return []
    return [f"{PLAN_FOLDER}/{name}" for name in json.loads(storage.read_bytes(_plan_list(stage)))]


def planned_samples(storage: Storage, stage: str, keys: set[str]) -> dict[str, str]:
    """JSON of the samples of these keys that the plan has, by key; one of its files is held at a time."""
    found: dict[str, str] = {}
    wanted = pa.array(sorted(keys), pa.string())
    for data in storage.read_many(planned_files(storage, stage)):
        table = pq.read_table(pa.BufferReader(data), columns=["key", "sample"])
        table = table.filter(pc.is_in(table.column("key"), wanted))
        found |= dict(zip(table.column("key").to_pylist(), table.column("sample").to_pylist(), strict=True))
    return found


class PlannedUnits:
    """The samples of the plan that a stage wrote last, unit by unit; of what lies behind or ahead, nothing is held.

    Args:
        storage: The dataset folder.
        stage: Name of the stage.
        columns: Columns of the plan that are asked for.
    """

    def __init__(self, storage: Storage, stage: str, columns: Sequence[str]):
        self._columns = list(columns)
        self._units = self._read(storage.read_many(planned_files(storage, stage)))
        self._next = next(self._units, None)

    def rows(self, unit: str) -> list[dict[str, Any]]:
        """The rows of a unit, none where the plan does not have it; names must ascend from call to call."""
        while self._next is not None and self._next[0] < unit:
            self._next = next(self._units, None)
        return self._next[1].to_pylist() if self._next is not None and self._next[0] == unit else []

    def _read(self, files: Iterator[bytes]) -> Iterator[tuple[str, pa.Table]]:
        for data in files:
            part = pq.ParquetFile(pa.BufferReader(data))
            # A row group is a unit.
            for group in range(part.num_row_groups):
                table = part.read_row_group(group, ["unit", *self._columns])
                if len(table):
                    yield table.column("unit")[0].as_py(), table.select(self._columns)


def read_planned(storage: Storage, row: WorkRow) -> list[PlannedRow]:
    """The samples of a unit of a plan, in slot order."""

    def read() -> list[PlannedRow]:
        with storage.fs.open(storage.full_path(f"{PLAN_FOLDER}/{row['part']}"), "rb") as opened:
            return pq.ParquetFile(opened).read_row_group(row["group"], use_threads=False).to_pylist()

    found = storage.patiently(read)
    if any(entry["unit"] != row["unit"] for entry in found):
        raise RuntimeError(f"{storage.url}/{PLAN_FOLDER}/{row['part']}: row group {row['group']} is not {row['unit']}")
    return found


def commit_result(storage: Storage, folder: str, row: WorkRow, result: dict[str, Any]) -> None:
    """Write a unit's result, then remove the earlier one."""
    commit = Commit(row["unit"], row["recipe"], 0, "json")
    storage.write_bytes(f"{folder}/{commit.file}", json.dumps(result, sort_keys=True, ensure_ascii=False).encode())
    for file in row["before"]:
        if file != commit.file:
            storage.delete(f"{folder}/{file}")


def earlier_result(storage: Storage, folder: str, row: WorkRow) -> dict[str, Any]:
    """What an earlier run committed for the unit, empty without it."""
    return json.loads(storage.read_bytes(f"{folder}/{row['before'][0]}")) if row["before"] else {}


def committed_files(storage: Storage, plan: UnitPlan) -> list[str]:
    """File names of the results of all units, in order.

    Raises:
        RuntimeError: if one is missing.
    """
    found = commits(storage, plan.folder)
    files = []
    for unit, recipe in zip(plan.units, plan.recipes, strict=True):
        commit = next((commit for commit in found.get(unit.name, ()) if commit.recipe == recipe), None)
        if commit is None:
            raise RuntimeError(f"{plan.stage}: {unit.name} was not committed")
        files.append(commit.file)
    return files


def remove_unplanned(storage: Storage, plan: UnitPlan) -> None:
    """Delete results that the plan does not have, of whatever recipe."""
    planned = {unit.name: recipe for unit, recipe in zip(plan.units, plan.recipes, strict=True)}
    for unit, found in commits(storage, plan.folder).items():
        for commit in found:
            if planned.get(unit) != commit.recipe:
                storage.delete(f"{plan.folder}/{commit.file}")


def _plan_list(stage: str) -> str:
    return f"{PLAN_FOLDER}/{stage}.json"
