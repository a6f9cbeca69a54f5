"""What samples can be asked for by, out of the plan, where an index from before it said so does not."""

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loomvideo.pipelines.prepare.stages import ENCODE
from loomvideo.pipelines.prepare.units import PlannedUnits, planned_files
from loomvideo.platform.shards.index import IDENTITY_COLUMNS, identity_columns, joined
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.takedown import identities


def planned_identities(storage: Storage) -> Iterator[tuple[str, set[str]]]:
    """``(key, identities)`` of every sample of the plan that a dataset was made by; nothing where no plan is kept."""
    for data in storage.read_many(planned_files(storage, ENCODE.name)):
        table = pq.read_table(pa.BufferReader(data), columns=["key", "sample"])
        for key, text in zip(table.column("key").to_pylist(), table.column("sample").to_pylist(), strict=True):
            sample = json.loads(text)
            media = [sample["target"], sample.get("source"), *sample.get("references", [])]
            yield key, identities(key, sample.get("group", ""), media, sample.get("extra", {}))


class Identified:
    """Fills media paths and source ids into index rows of shards that were recorded before these were kept.

    Args:
        storage: The dataset folder.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._plan: PlannedUnits | None = None

    def __call__(self, shard: str, table: pa.Table) -> pa.Table:
        """The index rows of a shard with what the plan says; shards come in the order of their names."""
        if "media_target" in table.column_names and not table["media_target"].null_count:
            return table
        if self._plan is None:
            self._plan = PlannedUnits(self._storage, ENCODE.name, ["key", "sample"])
        known = {row["key"]: _columns(json.loads(row["sample"])) for row in self._plan.rows(shard)}
        table = joined([table])
        unsaid = pc.is_null(table["media_target"])
        for name in IDENTITY_COLUMNS:
            position = table.column_names.index(name)
            planned = pa.array([known.get(key, {}).get(name) for key in table["key"].to_pylist()], table[name].type)
            filled = pc.if_else(unsaid, planned, table[name].combine_chunks())
            table = table.set_column(position, table.field(name), filled)
        return table


def _columns(sample: dict) -> dict:
    return identity_columns(
        sample["target"], sample.get("source"), sample.get("references", []), sample.get("extra", {})
    )
