"""Removing samples from a finished dataset: hidden at once, gone from the tars after compaction.

The identities asked for are kept in ``tombstones.json``: a later prepare leaves the same samples out again.
"""

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.index import IDENTITY_COLUMNS, identity_columns, joined, score_columns
from loomvideo.platform.shards.manifest import MANIFEST_FILE, Manifest, shard_path
from loomvideo.platform.shards.reader import ShardDataset, read_placed
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import publish, read_record, write_shard

TOMBSTONES_FILE = "tombstones.json"


def tombstones(storage: Storage) -> set[str]:
    """Identities that were asked to be removed."""
    if not storage.exists(TOMBSTONES_FILE):
        return set()
    return set(json.loads(storage.read_bytes(TOMBSTONES_FILE))["ids"])


def identities(key: str, group: str, media: Collection[str | None], extra: Mapping[str, Any]) -> set[str]:
    """What a sample can be asked for by: key, group, media paths, and its ``extra.source_id`` or ``extra.sku``."""
    named = identity_columns("", None, (), extra)["source_ids"]
    return {key, *named, *(path for path in media if path)} | ({group} if group else set())


def remove(url: str, ids: Collection[str], known: Iterable[tuple[str, set[str]]] = ()) -> list[str]:
    """Hide every sample that one of the identities names; returns their keys.

    The index says what samples can be asked for by. Of those that it does not say it of, because they were written
    before it did, ``known`` may, and of the rest the shards are read, a request each.

    Args:
        url: The dataset folder.
        ids: Keys, groups, media paths, source ids, SKUs.
        known: Keys with what their samples can be asked for by, as a plan has them.

    Raises:
        UserError: if an identity names no sample.
    """
    dataset = ShardDataset.open(url)
    storage, wanted, index = dataset.storage, set(ids), dataset.whole_index()
    named, matched = _named(index, wanted)
    found = dict(zip(named.column("key").to_pylist(), named.column("shard").to_pylist(), strict=True))
    unsaid = index.filter(pc.is_null(index["media_target"])).select(["key", "shard"])
    shards = dict(zip(unsaid.column("key").to_pylist(), unsaid.column("shard").to_pylist(), strict=True))
    seen: set[str] = set()
    # What is left when all that is known has been looked at is read.
    for key, names in itertools.chain(known, _read_identities(dataset, shards, seen)) if shards else ():
        if key not in shards:
            continue
        seen.add(key)
        hits = wanted & names
        if hits:
            matched |= hits
            found[key] = shards[key]
    unknown = sorted(wanted - matched)
    if unknown:
        raise UserError(f"{url}: no sample has key, group, media path, source_id or sku {unknown[0]!r}")
    text = json.dumps({"ids": sorted(tombstones(storage) | wanted)}, indent=1) + "\n"
    storage.write_bytes(TOMBSTONES_FILE, text.encode())
    index = index.filter(pc.invert(pc.is_in(index.column("key"), pa.array(sorted(found), pa.string()))))
    storage.delete(MANIFEST_FILE)
    publish(storage, _without(dataset, found), [index], score_columns(index.schema))
    return sorted(found)


def _named(index: pa.Table, wanted: Collection[str]) -> tuple[pa.Table, set[str]]:
    """The rows whose columns hold one of the identities, and those of them that any row holds."""
    # An empty group is none.
    ids = pa.array(sorted(name for name in wanted if name), pa.string())
    hit = np.zeros(len(index), bool)
    matched: set[str] = set()
    for name in ("key", "group", *IDENTITY_COLUMNS):
        column = index[name].combine_chunks()
        if pa.types.is_list(column.type):
            rows, values = pc.list_parent_indices(column), pc.list_flatten(column)
        else:
            rows, values = None, column
        found = pc.is_in(values, ids)
        matched |= set(pc.unique(values.filter(found)).to_pylist())
        hit[rows.filter(found).to_numpy() if rows is not None else found.to_numpy(zero_copy_only=False)] = True
    return index.filter(pa.array(hit)), matched


def _read_identities(
    dataset: ShardDataset, keys: Collection[str], seen: Collection[str]
) -> Iterator[tuple[str, set[str]]]:
    """What samples that nobody has seen yet say of themselves in their shards."""
    unseen = [dataset.rows_by_key[key] for key in keys if key not in seen]
    for metadata in dataset.metadata(unseen):
        media = metadata.get("media", {})
        paths = [media.get("target"), media.get("source"), *media.get("references", [])]
        yield metadata["key"], identities(metadata["key"], metadata.get("group", ""), paths, metadata.get("extra", {}))


def _without(dataset: ShardDataset, found: Mapping[str, str]) -> Manifest:
    manifest = dataset.manifest
    lost: dict[str, int] = {}
    counts = {name: dict(count) for name, count in manifest.counts.items()}
    for key, shard in found.items():
        lost[shard] = lost.get(shard, 0) + 1
        name = dataset.index.column("dataset")[dataset.rows_by_key[key]].as_py()
        counts[name]["written"] -= 1
        counts[name]["removed"] = counts[name].get("removed", 0) + 1
    shards = [dataclasses.replace(s, num_samples=s.num_samples - lost.get(s.name, 0)) for s in manifest.shards]
    removed = sorted([*manifest.removed, *([shard, key] for key, shard in found.items())])
    return dataclasses.replace(manifest, shards=shards, counts=counts, removed=removed)


def compact(url: str) -> list[str]:
    """Rewrite the tars that hold removed samples; returns the names of those shards."""
    dataset = ShardDataset.open(url)
    storage, manifest = dataset.storage, dataset.manifest
    if not manifest.removed:
        return []
    affected = manifest.removed_by_shard
    records, index = {}, dataset.whole_index()
    # Without its manifest the folder is no finished dataset while its shards change.
    storage.delete(MANIFEST_FILE)
    for name, keys in affected.items():
        record = read_record(storage, name)
        if record is None:
            raise UserError(f"{url}: shard {name} has no commit record; run `loomvideo data prepare` to rebuild it")
        kept = [row for row in record.rows if row["key"] not in keys]
        records[name] = write_shard(
            storage, name, record.split, _stored(storage, name, kept), record.recipe, record.losses, record.facts
        )
    shards = [records[shard.name].entry if shard.name in records else shard for shard in manifest.shards]
    rows = index.filter(pc.invert(pc.is_in(index.column("shard"), pa.array(sorted(affected)))))
    table = joined([rows, *(record.index for record in records.values())])
    table = table.take(pc.sort_indices(table, [("shard", "ascending"), ("slot", "ascending")]))
    shards = [shard for shard in shards if shard.num_samples]
    publish(storage, dataclasses.replace(manifest, shards=shards, removed=[]), [table], score_columns(table.schema))
    return sorted(affected)


def _stored(storage: Storage, name: str, rows: list[dict[str, Any]]) -> Iterator[tuple[int, ShardSample]]:
    for row in rows:
        yield row["slot"], read_placed(storage, shard_path(name), row, raw=True)
