"""Adapters against PEFT's, merging, and what is frozen."""

import dataclasses

import pytest
import torch
from torch import nn

from loomvideo.model import weights
from loomvideo.model.config import LoRAConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.lora import MergedWeights, adapt, save_adapter
from loomvideo.model.sizes import model_size
from loomvideo.platform.errors import UserError

TINY = dataclasses.replace(model_size("tiny").dit, num_layers=1)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4, bias=False))


def adapted(model, dora, moved=True, **options):
    config = LoRAConfig(rank=3, alpha=5.0, dora=dora, **{"targets": ["*"]} | options)
    torch.manual_seed(1)
    adapt(model, config)
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
    return config


@pytest.mark.parametrize("dora", [False, True])
def test_an_untrained_adapter_changes_nothing(dora):
    model, x = two_layers(), torch.randn(5, 6)
    before = model(x)
    adapted(model, dora, moved=False)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(dora, tmp_path):
    from peft import PeftModel

    model, x = two_layers(), torch.randn(5, 6)
    config = adapted(model, dora)
    state = model.state_dict()
    save_adapter(state, config, tmp_path)
    other = PeftModel.from_pretrained(two_layers(), tmp_path, is_trainable=True)
    other.eval()
    torch.testing.assert_close(other(x), model(x))
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    theirs = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(theirs) == len(ours) == (6 if dora else 4)
    torch.testing.assert_close(
        theirs["base_model.model.0.lora_A.default.weight"], ours["0.lora_A"], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        theirs["base_model.model.2.lora_B.default.weight"], ours["2.lora_B"], rtol=1e-4, atol=1e-5
    )
    if dora:
        length = theirs["base_model.model.2.lora_magnitude_vector.default.weight"]
        torch.testing.assert_close(length, ours["2.lora_magnitude"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_give_the_same_function_under_the_old_names(dora):
    model, x = two_layers(), torch.randn(5, 6)
    config = adapted(model, dora)
    merged = two_layers()
    merged.load_state_dict(dict(MergedWeights(model.state_dict(), config)))
    torch.testing.assert_close(merged(x), model(x))


def test_the_transformer_keeps_its_names_and_exports(tmp_path):
    model = LoomVideoDiT(TINY)
    config = adapted(model, True, targets=["blocks.*.attn1.to_*"], unfreeze=["proj_out.*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [f"blocks.0.attn1.to_{layer}" for layer in ("q", "k", "v", "out.0")]
    kinds = ("lora_A", "lora_B", "lora_magnitude")
    assert trained == {f"{layer}.{kind}" for layer in layers for kind in kinds} | {"proj_out.weight", "proj_out.bias"}
    weights.save_dit(MergedWeights(model.state_dict(), config), TINY, tmp_path / "w")
    loaded = weights.load_dit(tmp_path / "w")
    assert not torch.equal(loaded.blocks[0].attn1.to_q.weight, model.blocks[0].attn1.to_q.weight)
    assert torch.equal(loaded.blocks[0].attn2.to_q.weight, model.blocks[0].attn2.to_q.weight)


def test_layers_draw_in_the_order_of_the_model():
    model = two_layers()
    torch.manual_seed(1)
    adapt(model, LoRAConfig(rank=3, targets=["*"]))
    torch.manual_seed(1)
    for number, width in ((0, 6), (2, 10)):
        expected = nn.init.kaiming_uniform_(torch.empty(3, width), a=5**0.5)
        assert torch.equal(model[number].lora_A, expected)


@pytest.mark.parametrize(("key", "patterns"), [("targets", ["block.*"]), ("unfreeze", ["mllm_embeder.*"])])
def test_patterns_that_name_nothing_are_refused(key, patterns):
    with pytest.raises(UserError, match=f"lora.{key}: '{patterns[0]}' matches no"):
        adapt(LoomVideoDiT(TINY), LoRAConfig(rank=2, **{key: patterns}))
