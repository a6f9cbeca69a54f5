"""Writing shards: each is staged, renamed and only then recorded; what is not recorded does not exist."""

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards import tensors as safetensors
from loomvideo.platform.shards.commits import Commit, commits
from loomvideo.platform.shards.index import IndexWriter, index_row, index_table, score_columns
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
    def num_samples(self) -> int:
        """Samples in the shard."""
        return len(self.index)

    @property
    def scores(self) -> list[str]:
        """Score columns of the index rows."""
        return score_columns(self.index.schema)

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
        stored = StoredRecord(data, where)
        with _damage_named(where):
            return ShardRecord(index=stored.index, **stored.facts)


class StoredRecord:
    """A record as it is stored, of which no more is parsed than is asked for: of thousands, all are held at a time.

    Args:
        data: What :meth:`ShardRecord.to_bytes` made.
        where: Its file, for messages.

    Raises:
        UserError: naming ``where`` if it is damaged.
    """

    def __init__(self, data: bytes, where: str):
        self._data, self._where = data, where
        with _damage_named(where):
            schema = pq.read_schema(io.BytesIO(data))
            self.facts: dict[str, Any] = json.loads(schema.metadata[_FACTS])
            self.num_samples = pq.read_metadata(io.BytesIO(data)).num_rows
        self.scores = score_columns(schema)

    @property
    def entry(self) -> ShardEntry:
        """The manifest's line for this shard."""
        named = (self.facts[name] for name in ("name", "split", "sha256", "num_bytes"))
        return ShardEntry(*named, self.num_samples)

    @property
    def index(self) -> pa.Table:
        """The index rows."""
        return self._read(None)

    def counts(self) -> dict[str, int]:
        """Samples by dataset."""
        found = pc.value_counts(self._read(["dataset"]).column("dataset"))
        return {entry["values"].as_py(): entry["counts"].as_py() for entry in found}

    def _read(self, columns: list[str] | None) -> pa.Table:
        with _damage_named(self._where):
            table = pq.read_table(io.BytesIO(self._data), columns=columns, use_threads=False)
        return table.replace_schema_metadata(None)


@contextlib.contextmanager
def _damage_named(where: str) -> Iterator[None]:
    try:
        yield
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


def finish_dataset(
    storage: Storage,
    records: Iterable["ShardRecord | StoredRecord"],
    complete: Callable[[str, pa.Table], pa.Table] = lambda name, table: table,
    **fields: Any,
) -> Manifest:
    """Write the index and, last of all, the manifest from the records of all shards.

    Args:
        storage: The dataset folder.
        records: The records of all shards, in manifest order.
        complete: Fills in, of a shard's name and index rows, what records from before it was kept lack.
        fields: The other fields of :class:`Manifest`.

    Raises:
        RuntimeError: if the counts do not add up.
    """
    kept = [record for record in records if record.num_samples]
    scores = {name for record in kept for name in record.scores}
    index = (complete(record.entry.name, record.index) for record in kept)
    return publish(storage, Manifest([record.entry for record in kept], **fields), index, scores)


def publish(storage: Storage, manifest: Manifest, index: Iterable[pa.Table], scores: Collection[str]) -> Manifest:
    """Write index and other readers' files and, last of all, the manifest with the index's checksum.

    Args:
        storage: The dataset folder.
        manifest: The manifest.
        index: Index rows in order, each table let go when it is written.
        scores: Score columns that occur in them.

    Raises:
        RuntimeError: if a key is in the index twice or the counts do not add up.
    """
    check_counts(manifest.counts)
    with storage.staged(INDEX_FILE) as path:
        out = IndexWriter(path, scores)
        for table in index:
            out.add(table)
        out.close()
        with path.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
    manifest = dataclasses.replace(manifest, index_sha256=sha256)
    write_interop(storage, manifest)
    storage.write_bytes(MANIFEST_FILE, manifest.to_json().encode())
    return manifest
