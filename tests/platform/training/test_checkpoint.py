import errno
import threading
import time
from pathlib import Path

import pytest
import torch
from fixtures.object_store import s3_bucket
from safetensors.torch import load_file

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.config import CheckpointConfig
from loomvideo.platform.training.slice_file import HostBuffer
from loomvideo.platform.training.writer import CheckpointWriter

WEIGHT = torch.arange(10, dtype=torch.float32)


def write(folder, step, world_size=2):
    """A checkpoint of one parameter of 10 elements, cut into ``world_size`` slices."""
    length = -(-10 // world_size)
    for rank in range(world_size):
        start, stop = rank * length, min(10, (rank + 1) * length)
        tensors = {"master/w": WEIGHT[start:stop].clone(), "ema/w": -WEIGHT[start:stop]}
        folder.write_rank(step, rank, world_size, HostBuffer().fill(tensors, {"w": [start, stop]}))
    return folder.commit(step, world_size, {"step": step, "shapes": {"w": [2, 5]}})


WHOLE = {"master/w": WEIGHT.clone()}, {"w": [0, 10]}


def end_of(writer):
    """Wait for a writer as the training loop does; returns its error."""
    while writer.busy:
        time.sleep(0.01)
    return writer.finish(writer.failed)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_slices_of_any_world_size_read_back(tmp_path, world_size):
    checkpoint = write(CheckpointFolder(tmp_path), 5, world_size)
    assert torch.equal(checkpoint.read("master", "w", 3, 9), WEIGHT[3:9])
    assert torch.equal(checkpoint.weights("ema")["w"], -WEIGHT.reshape(2, 5))
    assert checkpoint.read("exp_avg", "w", 0, 10) is None
    with pytest.raises(UserError, match="holds no exp_avg weights; it has master, ema"):
        checkpoint.weights("exp_avg")


def test_uncommitted_checkpoints_do_not_exist(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.write_rank(7, 0, 2, HostBuffer().fill(*WHOLE))
    assert folder.steps() == []
    assert folder.newest() is None
    cancelled = threading.Event()
    cancelled.set()
    assert folder.commit(7, 2, {}, cancelled) is None
    folder.discard(7)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no checkpoint"):
        folder.open()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_found_and_the_checkpoint_before_is_taken(tmp_path, damage, caplog):
    folder = CheckpointFolder(tmp_path)
    write(folder, 1)
    path = Path(write(folder, 2).url) / "rank-00001-of-00002.safetensors"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "remove":
        path.unlink()
    else:
        (path.parent / "manifest.json").write_text("{")
    with pytest.raises(DamagedCheckpoint):
        Checkpoint(path.parent).verify()
    assert folder.newest().step == 1
    assert "passed over" in caplog.text


def test_rotation_keeps_last_every_and_named(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in range(1, 9):
        write(folder, step)
    removed = folder.rotate(keep_last=2, keep_every=4, keep=[3])
    assert folder.steps() == [3, 4, 7, 8]
    assert removed == [1, 2, 5, 6]


def test_only_what_was_not_committed_is_cleared(tmp_path):
    folder = CheckpointFolder(tmp_path)
    write(folder, 1)
    folder.write_rank(2, 0, 2, HostBuffer().fill(*WHOLE))
    folder.clear_unfinished()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_is_said_and_gives_its_room_back(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    writer = CheckpointWriter(folder, CheckpointConfig(), 0, 1)
    write_rank = folder.write_rank

    def full(step, *arguments):
        write_rank(step, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    before = writer.whole_since
    monkeypatch.setattr(folder, "write_rank", full)
    writer.write(3, {"master/w": WEIGHT}, {"w": [0, 10]}, {"step": 3, "shapes": {"w": [10]}})
    assert "No space left on device" in end_of(writer)
    assert list(tmp_path.iterdir()) == []
    assert writer.whole_since == before
    monkeypatch.undo()
    writer.write(4, {"master/w": WEIGHT}, {"w": [0, 10]}, {"step": 4, "shapes": {"w": [10]}})
    assert end_of(writer) == ""
    assert folder.steps() == [4]
    assert writer.whole_since > before


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path):
    """URL of an empty folder on each kind of store that gives a file whole or not at all (fsspec's memory does not)."""
    if request.param == "file":
        yield f"file://{tmp_path}"
        return
    with s3_bucket("checkpoints-test") as url:
        yield url


def test_every_store_keeps_checkpoints_alike(store):
    """Written by two ranks beside each other, committed, kept, removed, read back and checked, without a rename."""
    folder = CheckpointFolder(f"{store}/pretrain/one/checkpoints")
    assert folder.steps() == []
    writers = [CheckpointWriter(folder, CheckpointConfig(keep_last=2), rank, 2, "attempt") for rank in range(2)]
    for step in (1, 2, 3):
        for rank, writer in enumerate(writers):
            part = WEIGHT[5 * rank : 5 * rank + 5] * step
            state = {"step": step, "shapes": {"w": [2, 5]}}
            writer.write(step, {"master/w": part, "ema/w": -part}, {"w": [5 * rank, 5 * rank + 5]}, state)
        assert [end_of(writer) for writer in reversed(writers)] == ["", ""]
    assert folder.steps() == [2, 3]
    checkpoint = CheckpointFolder(folder.url).newest()
    assert torch.equal(checkpoint.read("master", "w", 3, 9), 3 * WEIGHT[3:9])
    assert torch.equal(checkpoint.weights("ema")["w"], -3 * WEIGHT.reshape(2, 5))
    name = checkpoint.storage.full_path("rank-00001-of-00002.safetensors")
    content = bytearray(checkpoint.storage.fs.cat_file(name))
    content[-1] ^= 1
    checkpoint.storage.fs.pipe_file(name, bytes(content))
    assert CheckpointFolder(folder.url).newest().step == 2
    folder.write_rank(9, 0, 2, HostBuffer().fill(*WHOLE))
    folder.clear_unfinished()
    folder.discard(3)
    left = [path for path in folder.storage.fs.find(folder.storage.full_path("")) if "step-" in path]
    assert {path.rsplit("/", 2)[1] for path in left} == {"step-00000002"}
    assert len(left) == 4


def test_a_ranks_file_is_plain_safetensors(tmp_path):
    write(CheckpointFolder(tmp_path), 1)
    read = load_file(tmp_path / "step-00000001" / "rank-00001-of-00002.safetensors")
    assert torch.equal(read["master/w"], WEIGHT[5:])


class SlowFolder(CheckpointFolder):
    """Writes nothing of step 1 before it is told to."""

    def __init__(self, url):
        super().__init__(url)
        self.may_write = threading.Event()

    def write_rank(self, step, rank, world_size, content, attempt="", progress=lambda num_bytes: None):
        if step == 1:
            self.may_write.wait()
        super().write_rank(step, rank, world_size, content, attempt, progress)


def test_an_urgent_checkpoint_does_not_wait_for_an_older_one(tmp_path):
    folder = SlowFolder(tmp_path)
    writer = CheckpointWriter(folder, CheckpointConfig(), 0, 1)
    writer.write(1, *WHOLE, {"step": 1, "shapes": {"w": [10]}})
    slow = writer._now.thread
    assert writer.busy
    writer.abandon()
    assert not writer.pending
    writer.write(2, {"master/w": 2 * WEIGHT}, {"w": [0, 10]}, {"step": 2, "shapes": {"w": [10]}})
    assert end_of(writer) == ""
    folder.may_write.set()
    slow.join()
    assert folder.steps() == [2]
    assert torch.equal(folder.open().weights()["w"], 2 * WEIGHT)


def test_memory_is_reused_and_the_weights_may_change_meanwhile(tmp_path):
    folder = SlowFolder(tmp_path)
    writer = CheckpointWriter(folder, CheckpointConfig(), 0, 1)
    weight = WEIGHT.clone()
    writer.write(1, {"master/w": weight}, {"w": [0, 10]}, {"step": 1, "shapes": {"w": [10]}})
    weight.zero_()
    place = writer._buffer._bytes.data_ptr()
    folder.may_write.set()
    assert end_of(writer) == ""
    assert torch.equal(folder.open().weights()["w"], WEIGHT)
    writer.write(2, {"master/w": weight}, {"w": [0, 10]}, {"step": 2, "shapes": {"w": [10]}})
    assert end_of(writer) == ""
    assert writer._buffer._bytes.data_ptr() == place


def test_notes_of_an_attempt_before_are_not_taken_for_this_one(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.write_rank(1, 1, 2, HostBuffer().fill(*WHOLE), "before")
    folder.write_rank(1, 0, 2, HostBuffer().fill(*WHOLE), "now")
    cancelled = threading.Event()
    cancelled.set()
    assert folder.commit(1, 2, {}, cancelled, "now") is None
    assert folder.steps() == []


def test_trouble_with_old_checkpoints_does_not_lose_the_new_one(tmp_path, monkeypatch, caplog):
    folder = CheckpointFolder(tmp_path)
    writer = CheckpointWriter(folder, CheckpointConfig(), 0, 1)

    def refused(*arguments):
        raise PermissionError("not yours")

    monkeypatch.setattr(folder, "rotate", refused)
    writer.write(1, *WHOLE, {"step": 1, "shapes": {"w": [10]}})
    assert end_of(writer) == ""
    assert folder.steps() == [1]
    assert "old checkpoints were not removed: not yours" in caplog.text
