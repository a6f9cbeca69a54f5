"""Reading shards of an object store: few requests, a cache that processes share, and slow requests sent again."""

import asyncio
import errno
import multiprocessing
import os
import threading
import time
from collections import Counter
from typing import ClassVar

import fsspec
import pytest
import torch
from fixtures.datasets import make_sample, write_dataset
from fsspec.implementations.memory import MemoryFileSystem

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.cache import NodeCache
from loomvideo.platform.shards.fetch import RangeFetcher
from loomvideo.platform.shards.hedge import Hedge
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.reading import ReadingConfig, ReadTally
from loomvideo.platform.shards.storage import Storage

SAMPLES = [
    make_sample("edit-1", "video_edit", num_windows=2, deterministic=False),
    make_sample("edit-2", "video_edit", latent_shape=(4, 64, 64)),
    make_sample("t2i-1", "t2i", latent_shape=(1, 4, 6)),
]


class CountingStore(MemoryFileSystem):
    """An object store in memory, its requests counted and delayed."""

    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    requests: ClassVar = []
    delay_s = staticmethod(lambda number: 0.0)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.requests.append((path.rsplit("/", 1)[-1], start, end))
        time.sleep(type(self).delay_s(len(self.requests)))
        return super().cat_file(path, start=start, end=end, **kwargs)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("local") / "data", SAMPLES)


@pytest.fixture
def store(local, monkeypatch):
    """URL of the same dataset, and the requests for its tars."""
    fsspec.register_implementation("memory", CountingStore, clobber=True)
    monkeypatch.setattr(CountingStore, "store", {})
    monkeypatch.setattr(CountingStore, "requests", [])
    fs = fsspec.filesystem("memory")
    fs.put(f"{local.storage.root}/", "/data", recursive=True)
    yield "memory://data", CountingStore.requests
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


def opened(url, requests, **settings):
    dataset = ShardDataset.open(url, ReadingConfig(**{"hedge": 0.0} | settings))
    requests.clear()
    return dataset


def same(one, other):
    assert one.metadata == other.metadata
    assert {m: set(t) for m, t in one.tensors.items()} == {m: set(t) for m, t in other.tensors.items()}
    return all(torch.equal(t, other.tensors[m][n]) for m, part in one.tensors.items() for n, t in part.items())


def of_target(member, name):
    return member == "target"


def test_neighbouring_ranges_are_one_request(local, store):
    dataset = opened(*store)
    for row in range(len(local)):
        assert same(dataset.read(row), local.read(row))
    assert len(store[1]) == len(local)
    store[1].clear()
    for row in range(len(local)):
        assert same(dataset.read(row, of_target), local.read(row, of_target))
    assert len(store[1]) == len(local)
    assert dataset.tally().requests == 2 * len(local)


def test_only_the_selected_tensors_of_large_members_are_fetched(local, store):
    dataset = opened(*store, gap_bytes=100)
    row = dataset.rows_by_key["edit-2"]
    assert same(dataset.read(row, of_target), local.read(row, of_target))
    # Source and target are 131 kB each: of the source only its head is read.
    assert 131_072 < dataset.tally().fetched_bytes < 2 * 131_072
    assert local.storage.size("shards/train-000000.tar") > 2 * 131_072


def test_metadata_of_neighbours_is_one_request(local, store):
    dataset = opened(*store)
    rows = [2, 0, 1]
    assert [m["key"] for m in dataset.metadata(rows)] == [SAMPLES[row].key for row in rows]
    assert len(store[1]) == 1


def test_large_ranges_are_asked_for_in_parts(local, store, monkeypatch):
    monkeypatch.setattr("loomvideo.platform.shards.fetch.REQUEST_BYTES", 50_000)
    dataset = opened(*store)
    row = dataset.rows_by_key["edit-2"]
    assert same(dataset.read(row), local.read(row))
    assert max(end - start for _, start, end in store[1]) == 50_000
    assert len(store[1]) > 5


def test_what_was_read_is_kept_on_the_node(local, store, tmp_path):
    url, requests = store
    for expected in (3, 0):
        dataset = opened(url, requests, cache=str(tmp_path / "cache"))
        assert all(same(dataset.read(row), local.read(row)) for row in range(3))
        assert len(requests) == expected
    read = dataset.tally()
    assert (read.requests, read.fetched_bytes) == (0, 0)
    assert read.cached_bytes == sum(dataset.index.column("num_bytes").to_pylist())


@pytest.mark.parametrize("damage", [b"", b"other bytes of no length at all", None])
def test_a_damaged_entry_is_fetched_again(local, store, tmp_path, damage):
    url, requests = store
    opened(url, requests, cache=str(tmp_path)).read(0)
    (entry,) = (path for path in (tmp_path / "entries").glob("*/*"))
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    dataset = opened(url, requests, cache=str(tmp_path))
    assert same(dataset.read(0), local.read(0))
    assert (len(requests), dataset.tally().damaged, entry.read_bytes()) == (1, 1, whole)
    assert same(dataset.read(0), local.read(0))
    assert len(requests) == 1


def test_shards_that_change_are_not_mistaken(tmp_path, store):
    url, requests = store
    config = ReadingConfig(cache=str(tmp_path), hedge=0.0)
    path = "shards/train-000000.tar"
    for digest in ("a", "b"):
        requests.clear()
        RangeFetcher(Storage(url), config, {path: digest}).read_ranges(path, [(0, 10)])
        assert len(requests) == 1


def test_the_cache_keeps_its_bound_and_what_was_read_last(tmp_path):
    cache = NodeCache(tmp_path, 40_000)
    data = memoryview(bytes(1_000))
    for number in range(200):
        cache.get(f"entry {number}", 1_000, lambda: data)
        assert cache.get("favourite", 1_000, lambda: data)[0] == data
        os.utime(cache._path(cache_key("favourite")), (2e9, 2e9))
        assert cache.num_bytes() <= 40_000
    files = list((tmp_path / "entries").glob("*/*"))
    assert sum(file.stat().st_size for file in files) == cache.num_bytes() > 30_000
    assert cache.get("favourite", 1_000, lambda: data)[1]
    (tmp_path / "counts").write_bytes(b"torn")
    assert NodeCache(tmp_path, 40_000).num_bytes() == sum(file.stat().st_size for file in files)
    cache.get("larger than the cache", 50_000, lambda: memoryview(bytes(50_000)))
    assert cache.num_bytes() <= 40_000


def cache_key(name):
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()[:40]


def use_cache(folder, seed, fetched):
    cache = NodeCache(folder, 20_000)
    for number in range(60):
        name = (number * (7 + 2 * seed)) % 30

        def fetch(name=name):
            fetched.put(name)
            return memoryview(bytes([name]) * 900)

        assert cache.get(f"range {name}", 900, fetch)[0] == bytes([name]) * 900


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    fetched = context.Queue()
    workers = [context.Process(target=use_cache, args=(tmp_path, seed, fetched)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    left = sum(file.stat().st_size for file in (tmp_path / "entries").glob("*/*"))
    assert 0 < left == NodeCache(tmp_path, 20_000).num_bytes() <= 20_000


def test_two_that_want_the_same_range_fetch_it_once(tmp_path):
    cache, fetched = NodeCache(tmp_path, 10_000), Counter()

    def fetch():
        fetched["times"] += 1
        time.sleep(0.05)
        return memoryview(b"12345")

    threads = [threading.Thread(target=cache.get, args=("range", 5, fetch)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched["times"] == 1


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.reading\.cache=.*cannot be written"):
        NodeCache(tmp_path / "file", 1)
    cache = NodeCache(tmp_path / "cache", 1_000)
    (tmp_path / "cache" / "entries").rmdir()
    assert cache.get("range", 2, lambda: memoryview(b"ab")) == (memoryview(b"ab"), False)


def test_a_slow_request_is_sent_again_and_the_first_answer_counts(local, store, monkeypatch):
    url, requests = store
    dataset = opened(url, requests, hedge=0.9, hedge_s=0.01)
    read, answered = threading.Event(), []

    def delay_s(number):
        if number == 1:
            answered.append(read.wait(60))
        return 0.0

    monkeypatch.setattr(CountingStore, "delay_s", staticmethod(delay_s))
    assert same(dataset.read(0), local.read(0))
    assert answered == []
    read.set()
    assert dataset.tally() == ReadTally(1, 1, 1, fetched_bytes=dataset.tally().fetched_bytes)
    assert len(requests) == 2


def test_when_second_requests_are_sent():
    hedge = Hedge(0.9, 0.1)
    assert hedge.wait_s(1000) == 1.0
    for number in range(100):
        hedge._note(1000, (number + 1) / 10, won=False)
    assert hedge.wait_s(1000) == pytest.approx(9.1)
    assert hedge.wait_s(10**7) == 1.0
    hedge.num_requests, hedge.num_second = 10, 2
    assert hedge.wait_s(1000) is None
    assert Hedge(0.0, 0.1).wait_s(1000) is None


def test_an_error_counts_when_both_fail():
    hedge, asked = Hedge(0.9, 0.001), []

    async def ask():
        asked.append(0)
        await asyncio.sleep(0.05)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(hedge.first(ask, 10))
    assert len(asked) == 2


def test_a_missing_and_a_short_shard(store):
    dataset = opened(*store)
    fs = fsspec.filesystem("memory")
    whole = fs.cat_file("/data/shards/train-000000.tar")
    fs.pipe_file("/data/shards/train-000000.tar", whole[:5000])
    with pytest.raises(UserError, match=r"train-000000\.tar: wanted .* file gave"):
        dataset.read(2)
    fs.rm_file("/data/shards/train-000000.tar")
    with pytest.raises(UserError, match=r"train-000000\.tar: no such file"):
        dataset.read(0)


def test_settings_that_cannot_be():
    for settings, message in (
        ({"cache": "s3://bucket"}, "own disks"),
        ({"hedge": 1.0}, "below 1"),
        ({"cache_bytes": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            ReadingConfig(**settings).check()


def test_a_cache_that_cannot_be_written_is_said_once_and_costs_no_read(tmp_path, monkeypatch, caplog):
    cache = NodeCache(tmp_path, 1000)

    def full(key, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_keep", full)
    for number in range(3):
        data, was_there = cache.get(str(number), 4, lambda: memoryview(b"abcd"))
        assert (bytes(data), was_there) == (b"abcd", False)
    assert caplog.text.count("not written ([Errno 28] No space left on device)") == 1
