"""How ranges of shards are asked of an object store, and what that came to; a section of training configurations."""

import dataclasses
from dataclasses import dataclass

from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclass
class ReadingConfig:
    """Reading shards behind URLs; local files are read as they are."""

    gap_bytes: int = option(1_000_000, "ranges of one shard at most so far apart are read in one request")
    cache: str = option("", "folder on each node's own disk that keeps what was read, for all its workers; empty none")
    cache_bytes: int = option(100_000_000_000, "bytes that the cache may take; what was read longest ago goes first")
    hedge: float = option(
        0.95,
        "a request slower than this share of recent ones is sent again, and the first answer counts; 0 never",
    )
    hedge_s: float = option(0.2, "no request is sent again sooner")

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: naming the key.
        """
        if "://" in self.cache:
            raise UserError(f"data.reading.cache={self.cache}: name a folder on the nodes' own disks")
        if not 0 <= self.hedge < 1:
            raise UserError(f"data.reading.hedge={self.hedge}: a share below 1, such as 0.95; 0 never sends again")
        if self.gap_bytes < 0 or self.hedge_s < 0 or self.cache_bytes < 1:
            raise UserError("data.reading: gap_bytes and hedge_s at least 0, cache_bytes at least 1")


@dataclass
class ReadTally:
    """What a process has read of object stores.

    Attributes:
        requests: First requests.
        hedged: Second requests of the same bytes; ``hedges_won`` of them answered first.
        fetched_bytes: Bytes of answers that counted, gaps between ranges included.
        cached_bytes: Bytes that the node's cache had.
        damaged: Entries of the cache that were damaged and fetched again.
    """

    requests: int = 0
    hedged: int = 0
    hedges_won: int = 0
    fetched_bytes: int = 0
    cached_bytes: int = 0
    damaged: int = 0

    def __add__(self, other: "ReadTally") -> "ReadTally":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return ReadTally(*(one + more for one, more in pairs))
