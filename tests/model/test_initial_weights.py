import dataclasses
import shutil

import pytest
import torch
from fixtures.dit_samples import random_model

from loomvideo.model.config import LoRAConfig
from loomvideo.model.initial_weights import InitialWeights, open_base, weights_digest
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import load_dit, save_dit
from loomvideo.platform.errors import UserError

DIT = model_size("tiny").dit
SOURCE = ("source_patch_embedding.*",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a stage without a source embedding."""
    path = tmp_path_factory.mktemp("weights") / "stage1"
    config = dataclasses.replace(DIT, use_source_embedding=False)
    save_dit(random_model(config), config, path)
    return path


def test_every_parameter_is_what_loading_the_model_gives(folder):
    initial, loaded = InitialWeights(folder, DIT, SOURCE), load_dit(folder, DIT, allow=SOURCE)
    expected = dict(loaded.named_parameters())
    assert list(initial) == list(expected)
    for name, value in initial.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name])
    # What the checkpoint lacks starts at zero and is all that takes memory.
    assert set(initial.fresh) == {"source_patch_embedding.weight", "source_patch_embedding.bias"}
    held = {name for name, parameter in initial.model.named_parameters() if not parameter.is_meta}
    assert held == set(initial.fresh)


def test_adapters_start_alike_on_every_rank_and_change_nothing(folder):
    lora = LoRAConfig(rank=2, dora=True)
    one, other = (InitialWeights(folder, DIT, SOURCE, lora, seed=3) for _ in range(2))
    names = [name for name in one if name.endswith(".lora_A")]
    for name in reversed(names):
        layer = name.removesuffix(".lora_A")
        assert torch.equal(one[name], other[name])
        assert not one[f"{layer}.lora_B"].any()
        assert torch.equal(one[f"{layer}.lora_magnitude"], torch.linalg.norm(one[f"{layer}.weight"], dim=1))
    assert not torch.equal(one[names[0]], one[names[1]])
    assert not torch.equal(one[names[0]], InitialWeights(folder, DIT, SOURCE, lora, seed=4)[names[0]])


def test_a_base_is_known_by_its_content(folder, tmp_path):
    digest = weights_digest(folder)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert weights_digest(moved) == digest
    assert len(open_base(moved, digest, DIT, SOURCE)) > 0
    file = next(moved.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="not the weights that the run started from"):
        open_base(moved, digest, DIT, SOURCE)
    with pytest.raises(UserError, match="name their folder with --base"):
        open_base(tmp_path / "gone", digest, DIT, SOURCE)
