import dataclasses
import json
import re
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.sizes import model_size
from loomvideo.model.stored_weights import DEAD_KEYS, open_checkpoint
from loomvideo.model.weights import WeightsError, expected_shapes, load_dit, save_dit
from loomvideo.platform.errors import UserError

CONFIG = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=32, in_channels=4, mllm_dim=8, freq_dim=16
)


def make_wan(config: DiTConfig = CONFIG) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=6,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )


def published_state(config: DiTConfig = CONFIG) -> dict[str, torch.Tensor]:
    """A state dict in the published layout, dead text embedder included, with distinct random values."""
    state = {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}
    dead = {name: tensor for name, tensor in make_wan(config).state_dict().items() if "text_embedder" in name}
    return state | dead


@pytest.fixture
def gen_model(tmp_path):
    state = published_state()
    torch.save(state, tmp_path / "gen_model.pth")
    return tmp_path / "gen_model.pth", state


def test_published_file_loads(gen_model):
    path, state = gen_model
    for source in (path, path.parent):
        model = load_dit(source, CONFIG)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, state[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_published_file_needs_sizes(gen_model):
    with pytest.raises(UserError, match="model="):
        load_dit(gen_model[0])


def test_wrong_keys_and_shapes_are_named(tmp_path):
    state = published_state()
    state["blocks.1.attn1.to_q.wieght"] = state.pop("blocks.1.attn1.to_q.weight")
    state["proj_out.weight"] = torch.randn(3, 24)
    torch.save(state, tmp_path / "gen_model.pth")
    with pytest.raises(WeightsError, match=r"gen_model\.pth") as raised:
        load_dit(tmp_path / "gen_model.pth", CONFIG)
    assert raised.value.missing == ["blocks.1.attn1.to_q.weight"]
    assert raised.value.unexpected == ["blocks.1.attn1.to_q.wieght"]
    assert raised.value.misshapen == ["proj_out.weight: [3, 24], expected [16, 24]"]
    assert "\n" not in str(raised.value)
    assert "blocks.1.attn1.to_q.wieght" in str(raised.value)


def test_what_is_asked_for_is_accepted(tmp_path):
    state = published_state()
    del state["source_patch_embedding.weight"], state["source_patch_embedding.bias"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "stage1.pth")
    with pytest.raises(WeightsError, match=re.escape("source_patch_embedding.weight")):
        load_dit(tmp_path / "stage1.pth", CONFIG)
    model = load_dit(tmp_path / "stage1.pth", CONFIG, allow=["source_patch_embedding.*", "extra.*"])
    assert not model.source_patch_embedding.weight.any()
    stage1 = dataclasses.replace(CONFIG, use_source_embedding=False)
    assert not hasattr(load_dit(tmp_path / "stage1.pth", stage1, allow=["extra.*"]), "source_patch_embedding")


def test_pickled_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"weight": Malicious()}, tmp_path / "gen_model.pth")
    with pytest.raises(UserError, match="not a readable state dict"):
        load_dit(tmp_path / "gen_model.pth", CONFIG)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_wan_folder_starts_with_wans_function(tmp_path, max_shard_size):
    wan = make_wan()
    wan.save_pretrained(tmp_path / "transformer", max_shard_size=max_shard_size)
    for path in (tmp_path, tmp_path / "transformer"):
        model = load_dit(path, CONFIG)
    state = wan.state_dict()
    for name, parameter in model.named_parameters():
        if name in state:
            assert torch.equal(parameter, state[name]), name
    assert not model.source_patch_embedding.weight.any()
    assert not model.source_patch_embedding.bias.any()
    assert not model.mllm_embedder.linear_2.weight.any()
    assert not model.mllm_embedder.linear_2.bias.any()
    assert model.mllm_embedder.linear_1.weight.any()
    assert torch.equal(model.mllm_embedder.norm.weight, torch.ones(8))


def test_wan_folder_of_other_sizes_is_refused(tmp_path):
    make_wan().save_pretrained(tmp_path)
    other = dataclasses.replace(CONFIG, num_attention_heads=1, attention_head_dim=24)
    with pytest.raises(UserError, match=r"num_attention_heads is 2, the model's is 1"):
        load_dit(tmp_path, other)


@pytest.mark.parametrize("max_shard_bytes", [2**30, 3000])
def test_own_folder_loads_without_a_size(tmp_path, max_shard_bytes):
    model = LoomVideoDiT(CONFIG)
    save_dit(model, CONFIG, tmp_path / "weights", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "weights" / "model.safetensors").exists() == (max_shard_bytes == 2**30)
    assert not list((tmp_path / "weights").glob("*.partial"))
    restored = load_dit(tmp_path / "weights")
    assert restored.config == CONFIG
    for (name, parameter), saved in zip(restored.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, saved), name


def test_own_folder_from_pairs_in_bfloat16(tmp_path):
    model = LoomVideoDiT(CONFIG)
    save_dit(iter(model.state_dict().items()), CONFIG, tmp_path, dtype=torch.bfloat16)
    assert set(open_checkpoint(tmp_path).dtypes.values()) == {"BF16"}
    kept = load_dit(tmp_path, dtype=None)
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}


def test_saving_refuses_other_keys_and_full_folders(tmp_path):
    state = LoomVideoDiT(CONFIG).state_dict()
    bias = state.pop("proj_out.bias")
    with pytest.raises(WeightsError, match=re.escape("proj_out.bias")):
        save_dit(state, CONFIG, tmp_path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_dit(tmp_path)
    save_dit(state | {"proj_out.bias": bias}, CONFIG, tmp_path)
    with pytest.raises(UserError, match="already holds weights"):
        save_dit(state, CONFIG, tmp_path)


def test_incomplete_folder_is_named(tmp_path):
    save_dit(LoomVideoDiT(CONFIG), CONFIG, tmp_path, max_shard_bytes=3000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="model-00002"):
        load_dit(tmp_path)


def test_config_with_unknown_keys_is_named(tmp_path):
    save_dit(LoomVideoDiT(CONFIG), CONFIG, tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    stated["dit"]["num_experts"] = 4
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"config\.json.*num_experts"):
        load_dit(tmp_path)


def test_safetensors_file_of_published_keys_loads(tmp_path):
    state = published_state()
    save_file(state, tmp_path / "gen_model.safetensors")
    model = load_dit(tmp_path / "gen_model.safetensors", CONFIG, dtype=torch.float64)
    torch.testing.assert_close(model.proj_out.weight, state["proj_out.weight"].double())


def test_5b_has_the_published_size_and_keys():
    config = model_size("5b").dit
    shapes = expected_shapes(config)
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert num_parameters == pytest.approx(5.09e9, rel=0.01)
    with torch.device("meta"):
        wan = {name: tuple(tensor.shape) for name, tensor in make_wan(config).state_dict().items()}
    dead = {name for name in wan if name.startswith(DEAD_KEYS[0].removesuffix("*"))}
    assert len(dead) == 4
    own = {
        "mllm_embedder.norm.weight": (4096,),
        "mllm_embedder.linear_1.weight": (12288, 4096),
        "mllm_embedder.linear_1.bias": (12288,),
        "mllm_embedder.linear_2.weight": (3072, 12288),
        "mllm_embedder.linear_2.bias": (3072,),
        "source_patch_embedding.weight": (3072, 48, 1, 2, 2),
        "source_patch_embedding.bias": (3072,),
    }
    assert shapes == {name: shape for name, shape in wan.items() if name not in dead} | own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loomvideo", "published"])
def test_loading_holds_one_copy(tmp_path, kind):
    """Anonymous memory grows by the model, not by the checkpoint as well."""
    config = dataclasses.replace(CONFIG, num_layers=6, attention_head_dim=192, ffn_dim=1536)
    model = LoomVideoDiT(config)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert num_bytes > 60e6
    if kind == "loomvideo":
        save_dit(model, config, tmp_path)
    else:
        torch.save(model.state_dict(), tmp_path / "gen_model.pth")
    del model
    program = f"""
import threading, time, torch
from pathlib import Path
from loomvideo.model.config import DiTConfig
from loomvideo.model.weights import load_dit
config = DiTConfig.from_dict({config.to_dict()!r})
torch.ones(8, 8) @ torch.ones(8, 8)  # what the library allocates once

def anonymous():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_dit({str(tmp_path)!r}, config)
done.set()
thread.join()
print(max(peak, anonymous()) - before)
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert 0.9 * num_bytes < int(output) < 1.3 * num_bytes
