"""Checkpoints as people bring them: recognised, or one line that says what they are."""

import json

import pytest
import torch
from safetensors.torch import save_file

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.sizes import model_size
from loomvideo.model.stored_weights import CONDITIONING_KEYS, open_checkpoint
from loomvideo.model.weights import load_dit, save_dit
from loomvideo.platform.errors import UserError

CONFIG = model_size("tiny").dit
# Ours to Wan's own names, the other way round than the code under test.
OFFICIAL = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("norm2", "norm3"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
]


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    model = LoomVideoDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def official(name):
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in OFFICIAL:
        name = name.replace(ours, theirs)
    return name.replace("scale_shift_table", "modulation")


def is_wan(name):
    return not name.startswith(tuple(pattern.removesuffix("*") for pattern in CONDITIONING_KEYS))


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "model.diffusion_model.", "diffusion_model.", "model."]
)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_prefixes_are_taken_off(tmp_path, state, prefix, suffix):
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()} | {"global_step": torch.tensor([7])}
    path = tmp_path / f"w.{suffix}"
    save_file(named, path) if suffix == "safetensors" else torch.save(named, path)
    loaded = load_dit(path, CONFIG).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_wans_own_names_are_read(tmp_path, state, prefix):
    save_file({prefix + official(name): t for name, t in state.items() if is_wan(name)}, tmp_path / "wan.safetensors")
    assert open_checkpoint(tmp_path / "wan.safetensors").kind == "wan"
    loaded = load_dit(tmp_path / "wan.safetensors", CONFIG).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items() if is_wan(name))


@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16"])
@pytest.mark.parametrize("index", ["none", "before", "after"])
def test_wans_own_folder_in_shards_and_variants(tmp_path, state, variant, index):
    wan = {official(name): tensor for name, tensor in state.items() if is_wan(name)}
    names = sorted(wan)
    stem = "diffusion_pytorch_model"
    if index == "none":
        save_file(wan, tmp_path / f"{stem}{variant}.safetensors")
    else:
        files = {}
        for number in range(2):
            file = f"{stem}{variant}-{number + 1:05d}-of-00002.safetensors"
            save_file({name: wan[name] for name in names[number::2]}, tmp_path / file)
            files |= dict.fromkeys(names[number::2], file)
        named = f"{stem}{variant}.safetensors.index" if index == "before" else f"{stem}.safetensors.index{variant}"
        (tmp_path / f"{named}.json").write_text(json.dumps({"weight_map": files}))
    stated = {"_class_name": "WanModel", "dim": CONFIG.num_attention_heads * CONFIG.attention_head_dim,
              "num_heads": CONFIG.num_attention_heads, "num_layers": CONFIG.num_layers}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(stated))
    loaded = load_dit(tmp_path, CONFIG).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items() if is_wan(name))
    (tmp_path / "config.json").write_text(json.dumps(stated | {"num_layers": 77}))
    with pytest.raises(UserError, match="num_layers is 77"):
        load_dit(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_blocks_0_self_attn_q.lora_down.weight"], r"an adapter \(LoRA\)"),
        (["base_model.model.blocks.0.attn1.to_q.lora_A.weight"], r"an adapter \(LoRA\)"),
        (["diffusion_model.blocks.0.self_attn.q.alpha"], r"an adapter \(LoRA\)"),
        (["patch_embedding.weight", "patch_embedding.scale_weight"], "8-bit weights with scales"),
        (["patch_embedding.weight", "module.patch_embedding.weight"], "are both patch_embedding.weight"),
    ],
)
def test_what_holds_no_such_weights_is_said(tmp_path, names, message):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path / "w.safetensors")
    assert str(tmp_path / "w.safetensors") in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "gen_model.pth"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"nothing of the kind, only words", "download it again|not a readable state dict"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_download_that_was_cut_says_how_far_it_came(tmp_path):
    save_file({"patch_embedding.weight": torch.zeros(1000)}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"cut off at {len(content) - 100} of {len(content)} bytes"):
        open_checkpoint(tmp_path / "w.safetensors")


def test_a_folder_one_level_too_high_names_the_one_meant(tmp_path):
    save_dit(LoomVideoDiT(CONFIG), CONFIG, tmp_path / "run" / "weights")
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/run/weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a checkpoint") as caught:
        open_checkpoint(tmp_path / "empty")
    assert "did you mean" not in str(caught.value)
