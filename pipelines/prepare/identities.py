"""What samples can be asked for by, out of the plan: a take-down needs no look into a shard."""

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from loomvideo.pipelines.prepare.stages import ENCODE
from loomvideo.pipelines.prepare.units import planned_files
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
