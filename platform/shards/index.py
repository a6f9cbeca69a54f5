"""``index.parquet``: one row a sample, so that mixing, packing and range reads need no tar scan."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from loomvideo.platform.shards.sample import MEMBERS, METADATA, SamplePlace, ShardSample

SCORE_PREFIX = "score_"
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
    ]
)


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
    return row


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
    scores = sorted({name for row in rows for name in row if name.startswith(SCORE_PREFIX)})
    schema = pa.schema([*_FIXED, *(pa.field(name, pa.float64()) for name in scores)])
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Index tables as one, in order; scores that one lacks are null."""
    if not tables:
        return index_table([])
    table = pa.concat_tables(tables, promote_options="default")
    scores = sorted(name for name in table.column_names if name.startswith(SCORE_PREFIX))
    schema = pa.schema([*_FIXED, *(pa.field(name, pa.float64()) for name in scores)])
    # Columns that were read from Parquet carry its field numbers: the same rows shall make the same file.
    columns = [table[name].cast(field.type) for name, field in zip(schema.names, schema, strict=True)]
    return pa.Table.from_arrays(columns, schema=schema).combine_chunks()
