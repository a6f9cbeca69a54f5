"""Ranges of shards from an object store: neighbours together, through the node's cache, with hedged requests."""

from __future__ import annotations

import asyncio
import bisect
import errno
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.utils import merge_offset_ranges

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.cache import NodeCache
from loomvideo.platform.shards.hedge import Hedge
from loomvideo.platform.shards.reading import ReadingConfig, ReadTally
from loomvideo.platform.shards.storage import Storage

REQUEST_BYTES = 16_000_000
"""More is asked for in several requests at once: one connection gives 50 to 100 MB/s."""


class RangeFetcher:
    """Reads byte ranges of the files of a remote folder; thread-safe.

    Args:
        storage: The folder.
        config: Gap, cache and hedging.
        digests: ``{path: checksum}`` of files that may be kept in the cache; others are not.
    """

    def __init__(self, storage: Storage, config: ReadingConfig, digests: Mapping[str, str]):
        self.storage, self.url, self.config = storage, storage.url, config
        self._digests = digests
        self._fs: AsyncFileSystem = _asynchronous(storage.fs)
        self._cache = NodeCache(config.cache, config.cache_bytes) if config.cache else None
        self._hedge = Hedge(config.hedge, config.hedge_s)
        self._fetched_bytes = self._cached_bytes = 0
        self._lock = threading.Lock()

    @property
    def whole_bytes(self) -> int:
        """Members up to this size are read whole at once: their beginnings would be joined over the gap in any case."""
        return self.config.gap_bytes

    def tally(self) -> ReadTally:
        """What was read so far."""
        damaged = self._cache.num_damaged if self._cache else 0
        hedge = self._hedge
        return ReadTally(
            hedge.num_requests, hedge.num_second, hedge.num_won, self._fetched_bytes, self._cached_bytes, damaged
        )

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytearray | memoryview]:
        """Read ``(start, size)`` ranges of one file into memory that may be written.

        Raises:
            UserError: if the file is missing or ends before a range does.
        """
        _, starts, ends = merge_offset_ranges(
            [path] * len(ranges),
            [start for start, _ in ranges],
            [start + size for start, size in ranges],
            max_gap=self.config.gap_bytes,
        )
        blocks = [self._block(path, start, end - start) for start, end in zip(starts, ends, strict=True)]
        parts = []
        for start, size in ranges:
            number = bisect.bisect_right(starts, start) - 1
            parts.append(blocks[number][start - starts[number] :][:size])
        return parts

    def _block(self, path: str, start: int, size: int) -> memoryview:
        fetch = functools.partial(self._fetch, path, start, size)
        digest = self._digests.get(path)
        if self._cache is None or not digest:
            return fetch()
        data, was_there = self._cache.get(f"{digest} {start} {size}", size, fetch)
        if was_there:
            with self._lock:
                self._cached_bytes += size
        return data

    def _fetch(self, path: str, start: int, size: int) -> memoryview:
        data = memoryview(np.empty(size, np.uint8))
        parts = [(first, min(first + REQUEST_BYTES, size)) for first in range(0, size, REQUEST_BYTES)]
        name = self.storage.full_path(path)

        async def ask(begin: int, end: int) -> None:
            request = functools.partial(self._fs._cat_file, name, start=start + begin, end=start + end)
            try:
                answer = await self._hedge.first(request, end - begin)
            except FileNotFoundError as error:
                raise UserError(f"{self.url}/{path}: no such file") from error
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # What S3's client makes of a range behind the end; asking again would not help.
                answer = b""
            if len(answer) != end - begin:
                raise UserError(f"{self.url}/{path}: wanted {size} bytes at {start}, file gave {begin + len(answer)}")
            data[begin:end] = answer

        async def ask_all() -> Any:
            return await asyncio.gather(*(ask(begin, end) for begin, end in parts))

        self.storage.patiently(sync, self._fs.loop, ask_all)
        with self._lock:
            self._fetched_bytes += size
        return data


def _asynchronous(fs: Any) -> AsyncFileSystem:
    """The file system, or a wrapper that calls it in threads."""
    return fs if fs.async_impl else AsyncFileSystemWrapper(fs, asynchronous=False)
