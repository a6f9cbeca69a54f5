"""Which shard and slot every sample gets, decided before any work and from the samples alone."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loomvideo.platform.shards.manifest import shard_name


@dataclass(frozen=True)
class PlanItem:
    """A sample to place: its key, split and estimated size."""

    key: str
    split: str
    num_bytes: int


@dataclass(frozen=True)
class PlannedShard:
    """A shard and its samples; position is slot."""

    name: str
    split: str
    keys: tuple[str, ...]


def plan_shards(items: Iterable[PlanItem], target_bytes: int, max_samples: int, seed: int) -> list[PlannedShard]:
    """Deal samples into shards in a seeded order.

    A sample's shard is its hash scaled to the number of shards of its split, and its slot is its rank by hash. So the
    order is shuffled once for all, nothing depends on the order of the input or on workers, and adding or removing a
    sample changes one shard (unless it changes the number of shards). Sizes scatter around the target as random
    dealing does.

    Args:
        items: Keys must be unique.
        target_bytes: Size aimed at for a shard.
        max_samples: Samples aimed at for a shard at most.
        seed: Another seed, another order.
    """
    by_split: dict[str, list[PlanItem]] = {}
    for item in items:
        by_split.setdefault(item.split, []).append(item)
    shards = []
    for split in sorted(by_split):
        members = by_split[split]
        num_shards = max(
            math.ceil(sum(item.num_bytes for item in members) / target_bytes), math.ceil(len(members) / max_samples), 1
        )
        dealt: list[list[tuple[float, str]]] = [[] for _ in range(num_shards)]
        for item in members:
            rank = _rank(seed, item.key)
            dealt[int(rank * num_shards)].append((rank, item.key))
        shards += [
            PlannedShard(shard_name(split, number), split, tuple(key for _, key in sorted(part)))
            for number, part in enumerate(dealt)
            if part
        ]
    return shards


def digest(*parts: object) -> str:
    """A short hash over the text of the parts, for fingerprints and recipes."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:16]


def digest_lines(lines: Sequence[str]) -> str:
    """SHA-256 over lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _rank(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "big") / 2**48
