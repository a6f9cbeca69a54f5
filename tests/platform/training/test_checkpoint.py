import errno
import threading
import time
from pathlib import Path

import pytest
import torch

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.checkpoint import Checkpoint, CheckpointFolder, DamagedCheckpoint
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
