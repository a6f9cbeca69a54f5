"""Which shard and slot every sample gets, decided before any work and from the samples alone."""

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loomvideo.platform.shards.manifest import shard_name


@dataclass(frozen=True)
class PlannedShard:
    """A shard and its samples.

    Attributes:
        name: The name of the shard.
        split: The split of its samples.
        rows: Positions of its samples in what was dealt, in slot order.
    """

    name: str
    split: str
    rows: np.ndarray


def plan_shards(
    keys: Sequence[str],
    splits: Sequence[str],
    num_bytes: Sequence[int],
    target_bytes: int,
    max_samples: int,
    seed: int,
    placed: Sequence[str | None] | None = None,
    taken: Collection[str] = (),
) -> list[PlannedShard]:
    """Deal samples into shards in a seeded order.

    Samples that an earlier plan placed stay in their shard as long as they are of its split. The others are dealt into
    new shards: a sample's shard is its hash scaled to the number of new shards of its split. Its slot is its rank by
    hash in its shard. So the order is shuffled, nothing depends on the order of the input or on workers, and what is
    added or removed moves nothing else. Sizes scatter around the target as random dealing does.

    Args:
        keys: Unique.
        splits: The split of each sample.
        num_bytes: Estimated size of each sample.
        target_bytes: Size aimed at for a shard.
        max_samples: Samples aimed at for a shard at most.
        seed: Another seed, another order.
        placed: Shard of each sample in an earlier plan, None for new ones.
        taken: Names of earlier shards, not given to new ones.
    """
    ranks = np.fromiter((_rank(seed, key) for key in keys), np.float64, len(keys))
    members: dict[str, list[int]] = {}
    fresh: dict[str, list[int]] = {}
    for row, split in enumerate(splits):
        name = placed[row] if placed is not None else None
        if name is not None and name.rpartition("-")[0] == split:
            members.setdefault(name, []).append(row)
        else:
            fresh.setdefault(split, []).append(row)
    split_of = {name: splits[rows[0]] for name, rows in members.items()}
    for split, rows in fresh.items():
        used = [int(name.rpartition("-")[2]) for name in {*taken, *members} if name.rpartition("-")[0] == split]
        first = max(used, default=-1) + 1
        size = int(np.asarray(num_bytes)[rows].sum())
        num_shards = max(math.ceil(size / target_bytes), math.ceil(len(rows) / max_samples), 1)
        for row in rows:
            name = shard_name(split, first + int(ranks[row] * num_shards))
            members.setdefault(name, []).append(row)
            split_of[name] = split
    return [PlannedShard(name, split_of[name], _in_order(members[name], ranks, keys)) for name in sorted(members)]


def _in_order(rows: list[int], ranks: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    return np.array(sorted(rows, key=lambda row: (ranks[row], keys[row])), np.int64)


def digest(*parts: object) -> str:
    """A short hash over the text of the parts, for fingerprints and recipes."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:16]


def digest_unordered(lines: Iterable[str]) -> str:
    """SHA-256 over lines whatever their order; 64 bytes of memory a line."""
    hashes = bytearray()
    for line in lines:
        hashes += hashlib.sha256(line.encode()).digest()
    # Fixed-width bytes sort as whole digests do; objects would take three times the memory.
    return hashlib.sha256(np.sort(np.frombuffer(hashes, "S32")).tobytes()).hexdigest()


def _rank(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "big") / 2**48
