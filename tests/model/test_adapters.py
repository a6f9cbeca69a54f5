"""Adapters in the key schemes of five projects: the same latents, exact unloading, refusals by name, and back again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loomvideo.model.adapters import fingerprints, parse_choice, read_adapter, save_as, set_adapters
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import load_pipeline
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import save_dit
from loomvideo.platform.errors import UserError

RANK, ALPHA = 3, 6.0
# Our name, Wan's own name, and the flat one of the trainers.
LAYERS = {
    "blocks.0.attn1.to_q": ("blocks.0.self_attn.q", "blocks_0_self_attn_q"),
    "blocks.1.attn2.to_out.0": ("blocks.1.cross_attn.o", "blocks_1_cross_attn_o"),
    "blocks.2.ffn.net.0.proj": ("blocks.2.ffn.0", "blocks_2_ffn_0"),
    "blocks.2.ffn.net.2": ("blocks.2.ffn.2", "blocks_2_ffn_2"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    dit = LoomVideoDiT(model_size("tiny").dit)
    torch.nn.init.normal_(dit.proj_out.weight, std=0.1)
    save_dit(dit, dit.config, folder)
    return str(folder)


@pytest.fixture(scope="module")
def matrices():
    generator = torch.Generator().manual_seed(1)
    dit = LoomVideoDiT(model_size("tiny").dit)
    sizes = {name: dit.get_submodule(name) for name in LAYERS}
    return {name: (torch.randn(RANK, layer.in_features, generator=generator) * 0.2,
                   torch.randn(layer.out_features, RANK, generator=generator) * 0.2)
            for name, layer in sizes.items()}  # fmt: skip


def written(dialect, matrices, folder):
    """A file as the other project writes it."""
    tensors = {}
    for name, (down, up) in matrices.items():
        wan, flat = LAYERS[name]
        if dialect == "peft":
            keys = f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight", None
        elif dialect == "diffusers":
            keys = f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight", f"transformer.{name}.alpha"
        elif dialect == "comfyui":
            prefix = f"diffusion_model.{wan}"
            keys = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight", f"{prefix}.alpha"
        elif dialect == "kohya":
            keys = f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight", f"lora_unet_{flat}.alpha"
        else:
            keys = f"{wan}.lora_down.weight", f"{wan}.lora_up.weight", f"{wan}.alpha"
        tensors |= {keys[0]: down.clone(), keys[1]: up.clone()}
        tensors |= {keys[2]: torch.tensor(ALPHA)} if keys[2] else {}
    if dialect != "peft":
        save_file(tensors, folder / f"{dialect}.safetensors")
        return folder / f"{dialect}.safetensors"
    (folder / "peft").mkdir()
    save_file(tensors, folder / "peft" / "adapter_model.safetensors")
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    return folder / "peft"


def latents(pipeline):
    return pipeline.sample(pipeline.encode("t2i", "a red dress", size=(64, 64)), steps=2)


def source(weights, **keys):
    return ModelSource(weights, "tiny", kernels="", device="cpu", **keys)


def test_five_dialects_give_what_merging_gives(weights, matrices, tmp_path):
    pipeline = load_pipeline(source(weights))
    plain = latents(pipeline)
    with torch.no_grad():
        for name, (down, up) in matrices.items():
            pipeline.dit.get_submodule(name).weight += 0.7 * ALPHA / RANK * up @ down
    merged = latents(pipeline)
    assert not torch.allclose(merged, plain, atol=1e-2)
    for dialect in ("peft", "diffusers", "comfyui", "kohya", "wan"):
        file = written(dialect, matrices, tmp_path)
        pipeline = load_pipeline(source(weights, lora=(f"{file}:0.7",)))
        torch.testing.assert_close(latents(pipeline), merged, rtol=1e-4, atol=1e-4)
        pipeline.unload_lora()
        assert torch.equal(latents(pipeline), plain)


def test_several_at_once_in_every_way_of_using_memory(weights, matrices, tmp_path):
    file = written("kohya", matrices, tmp_path)
    whole = load_pipeline(source(weights, lora=(str(file),)))
    halves = load_pipeline(source(weights, memory="offload"))
    halves.load_lora(file, 0.25, "one")
    halves.load_lora(file, 0.5, "two")
    halves.load_lora(file, 0.75, "one")
    assert not torch.equal(latents(halves), latents(whole))
    halves.load_lora(file, 0.5, "one")
    torch.testing.assert_close(latents(halves), latents(whole), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="lora three: not loaded; loaded are one, two"):
        halves.unload_lora("three")


def test_layers_in_few_bits_take_adapters(weights, matrices, tmp_path):
    pytest.importorskip("bitsandbytes")
    pipeline = load_pipeline(source(weights, dit_bits=8))
    plain = latents(pipeline)
    pipeline.load_lora(written("comfyui", matrices, tmp_path))
    assert not torch.equal(latents(pipeline), plain)
    pipeline.unload_lora()
    assert torch.equal(latents(pipeline), plain)


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "comfyui", "kohya"])
def test_written_for_others_and_read_again(weights, matrices, tmp_path, dialect):
    model = LoomVideoDiT(model_size("tiny").dit)
    first = read_adapter(written("kohya", matrices, tmp_path), model)
    out = tmp_path / "out" / ("folder" if dialect == "peft" else "file.safetensors")
    save_as(first, out, dialect, torch.float32)
    again = read_adapter(out, model)
    assert set(again.layers) == set(matrices)
    for name, (down, up, scale) in again.layers.items():
        torch.testing.assert_close(scale * up @ down, ALPHA / RANK * matrices[name][1] @ matrices[name][0])
    expected = {"diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
                "comfyui": "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
                "kohya": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
                "peft": "base_model.model.blocks.0.attn1.to_q.lora_A.weight"}  # fmt: skip
    assert expected[dialect] in load_file(out / "adapter_model.safetensors" if dialect == "peft" else out)
    with pytest.raises(UserError, match="is there already"):
        save_as(first, out, dialect)


def test_refusals_name_file_and_keys(matrices, tmp_path):
    model = LoomVideoDiT(model_size("tiny").dit)
    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 8)}, other)
    with pytest.raises(UserError, match=r"1 of 1 keys .*lora_unet_down_blocks_0_attentions_0_proj_in"):
        read_adapter(other, model)
    key = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{key}.lora_A.weight": torch.zeros(2, 192)}, other)
    with pytest.raises(UserError, match=r"blocks\.0\.attn1\.to_q lacks its up matrix"):
        read_adapter(other, model)
    save_file({f"{key}.lora_A.weight": torch.zeros(2, 64), f"{key}.lora_B.weight": torch.zeros(192, 2)}, other)
    with pytest.raises(UserError, match="another model size"):
        read_adapter(other, model)
    save_file({f"{key}.diff_b": torch.zeros(192)}, other)
    with pytest.raises(UserError, match="diff_b"):
        read_adapter(other, model)
    with pytest.raises(UserError, match="no such file"):
        read_adapter(tmp_path / "none.safetensors", model)
    with pytest.raises(UserError, match="FILE:STRENGTH"):
        parse_choice("style.safetensors:strong")


def test_facts_change_with_content_and_strength(matrices, tmp_path):
    file = written("kohya", matrices, tmp_path)
    half, full = fingerprints([f"{file}:0.5"]), fingerprints([str(file)])
    assert half != full
    assert half[0][0] == full[0][0]
    model = LoomVideoDiT(model_size("tiny").dit)
    names = set(dict(model.named_parameters()))
    set_adapters(model, [read_adapter(file, model)])
    set_adapters(model, [])
    assert set(dict(model.named_parameters())) == names
