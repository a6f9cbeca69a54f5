"""``index.parquet``: one row a sample, so that mixing, packing and range reads need no tar scan."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loomvideo.platform.shards.sample import MEMBERS, METADATA, SamplePlace, ShardSample

SCORE_PREFIX = "score_"
_ROWS_IN_A_GROUP = 65_536
_FIXED = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("members", pa.list_(pa.string()), nullable=False),
        pa.field("member_offsets", pa.list_(pa.int64()), nullable=False),
        pa.field("member_bytes", pa.list_(pa.int64()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("fps", pa.float32()),
        pa.field("num_windows", pa.int32(), nullable=False),
        pa.field("dit_tokens", pa.int32(), nullable=False),
        pa.field("mllm_tokens", pa.int32(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("licence", pa.string()),
        *(pa.field(f"fingerprint_{member}", pa.string()) for member in (METADATA, *MEMBERS)),
        # Null in datasets from before they were kept, until a prepare fills them in.
        pa.field("media_target", pa.string()),
        pa.field("media_source", pa.string()),
        pa.field("media_references", pa.list_(pa.string())),
        pa.field("source_ids", pa.list_(pa.string())),
    ]
)
IDENTITY_COLUMNS = ("media_target", "media_source", "media_references", "source_ids")
"""What a sample can be asked for by, besides key and group; training reads the index without them."""


def index_row(sample: ShardSample, shard: str, slot: int, place: SamplePlace) -> dict[str, Any]:
    """The index row of a written sample.

    Raises:
        ValueError: if the metadata lacks a field that the index needs.
    """
    metadata = sample.metadata
    missing = [name for name in ("task", "dataset", "split", "bucket", "num_frames") if name not in metadata]
    if missing:
        raise ValueError(f"{sample.key}: metadata lacks {missing[0]!r}")
    fingerprints = metadata.get("fingerprints", {})
    row = {
        "key": sample.key,
        "shard": shard,
        "slot": slot,
        **place_columns(place),
        "split": metadata["split"],
        "task": metadata["task"],
        "dataset": metadata["dataset"],
        "width": metadata["bucket"][0],
        "height": metadata["bucket"][1],
        "num_frames": metadata["num_frames"],
        "fps": metadata.get("fps"),
        "num_windows": metadata.get("num_windows", 1),
        "dit_tokens": metadata.get("dit_tokens", 0),
        "mllm_tokens": metadata.get("mllm_tokens", 0),
        "group": metadata.get("group") or "",
        "licence": metadata.get("licence") or "unknown",
    }
    row |= {f"fingerprint_{member}": fingerprints.get(member) for member in (METADATA, *MEMBERS)}
    row |= {f"{SCORE_PREFIX}{name}": float(value) for name, value in metadata.get("scores", {}).items()}
    media = metadata.get("media")
    if media is not None:
        row |= identity_columns(
            media.get("target"), media.get("source"), media.get("references", []), metadata.get("extra", {})
        )
    return row


def identity_columns(
    target: str | None, source: str | None, references: Sequence[str], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The columns :data:`IDENTITY_COLUMNS` of a sample with such media paths and ``extra`` fields."""
    ids = [str(extra[name]) for name in ("source_id", "sku") if extra.get(name)]
    return dict(zip(IDENTITY_COLUMNS, (target, source, list(references), ids), strict=True))


def place_columns(place: SamplePlace) -> dict[str, Any]:
    """The index columns that say where a sample lies."""
    return {
        "offset": place.offset,
        "num_bytes": place.num_bytes,
        "members": [member.name for member in place.members],
        "member_offsets": [member.offset for member in place.members],
        "member_bytes": [member.num_bytes for member in place.members],
    }


def index_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table: the fixed columns, then one float64 ``score_*`` column for every score that occurs."""
    schema = _schema({name for row in rows for name in row if name.startswith(SCORE_PREFIX)})
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Index tables as one, in order; scores that one lacks are null."""
    schema = _schema({name for table in tables for name in score_columns(table.schema)})
    return pa.concat_tables([schema.empty_table(), *(_conformed(table, schema) for table in tables)]).combine_chunks()


def score_columns(schema: pa.Schema) -> list[str]:
    """The columns of scores."""
    return [name for name in schema.names if name.startswith(SCORE_PREFIX)]


def _schema(scores: Iterable[str]) -> pa.Schema:
    return pa.schema([*_FIXED, *(pa.field(name, pa.float64()) for name in sorted(scores))])


def _conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    # Columns that were read from Parquet carry its field numbers: the same rows shall make the same file.
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


class IndexWriter:
    """Writes the index file from one shard's rows after another; the rows of some shards are held, not all.

    Args:
        path: The file.
        scores: Score columns of all tables that will come.
    """

    def __init__(self, path: Path, scores: Iterable[str]):
        self._path, self._schema = path, _schema(scores)
        self._out = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._held: list[pa.Table] = []
        self._hashes: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        """Append the rows of a shard."""
        self._held.append(_conformed(table, self._schema))
        keys = table.column("key").to_pylist()
        self._hashes.append(np.fromiter(map(hash, keys), np.int64, len(keys)))
        if sum(map(len, self._held)) >= _ROWS_IN_A_GROUP:
            self._flush()

    def close(self) -> None:
        """Finish the file.

        Raises:
            RuntimeError: if a key came twice.
        """
        self._flush()
        self._out.close()
        hashes = np.concatenate(self._hashes) if self._hashes else np.empty(0, np.int64)
        if len(np.unique(hashes)) == len(hashes):
            return
        found = pc.value_counts(pq.read_table(self._path, columns=["key"]).column("key"))
        repeated = found.filter(pc.greater(found.field("counts"), 1))
        if len(repeated):
            raise RuntimeError(f"key {repeated.field('values')[0].as_py()!r} was written twice")

    def _flush(self) -> None:
        if self._held:
            self._out.write_table(pa.concat_tables(self._held).combine_chunks(), row_group_size=2 * _ROWS_IN_A_GROUP)
        self._held = []
