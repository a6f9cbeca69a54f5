"""Writing shards: each is staged, renamed and only then recorded; what is not recorded does not exist."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards import tensors as safetensors
from loomvideo.platform.shards.commits import Commit, commits
from loomvideo.platform.shards.index import index_row, index_table, joined
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
_FACTS = b"loomvideo.record"


@dataclass(frozen=True)
class ShardRecord:
    """The commit record of one shard: its checksum, index rows and the samples that were planned and not written.

    Attributes:
        recipe: Digest of everything that determines the shard's content.
        index: Index rows in slot order.
        losses: One ``{key, dataset, outcome, ...}`` for every planned sample that is not written.
        facts: What made the shard, such as encoder fingerprints.
    """

    name: str
    split: str
    recipe: str
    sha256: str
    num_bytes: int
    index: pa.Table
    losses: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> ShardEntry:
        """The manifest's line for this shard."""
        return ShardEntry(self.name, self.split, self.sha256, self.num_bytes, len(self.index))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Index rows as dictionaries."""
        return self.index.to_pylist()

    @property
    def commit(self) -> Commit:
        """How the record is found in a listing."""
        return Commit(self.name, self.recipe, self.num_bytes)

    def to_bytes(self) -> bytes:
        """A Parquet file: the index rows, and the rest in its metadata."""
        rest = {name: value for name, value in vars(self).items() if name != "index"}
        table = self.index.replace_schema_metadata({_FACTS: json.dumps(rest, sort_keys=True)})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "ShardRecord":
        """Parse :meth:`to_bytes`.

        Raises:
            UserError: naming ``where`` if it is damaged.
        """
        try:
            table = pq.read_table(io.BytesIO(data), use_threads=False)
            facts = json.loads(table.schema.metadata[_FACTS])
            return ShardRecord(index=table.replace_schema_metadata(None), **facts)
        except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{where}: damaged; delete it and run again, its shard is made anew") from error


def write_shard(
    storage: Storage,
    name: str,
    split: str,
    samples: Iterable[tuple[int, ShardSample]],
    recipe: str = "",
    losses: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    before: Collection[str] | None = None,
) -> ShardRecord:
    """Write one tar from a stream of ``(slot, sample)`` in slot order, then commit its record.

    Only one sample is held at a time. A shard that gets no sample has a record and no tar.

    Args:
        storage: The dataset folder.
        name: The name of the shard.
        split: The split of its samples.
        samples: Slots and samples, in slot order.
        recipe: Digest of everything that determines the content.
        losses: The losses of the record; may be a list that the stream fills as it runs.
        facts: The facts of the record; may be a dictionary that the stream fills as it runs.
        before: File names of the shard's earlier records; by default the folder is listed for them.
    """
    rows: list[dict[str, Any]] = []
    if before is None:
        before = [commit.file for commit in commits(storage, RECORD_FOLDER).get(name, ())]
    try:
        with storage.staged(shard_path(name)) as path:
            with path.open("wb") as out:
                tar = TarWriter(out)
                for slot, sample in samples:
                    place = append_sample(tar, sample)
                    rows.append(index_row(sample, name, slot, place))
                sha256 = tar.finish()
            # Between the rename and the new record there must be no record: an old one would vouch for the new bytes.
            for file in before:
                storage.delete(f"{RECORD_FOLDER}/{file}")
            if not rows:
                raise _EmptyShardError
    except _EmptyShardError:
        storage.delete(shard_path(name))
    num_bytes = tar.num_bytes if rows else 0
    record = ShardRecord(
        name, split, recipe, sha256, num_bytes, index_table(rows), [dict(loss) for loss in losses], dict(facts or {})
    )
    storage.write_bytes(f"{RECORD_FOLDER}/{record.commit.file}", record.to_bytes())
    return record


class _EmptyShardError(Exception):
    """Leaves the staging block so that nothing is published."""


def read_record(storage: Storage, name: str) -> ShardRecord | None:
    """The commit record of a shard, None when it is not committed or its tar is gone.

    Raises:
        UserError: if the record is damaged.
    """
    found = commits(storage, RECORD_FOLDER).get(name)
    if not found:
        return None
    record = stored_record(storage, found[0].file)
    if len(record.index) and storage.size(shard_path(name)) != record.num_bytes:
        return None
    return record


def stored_record(storage: Storage, file: str) -> ShardRecord:
    """The record in a file of the record folder.

    Raises:
        UserError: if it is missing or damaged.
    """
    path = f"{RECORD_FOLDER}/{file}"
    return ShardRecord.from_bytes(storage.read_bytes(path), f"{storage.url}/{path}")


def write_shared(storage: Storage, tensors: Mapping[str, Tensor]) -> str:
    """Write the dataset-wide tensors and return the file's SHA-256."""
    chunks, _ = safetensors.serialized(tensors)
    data = b"".join(chunks)
    storage.write_bytes(SHARED_FILE, data)
    return hashlib.sha256(data).hexdigest()


def write_table(storage: Storage, path: str, table: pa.Table) -> str:
    """Write a Parquet file, all or nothing; returns its SHA-256."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(path, sink.getvalue())
    return hashlib.sha256(sink.getbuffer()).hexdigest()


def finish_dataset(storage: Storage, records: Iterable[ShardRecord], **manifest_fields: Any) -> Manifest:
    """Write the index and, last of all, the manifest from the records of all shards.

    Args:
        storage: The dataset folder.
        records: The records of all shards, in manifest order; each is let go when its rows are taken.
        manifest_fields: The other fields of :class:`Manifest`.

    Raises:
        RuntimeError: if the counts do not add up.
    """
    entries, tables = [], []
    for record in records:
        if len(record.index):
            entries.append(record.entry)
            tables.append(record.index)
    return publish(storage, Manifest(entries, **manifest_fields), joined(tables))


def publish(storage: Storage, manifest: Manifest, index: pa.Table) -> Manifest:
    """Write index and other readers' files and, last of all, the manifest with the index's checksum.

    Raises:
        RuntimeError: if a key is in the index twice or the counts do not add up.
    """
    if pc.count_distinct(index.column("key")).as_py() != len(index):
        found = pc.value_counts(index.column("key"))
        repeated = next(entry["values"].as_py() for entry in found if entry["counts"].as_py() > 1)
        raise RuntimeError(f"key {repeated!r} was written twice")
    check_counts(manifest.counts)
    manifest = dataclasses.replace(manifest, index_sha256=write_table(storage, INDEX_FILE, index))
    write_interop(storage, manifest)
    storage.write_bytes(MANIFEST_FILE, manifest.to_json().encode())
    return manifest
