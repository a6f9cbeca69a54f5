"""Writing shards: each is staged, renamed and only then recorded; what is not recorded does not exist."""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from loomvideo.platform.shards import tensors as safetensors
from loomvideo.platform.shards.index import index_row, index_table
from loomvideo.platform.shards.interop import write_interop
from loomvideo.platform.shards.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    SHARED_FILE,
    Manifest,
    ShardEntry,
    check_counts,
    shard_path,
)
from loomvideo.platform.shards.sample import ShardSample, append_sample
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.tar import TarWriter

RECORD_FOLDER = "work/records"


@dataclass(frozen=True)
class ShardRecord:
    """The commit record of one shard: its checksum, index rows and the fate of every planned sample.

    Attributes:
        recipe: Digest of everything that determines the shard's content.
        rows: Index rows in slot order.
        outcomes: One ``{key, dataset, outcome, ...}`` for every planned sample.
        facts: What made the shard, such as encoder fingerprints.
    """

    name: str
    split: str
    recipe: str
    sha256: str
    num_bytes: int
    rows: list[dict[str, Any]]
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> ShardEntry:
        """The manifest's line for this shard."""
        return ShardEntry(self.name, self.split, self.sha256, self.num_bytes, len(self.rows))


def write_shard(
    storage: Storage,
    name: str,
    split: str,
    samples: Iterable[tuple[int, ShardSample]],
    recipe: str = "",
    outcomes: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Write one tar from a stream of ``(slot, sample)`` in slot order, then commit its record.

    Only one sample is held at a time. ``outcomes`` may be a list that the stream fills as it runs. A shard that gets
    no sample has a record and no tar.
    """
    rows: list[dict[str, Any]] = []
    try:
        with storage.staged(shard_path(name)) as path:
            with path.open("wb") as out:
                tar = TarWriter(out)
                for slot, sample in samples:
                    place = append_sample(tar, sample)
                    rows.append(index_row(sample, name, slot, place))
                sha256 = tar.finish()
            # Between the rename and the new record there must be no record: an old one would vouch for the new bytes.
            storage.delete(record_path(name))
            if not rows:
                raise _EmptyShardError
    except _EmptyShardError:
        storage.delete(shard_path(name))
    num_bytes = tar.num_bytes if rows else 0
    record = ShardRecord(name, split, recipe, sha256, num_bytes, rows, [dict(o) for o in outcomes], dict(facts or {}))
    storage.write_bytes(record_path(name), (json.dumps(record.__dict__, sort_keys=True) + "\n").encode())
    return record


class _EmptyShardError(Exception):
    """Leaves the staging block so that nothing is published."""


def record_path(name: str) -> str:
    """Where a shard's commit record lies."""
    return f"{RECORD_FOLDER}/{name}.json"


def read_record(storage: Storage, name: str) -> ShardRecord | None:
    """The commit record of a shard, None when it is not committed or its tar is gone."""
    if not storage.exists(record_path(name)):
        return None
    record = ShardRecord(**json.loads(storage.read_bytes(record_path(name))))
    if record.rows and storage.size(shard_path(name)) != record.num_bytes:
        return None
    return record


def write_shared(storage: Storage, tensors: Mapping[str, Tensor]) -> str:
    """Write the dataset-wide tensors and return the file's SHA-256."""
    chunks, _ = safetensors.serialized(tensors)
    data = b"".join(chunks)
    storage.write_bytes(SHARED_FILE, data)
    return hashlib.sha256(data).hexdigest()


def write_table(storage: Storage, path: str, table: pa.Table) -> None:
    """Write a Parquet file, all or nothing."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(path, sink.getvalue())


def finish_dataset(storage: Storage, records: Sequence[ShardRecord], **manifest_fields: Any) -> Manifest:
    """Write the index and, last of all, the manifest from the records of all shards.

    Args:
        storage: The dataset folder.
        records: In manifest order.
        manifest_fields: The other fields of :class:`Manifest`.

    Raises:
        RuntimeError: if the counts do not add up.
    """
    keys = [row["key"] for record in records for row in record.rows]
    if len(set(keys)) != len(keys):
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RuntimeError(f"key {repeated!r} was written twice")
    manifest = Manifest([record.entry for record in records if record.rows], **manifest_fields)
    check_counts(manifest.counts)
    write_table(storage, INDEX_FILE, index_table([row for record in records for row in record.rows]))
    write_interop(storage, manifest)
    storage.write_bytes(MANIFEST_FILE, manifest.to_json().encode())
    return manifest
