"""What of a dataset is stale, asked of a whole cluster: for inputs that no driver should hold.

The input is read once, by one task, and goes on in batches; tasks look at the samples' files; then input and plan are
brought together by a hash of the key, some ten thousand samples at a time. The driver gets what is stale and holds the
first of it.
"""

import functools
import heapq
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.inputs import InputTable, input_rows
from loomvideo.pipelines.prepare.job import stored_manifest
from loomvideo.pipelines.prepare.stages import ASSESS, ENCODE, Stage, stages_of
from loomvideo.pipelines.prepare.staleness import (
    KNOWN_LATER,
    Stale,
    changed_sample,
    dataset_changes,
    missing_shard,
    stale_unit,
)
from loomvideo.pipelines.prepare.units import CONTENT_COLUMNS, planned_files, unit_recipe
from loomvideo.pipelines.sources.samples import media_paths, stored_sample
from loomvideo.platform.shards.commits import commits
from loomvideo.platform.shards.manifest import SHARD_FOLDER
from loomvideo.platform.shards.storage import Storage

_BATCH_ROWS = 8192
# Of input and plan together some 50 MB of a worker's memory.
_ROWS_IN_A_PARTITION = 50_000
_LEAST_PARTITIONS = 8
_NOW, _PLANNED = 0, 1
_SCHEMA = pa.schema(
    [("partition", pa.int32()), ("side", pa.int8())]
    + [(name, pa.large_string()) for name in ("key", "unit", "sample", "media")]
)
"""A sample, as the input has it now or as it was planned."""
_FOUND = pa.schema([(name, pa.large_string()) for name in ("name", "members", "why", "unit")])
_NEW, _GONE = KNOWN_LATER[:2]


@dataclass
class StaleParts:
    """What is stale, of much the first.

    Attributes:
        most: Parts at most that are held.
        count: How much there is.
    """

    most: int
    count: int = 0
    _held: list[tuple[tuple, Stale]] = field(default_factory=list)

    def add(self, rank: tuple, part: Stale) -> None:
        """Count a part; it is held while it is among the first by rank."""
        self.count += 1
        self._held.append((rank, part))
        if len(self._held) >= 2 * self.most:
            self._held = self._smallest()

    @property
    def first(self) -> list[Stale]:
        """The first of it, in the order in which :func:`~.staleness.stale_parts` says it."""
        return [part for _, part in self._smallest()]

    def _smallest(self) -> list[tuple[tuple, Stale]]:
        return heapq.nsmallest(self.most, self._held, key=lambda entry: entry[0])


Run = Callable[[PrepareConfig, Stage, list[str], int], Iterable[dict[str, str]]]


def compare_on_ray(config: PrepareConfig, stage: Stage, files: list[str], workers: int) -> Iterator[dict[str, str]]:
    """What of the input is not as a stage planned it, as rows of ``name, members, why, unit``.

    Args:
        config: The job, with places that workers reach.
        stage: The stage.
        files: The files of its plan.
        workers: Tasks at most that look at samples' files.
    """
    import ray

    from loomvideo.platform.ray_session import quiet_data

    quiet_data()
    reading = ray.data.from_items([{"all": 0}])
    now = reading.map_batches(functools.partial(input_batches, config), batch_size=1).map_batches(
        functools.partial(stamped, config), batch_format="pyarrow", batch_size=_BATCH_ROWS, concurrency=workers
    )
    parts = ray.data.from_items([{"file": file} for file in files], override_num_blocks=len(files))
    planned = parts.map_batches(functools.partial(planned_batches, config), batch_size=1)
    grouped = now.union(planned).groupby("partition", num_partitions=partitions(config))
    with warnings.catch_warnings():
        # A small input is one batch, for which one task is enough.
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")
        yield from grouped.map_groups(differences, batch_format="pyarrow").iter_rows()


def stale_parts_on_ray(
    config: PrepareConfig, workers: int, most: int = 200, compare: Run = compare_on_ray
) -> StaleParts:
    """:func:`~.staleness.stale_parts` as tasks of the Ray cluster; the driver's memory does not grow with the input.

    Who leaves by another limit of curation is decided over all samples, in the driver: here only the limit is named.

    Args:
        config: The job, with places that workers reach.
        workers: Tasks at most that look at samples' files.
        most: Parts at most that are held.
        compare: Compares input and plan.
    """
    config.check()
    storage, stages = Storage(config.output), stages_of(config)
    parts = StaleParts(most)
    whole = dataset_changes(storage, config, bool(planned_files(storage, ENCODE.name)))
    for number, part in enumerate(whole):
        parts.add((0, number), part)
    if whole and whole[0].members == "everything":
        return parts
    # Captions are asked for some samples alone: with them, too, all are told by what was planned to be encoded.
    joined = ASSESS if ASSESS in stages else ENCODE
    later = KNOWN_LATER if joined is ASSESS else KNOWN_LATER[2:] if config.makes_texts else ()
    touched: set[str] = set()
    num_new = 0
    files = planned_files(storage, joined.name)
    for row in compare(config, joined, files, workers) if files else ():
        num_new += row["why"] == _NEW
        touched |= {row["unit"]} - {""}
        if row["why"] not in later:
            order = (_NEW, _GONE).index(row["why"]) if row["why"] in (_NEW, _GONE) else 2
            parts.add((2, order, row["name"]), Stale("sample", row["name"], row["members"], row["why"]))
    for number, stage in enumerate(stages):
        stale = sorted(_stale_units(storage, stage, config, touched if stage is joined else ()))
        for name in stale:
            part = missing_shard(name) if stage is ENCODE else stale_unit(stage, name)
            parts.add((3, 0, name) if stage is ENCODE else (1, number, name), part)
        if stage is ASSESS and num_new:
            part = Stale(stage.name, "new samples", stage.redone, f"{num_new} that are in no chunk yet")
            parts.add((1, number, "~"), part)
        if stage is not ENCODE and (stale or (stage is joined and num_new)):
            break  # what the later stages will be given is not known yet
    return parts


def _stale_units(storage: Storage, stage: Stage, config: PrepareConfig, touched: Collection[str]) -> Iterator[str]:
    """Planned units of a stage without a result that holds; of encoding those without any."""
    sizes = storage.sizes(SHARD_FOLDER) if stage.vouches_for_tars else {}
    committed: dict[str, set[str]] = {}
    for unit, found in commits(storage, stage.folder).items():
        sound = [commit for commit in found if not commit.num_bytes or sizes.get(f"{unit}.tar") == commit.num_bytes]
        committed[unit] = {commit.recipe for commit in sound}
    for file in planned_files(storage, stage.name):
        (data,) = storage.read_many([file])
        part = pq.ParquetFile(pa.BufferReader(data))
        # A row group is a unit; of a shard that is there the samples have been compared.
        for group in range(part.num_row_groups):
            rows = part.read_row_group(group, ["unit", *(() if stage is ENCODE else CONTENT_COLUMNS)])
            if not len(rows):
                continue
            name = rows["unit"][0].as_py()
            known = committed.get(name, set())
            holds = bool(known) if stage is ENCODE else unit_recipe(stage.recipe(config), name, rows) in known
            if not holds or (name in touched and stage is not ENCODE):
                yield name


def partitions(config: PrepareConfig) -> int:
    """In how many parts input and plan are compared."""
    before = stored_manifest(Storage(config.output))
    num_samples = int(before.inputs.get("samples", 0)) if before is not None else 0
    return max(-(-num_samples // _ROWS_IN_A_PARTITION), _LEAST_PARTITIONS)


def input_batches(config: PrepareConfig, batch: Any) -> Iterator[pa.Table]:
    """The whole input in batches; one task."""
    num = partitions(config)
    rows: list[tuple[str, str]] = []
    for row in input_rows(config, Storage(config.output)):
        rows.append(row)
        if len(rows) == _BATCH_ROWS:
            yield _side(_NOW, rows, num)
            rows = []
    yield _side(_NOW, rows, num)


def _side(side: int, rows: list[tuple[str, str]], num: int) -> pa.Table:
    keys = [key for key, _ in rows]
    columns = [_partitions(keys, num), [side] * len(rows), keys, [""] * len(rows), [sample for _, sample in rows]]
    arrays = [pa.array(values, kind.type) for values, kind in zip([*columns, [""] * len(rows)], _SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def _partitions(keys: Iterable[str], num: int) -> list[int]:
    # Not Python's hash, which differs between processes.
    return [zlib.crc32(key.encode()) % num for key in keys]


def stamped(config: PrepareConfig, table: pa.Table) -> pa.Table:
    """Samples with what their files look like now; one task of many."""
    known = InputTable(config)
    media = [known.stamps(media_paths(stored_sample(sample))) for sample in table["sample"].to_pylist()]
    position = _SCHEMA.get_field_index("media")
    return table.set_column(position, _SCHEMA.field("media"), pa.array(media, pa.large_string()))


def planned_batches(config: PrepareConfig, batch: Any) -> Iterator[pa.Table]:
    """The samples of some files of a plan."""
    storage, num = Storage(config.output), partitions(config)
    for data in storage.read_many([str(file) for file in batch["file"]]):
        for some in pq.ParquetFile(pa.BufferReader(data)).iter_batches(
            _BATCH_ROWS, columns=["key", "unit", "sample", "media"]
        ):
            rows = pa.Table.from_batches([some])
            sides = [_partitions(rows["key"].to_pylist(), num), [_PLANNED] * len(rows)]
            columns = [*sides, *(rows[name].to_pylist() for name in _SCHEMA.names[2:])]
            arrays = [pa.array(values, kind.type) for values, kind in zip(columns, _SCHEMA, strict=True)]
            yield pa.Table.from_arrays(arrays, schema=_SCHEMA)


def differences(table: pa.Table) -> pa.Table:
    """What of a partition's samples differs between input and plan."""
    now = table.filter(pc.equal(table["side"], _NOW))
    planned = table.filter(pc.equal(table["side"], _PLANNED))
    place = pc.index_in(now["key"], planned["key"].combine_chunks())
    found = [(key, "everything", _NEW, "") for key in now.filter(pc.is_null(place))["key"].to_pylist()]
    gone = planned.filter(pc.invert(pc.is_in(planned["key"], now["key"].combine_chunks())))
    found += [(row["key"], "removed", _GONE, row["unit"]) for row in gone.select(["key", "unit"]).to_pylist()]
    both, before = now.filter(pc.is_valid(place)), planned.take(pc.drop_null(place))
    other = pc.or_(*(pc.not_equal(both[name], before[name]) for name in ("sample", "media")))
    for row, earlier in zip(both.filter(other).to_pylist(), before.filter(other).to_pylist(), strict=True):
        found += [(part.name, part.members, part.why, earlier["unit"]) for part in changed_sample(row, earlier)]
    columns = zip(*found, strict=True) if found else [[] for _ in _FOUND]
    return pa.Table.from_arrays([pa.array(column, pa.large_string()) for column in columns], schema=_FOUND)
