"""Shard format: bytes, index, range reads, commit protocol, read-back by other libraries."""

import errno
import json
import tarfile
import threading

import pyarrow.compute as pc
import pytest
import safetensors.torch
import torch
from fixtures.datasets import make_sample, write_dataset

from loomvideo.platform.errors import UserError, of_the_disk
from loomvideo.platform.shards import tensors as st
from loomvideo.platform.shards.manifest import check_counts
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import read_record, write_shard

SAMPLES = [
    make_sample("edit-1", "video_edit", num_windows=2, deterministic=False),
    make_sample("t2i-1", "t2i", latent_shape=(1, 4, 6)),
    make_sample("ref-1", "ref_edit", num_references=2),
    make_sample("mi2v-1", "mi2v", num_references=1, split="heldout"),
    make_sample("edit-2", "image_edit", latent_shape=(1, 2, 2)),
]


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data", SAMPLES, samples_per_shard=2)


def assert_same(one, other):
    assert one.key == other.key
    assert one.metadata == other.metadata
    assert {m: set(t) for m, t in one.tensors.items()} == {m: set(t) for m, t in other.tensors.items()}
    for member, tensors in one.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[member][name]), (member, name)


def test_every_sample_reads_back(dataset):
    assert len(dataset) == len(SAMPLES)
    for sample in SAMPLES:
        assert_same(dataset.read(dataset.rows_by_key[sample.key]), sample)


def test_selected_tensors_only(dataset):
    row = dataset.rows_by_key["edit-1"]
    sample = dataset.read(row, select=lambda member, name: name in ("mean.1", "full.1"))
    assert {m: set(t) for m, t in sample.tensors.items()} == {
        "target": {"mean.1"},
        "source": {"mean.1"},
        "mllm": {"full.1"},
    }
    assert torch.equal(sample.tensors["mllm"]["full.1"], SAMPLES[0].tensors["mllm"]["full.1"])


def test_index_describes_samples(dataset):
    table = dataset.index
    row = {name: table.column(name)[dataset.rows_by_key["ref-1"]].as_py() for name in table.column_names}
    assert (row["shard"], row["slot"], row["task"], row["split"]) == ("train-000001", 0, "ref_edit", "train")
    assert (row["width"], row["height"], row["num_frames"], row["dit_tokens"]) == (64, 64, 5, 4 * 4)
    assert table.filter(pc.field("split") == "heldout").column("shard").to_pylist() == ["heldout-000000"]


def test_shared_tensors_and_digest(dataset, tmp_path):
    assert dataset.shared()["null"].shape == (2, 3, 8)
    again = write_dataset(tmp_path / "again", SAMPLES, samples_per_shard=2)
    assert again.digest == dataset.digest
    other = write_dataset(tmp_path / "other", SAMPLES[:-1], samples_per_shard=2)
    assert other.digest != dataset.digest


def test_rerun_gives_the_same_bytes(dataset, tmp_path):
    write_dataset(tmp_path / "again", SAMPLES, samples_per_shard=2)
    files = sorted(p.relative_to(tmp_path / "data") for p in (tmp_path / "data").rglob("*") if p.is_file())
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "data" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_plain_tarfile_and_safetensors_read_it(dataset, tmp_path):
    with tarfile.open(tmp_path / "data/shards/train-000000.tar") as tar:
        members = tar.getmembers()
        names = [m.name for m in members]
        assert names == [
            "edit-1.json",
            "edit-1.mllm.safetensors",
            "edit-1.source.safetensors",
            "edit-1.target.safetensors",
            "t2i-1.json",
            "t2i-1.mllm.safetensors",
            "t2i-1.target.safetensors",
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        loaded = safetensors.torch.load(tar.extractfile("edit-1.target.safetensors").read())
        assert torch.equal(loaded["std.1"], SAMPLES[0].tensors["target"]["std.1"])
        assert json.load(tar.extractfile("t2i-1.json")) == SAMPLES[1].metadata
    assert (tmp_path / "data/shards/train-000000.tar").read_bytes()[257:265] == b"ustar\x0000"


def test_plain_webdataset_reads_it(dataset, tmp_path):
    import webdataset

    urls = [str(p) for p in sorted((tmp_path / "data/shards").glob("*.tar"))]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sorted(row["__key__"] for row in rows) == sorted(s.key for s in SAMPLES)
    by_key = {row["__key__"]: row for row in rows}
    loaded = safetensors.torch.load(by_key["ref-1"]["refs.safetensors"])
    assert torch.equal(loaded["mean.1"], SAMPLES[2].tensors["refs"]["mean.1"])


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.float16],
)
def test_tensor_bytes_match_the_library(dtype):
    tensors = {"b": torch.arange(6).reshape(2, 3).to(dtype), "a": torch.ones(3).to(dtype), "e": torch.zeros(0, 2)}
    chunks, size = st.serialized(tensors)
    data = b"".join(chunks)
    assert len(data) == size
    for loaded in (safetensors.torch.load(data), st.parse(safetensors.torch.save(tensors)), st.parse(data)):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert torch.equal(loaded[name].float(), tensor.float())


def test_parallel_reads(dataset):
    errors = []

    def work():
        try:
            for _ in range(20):
                for sample in SAMPLES:
                    assert_same(dataset.read(dataset.rows_by_key[sample.key]), sample)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_failing_stream_leaves_nothing(tmp_path):
    def stream():
        yield 0, SAMPLES[0]
        raise RuntimeError("encoder died")

    storage = Storage(tmp_path)
    with pytest.raises(RuntimeError, match="encoder died"):
        write_shard(storage, "train-000000", "train", stream())
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_rewritten_shard_has_no_record_of_the_old_bytes(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    write_shard(storage, "train-000000", "train", [(0, SAMPLES[0])], recipe="old")
    assert read_record(storage, "train-000000").recipe == "old"
    original = Storage.write_bytes

    def killed(self, path, data):
        if path.startswith("work/records/train-000000.new"):
            raise KeyboardInterrupt
        original(self, path, data)

    monkeypatch.setattr(Storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(storage, "train-000000", "train", [(0, SAMPLES[1])], recipe="new")
    assert read_record(storage, "train-000000") is None


def test_repeated_keys_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="'edit-1' was written twice"):
        write_dataset(tmp_path, [SAMPLES[0], SAMPLES[0]])


@pytest.mark.parametrize("key", ["a.b", "", "ä", "x" * 81, "a/b"])
def test_bad_keys_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="sample key"):
        write_dataset(tmp_path, [make_sample(key)])


def test_counts_must_add_up():
    check_counts({"a": {"inputs": 3, "written": 2, "filtered": 1}})
    with pytest.raises(RuntimeError, match=r"'a': 3 inputs but 1 written \+ 1 filtered = 2"):
        check_counts({"a": {"inputs": 3, "written": 1, "filtered": 1}})


def test_a_closed_folder_is_not_taken_for_an_empty_one(dataset, tmp_path, monkeypatch):
    """Another user's umask of 077 closes it, to all but root."""

    def closed(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.info", lambda self, path, **options: closed(path))
    with pytest.raises(PermissionError) as caught:
        ShardDataset.open(tmp_path / "data")
    assert f"{tmp_path}/data/manifest.json: permission denied; give yourself access" in str(of_the_disk(caught.value))


def test_unfinished_or_damaged_folders_are_named(dataset, tmp_path):
    with pytest.raises(UserError, match="no finished dataset"):
        ShardDataset.open(tmp_path / "nothing")
    tar = tmp_path / "data/shards/train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    fresh = ShardDataset.open(tmp_path / "data")
    with pytest.raises(UserError, match=r"train-000000.tar: wanted \d+ bytes"):
        fresh.read(fresh.rows_by_key["t2i-1"])
    (tmp_path / "data/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest.json: not a dataset manifest"):
        ShardDataset.open(tmp_path / "data")


def test_memory_file_system(tmp_path):
    dataset = write_dataset("memory://shards-test", SAMPLES, samples_per_shard=3)
    for sample in SAMPLES:
        assert_same(dataset.read(dataset.rows_by_key[sample.key]), sample)
        picked = dataset.read(dataset.rows_by_key[sample.key], select=lambda member, name: member == "target")
        assert list(picked.tensors) == ["target"]
    local = write_dataset(tmp_path, SAMPLES, samples_per_shard=3)
    assert local.digest == dataset.digest


def test_a_remote_store_that_fails_for_a_while_is_asked_again(monkeypatch):
    storage = Storage("memory://flaky")
    storage.write_bytes("a", b"0123")
    waited, errors = [], [OSError(121, "internal error")] * 3
    monkeypatch.setattr("loomvideo.platform.shards.storage.time.sleep", waited.append)
    read = storage.fs.cat_ranges

    def flaky(*arguments, **options):
        if errors:
            raise errors.pop()
        return read(*arguments, **options)

    monkeypatch.setattr(storage.fs, "cat_ranges", flaky)
    assert storage.read_ranges("a", [(1, 2)]) == [b"12"]
    assert waited == [1.0, 2.0, 4.0]
    errors += [OSError(121, "internal error")] * 20
    with pytest.raises(OSError, match="internal error"):
        storage.read_ranges("a", [(1, 2)])
    assert sum(waited[3:]) == 120.0
    errors[:] = [PermissionError("no")]
    with pytest.raises(PermissionError):
        storage.read_ranges("a", [(1, 2)])
    assert storage.size("b") is None
    assert len(waited) == 10
