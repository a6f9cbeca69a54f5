"""Removing samples from a finished dataset: hidden at once, gone from the tars after compaction.

The identities asked for are kept in ``tombstones.json``: a later prepare leaves the same samples out again.
"""

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.index import joined, score_columns
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
    named = {str(extra[name]) for name in ("source_id", "sku") if extra.get(name)}
    return {key, *named, *(path for path in media if path)} | ({group} if group else set())


def remove(url: str, ids: Collection[str], known: Iterable[tuple[str, set[str]]] = ()) -> list[str]:
    """Hide every sample that one of the identities names; returns their keys.

    Args:
        url: The dataset folder.
        ids: Keys, groups, media paths, source ids, SKUs.
        known: Keys with what their samples can be asked for by, as a plan has them; of other samples the shards are
            read, a request each.

    Raises:
        UserError: if an identity names no sample.
    """
    dataset = ShardDataset.open(url)
    storage, wanted = dataset.storage, set(ids)
    shards = dict(zip(dataset.index.column("key").to_pylist(), dataset.index.column("shard").to_pylist(), strict=True))
    found: dict[str, str] = {}
    matched: set[str] = set()
    seen: set[str] = set()
    # What is left when all that is known has been looked at is read.
    for key, names in itertools.chain(known, _read_identities(dataset, seen)):
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
    known = json.dumps({"ids": sorted(tombstones(storage) | wanted)}, indent=1) + "\n"
    storage.write_bytes(TOMBSTONES_FILE, known.encode())
    index = dataset.index.filter(pc.invert(pc.is_in(dataset.index.column("key"), pa.array(sorted(found)))))
    storage.delete(MANIFEST_FILE)
    publish(storage, _without(dataset, found), [index], score_columns(index.schema))
    return sorted(found)


def _read_identities(dataset: ShardDataset, seen: Collection[str]) -> Iterator[tuple[str, set[str]]]:
    """What the samples that nobody has seen yet say of themselves in their shards."""
    unseen = [row for key, row in dataset.rows_by_key.items() if key not in seen]
    for row in unseen:
        metadata = dataset.read(row, select=lambda member, name: False).metadata
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
    records = {}
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
    rows = dataset.index.filter(pc.invert(pc.is_in(dataset.index.column("shard"), pa.array(sorted(affected)))))
    table = joined([rows, *(record.index for record in records.values())])
    table = table.take(pc.sort_indices(table, [("shard", "ascending"), ("slot", "ascending")]))
    shards = [shard for shard in shards if shard.num_samples]
    publish(storage, dataclasses.replace(manifest, shards=shards, removed=[]), [table], score_columns(table.schema))
    return sorted(affected)


def _stored(storage: Storage, name: str, rows: list[dict[str, Any]]) -> Iterator[tuple[int, ShardSample]]:
    for row in rows:
        yield row["slot"], read_placed(storage, shard_path(name), row, raw=True)
