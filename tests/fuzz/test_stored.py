"""Random bit flips and cuts in finished datasets and checkpoints: what is there, or one line that names the file."""

import json
import shutil

import pytest

pytest.importorskip("hypothesis", reason="pip install 'loomvideo[dev]'")
import torch
from fixtures.damage import damaged
from fixtures.datasets import make_sample, write_dataset
from hypothesis import given
from hypothesis import strategies as st

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.manifest import Manifest
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import read_record
from loomvideo.platform.training.checkpoint import Checkpoint, DamagedCheckpoint
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.slice_file import HostBuffer

WEIGHT = torch.arange(10, dtype=torch.float32)
SAMPLES = [make_sample(f"s-{n}", task, latent_shape=(1, 2, 2)) for n, task in enumerate(("t2i", "video_edit", "t2v"))]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("d") / "data"
    write_dataset(folder, SAMPLES, samples_per_shard=2)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = CheckpointFolder(tmp_path_factory.mktemp("c"))
    tensors = {"master/w": WEIGHT, "ema/w": -WEIGHT}
    folder.write_rank(5, 0, 1, HostBuffer().fill(tensors, {"w": [0, 10]}))
    return folder.commit(5, 1, {"step": 5, "shapes": {"w": [2, 5]}}).storage.root


def spoilt(fresh, folder, data):
    """A copy of a folder with one file damaged; the folder and the file."""
    copy = shutil.copytree(folder, fresh() / "copy")
    file = data.draw(st.sampled_from(sorted(file for file in copy.rglob("*") if file.is_file())))
    file.write_bytes(damaged(data, file.read_bytes()))
    return copy, file


@given(st.data())
def test_datasets(fresh, dataset, data):
    copy, file = spoilt(fresh, dataset, data)
    chosen = data.draw(st.sampled_from([None, lambda member, name: member == "target"]))
    try:
        opened = ShardDataset.open(copy)
        opened.shared()
        for row in range(len(opened)):
            opened.read(row, chosen)
    except UserError as error:
        assert str(copy) in str(error)
        assert "\n" not in str(error)
    for shard in ("train-000000", "train-000001"):
        try:
            read_record(Storage(copy), shard)
        except UserError as error:
            assert str(file) in str(error)


@given(st.data())
def test_checkpoints(fresh, checkpoint, data):
    copy, _ = spoilt(fresh, checkpoint, data)
    try:
        opened = Checkpoint(copy)
        assert (opened.step, opened.num_bytes) != (None, None)
        opened.weights("ema")["w"]
    except UserError as error:
        assert str(copy) in str(error)
    try:
        whole = Checkpoint(copy)
        whole.verify()
    except DamagedCheckpoint as damage:
        assert str(copy) in str(damage)
    else:
        # The hashes find every damage but one of the manifest that leaves it a manifest.
        assert torch.equal(whole.weights()["w"], WEIGHT.reshape(2, 5))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    st.sampled_from(["", "shards", "config", "counts", "digest", "removed", "recipe"]),
)
def test_manifests(value, key):
    content = {**json.loads(Manifest([]).to_json()), key: value} if key else value
    try:
        manifest = Manifest.from_json(json.dumps(content), "m.json")
    except UserError as error:
        assert "m.json" in str(error)
    else:
        assert manifest.num_samples == 0
