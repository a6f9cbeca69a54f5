"""Chunks of samples: the unit of work of the stages before encoding, dealt and committed the way shards are.

A stage writes one plan file, a worker reads its own chunk's row group from it, and a chunk's result is one JSON file
``{recipe, media, ...}``: so every stage resumes, and a chunk whose recipe and files are as they were is not done again.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loomvideo.pipelines.prepare.inputs import Inputs
from loomvideo.pipelines.sources.samples import Sample, stored_sample
from loomvideo.platform.shards.plan import PlanItem, PlannedShard, digest, plan_shards
from loomvideo.platform.shards.storage import Storage

CHUNK_SAMPLES = 64
SameMedia = Callable[[Mapping[str, list | None]], bool]


def plan_chunks(samples: Iterable[Sample]) -> list[PlannedShard]:
    """Deal samples into chunks."""
    return plan_shards((PlanItem(s.key, "chunk", 1) for s in samples), 2**62, CHUNK_SAMPLES, seed=0)


def chunk_path(folder: str, chunk: str) -> str:
    """Where the result of a chunk lies."""
    return f"{folder}/{chunk}.json"


def chunk_rows(chunks: list[PlannedShard], by_key: Mapping[str, Sample], *parts: object) -> list[dict[str, Any]]:
    """The work: a row a chunk, with the recipe of its result over ``parts`` and the chunk's samples."""
    return [
        {"chunk": chunk.name, "recipe": digest(*parts, *(by_key[key].to_json() for key in chunk.keys))}
        for chunk in chunks
    ]


def stale_chunks(
    storage: Storage, folder: str, rows: list[dict[str, Any]], same_media: SameMedia, again: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Rows without a result that still holds, and those whose result's path is in ``again``."""
    stale = []
    for row in rows:
        path = chunk_path(folder, row["chunk"])
        if path in again:
            stale.append(row)
            continue
        record = json.loads(storage.read_bytes(path)) if storage.exists(path) else None
        if record is None or record["recipe"] != row["recipe"] or not same_media(record["media"]):
            stale.append(row)
    return stale


def write_plan(
    storage: Storage, file: str, plan: list[PlannedShard], inputs: Inputs, by_key: Mapping[str, Sample]
) -> None:
    """Write which sample lies in which shard or chunk, a row group each: a worker reads its own part only."""
    columns = [("shard", pa.string()), ("slot", pa.int32()), ("key", pa.string())]
    schema = pa.schema([*columns, ("sample", pa.string()), ("judged", pa.string())])
    with storage.staged(file) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for shard in plan:
            rows = [
                {
                    "shard": shard.name,
                    "slot": slot,
                    "key": key,
                    "sample": by_key[key].to_json(),
                    "judged": inputs.judged_json(key),
                }
                for slot, key in enumerate(shard.keys)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def read_planned(storage: Storage, file: str, shard: str) -> list[dict[str, Any]]:
    """The rows ``{slot, key, sample, judged}`` of one shard or chunk of a plan, in slot order."""

    def read() -> list[dict[str, Any]]:
        with storage.fs.open(storage.full_path(file), "rb") as opened:
            table = pq.ParquetFile(opened)
            # By the statistics of the row groups, of which a shard has one: filtering would read them all.
            for group in range(table.num_row_groups):
                statistics = table.metadata.row_group(group).column(0).statistics
                if statistics.min <= shard <= statistics.max:
                    return table.read_row_group(group, use_threads=False).to_pylist()
        raise KeyError(f"{storage.url}/{file}: no {shard} in it")

    return storage.patiently(read)


def read_chunk(storage: Storage, file: str, chunk: str) -> list[Sample]:
    """The samples of a chunk."""
    return [stored_sample(row["sample"]) for row in read_planned(storage, file, chunk)]
