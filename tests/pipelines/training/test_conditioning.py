"""Conditioning that does not reach the loss is found, whatever is trained."""

import dataclasses

import pytest
import torch
from fixtures.datasets import make_sample, write_dataset
from fixtures.dit_samples import random_model, random_sample

from loomvideo.model.attention import AttentionPlan
from loomvideo.model.config import LoRAConfig
from loomvideo.model.lora import adapt
from loomvideo.model.packing import pack
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.training.conditioning import ConditioningWatch, check_members
from loomvideo.platform.errors import UserError

DIT = dataclasses.replace(model_size("tiny").dit, num_layers=2)


@pytest.fixture
def model():
    return random_model(DIT)


@pytest.fixture
def batch():
    samples = [
        random_sample(DIT, (1, 4, 4), 3, references=[(4, 4)], source=True),
        random_sample(DIT, (1, 4, 4), 2, seed=1),
    ]
    return pack(samples, DIT.patch_size)


def dead_after_a_step(model, batch, watch=None):
    watch = watch or ConditioningWatch(uses_source=True)
    watch.is_on = True
    model(watch.attach(batch)).square().sum().backward()
    return watch.dead()


def test_living_conditioning_is_confirmed_once_and_then_left_alone(model, batch):
    watch = ConditioningWatch(uses_source=True)
    assert watch.attach(batch) is batch
    assert dead_after_a_step(model, batch, watch) == []
    again = watch.attach(batch)
    assert again.mllm_states is batch.mllm_states
    assert again.source_patches is batch.source_patches


def test_watching_changes_no_gradient(model, batch):
    model(batch).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    assert dead_after_a_step(model, batch) == []
    assert all(torch.equal(p.grad, one) for p, one in zip(model.parameters(), expected, strict=True))


def test_a_source_that_weights_of_zero_silence_is_found(model, batch):
    torch.nn.init.zeros_(model.source_patch_embedding.weight)
    assert dead_after_a_step(model, batch) == ["source"]
    assert dead_after_a_step(model, batch, ConditioningWatch(uses_source=False)) == []


def test_references_that_no_token_attends_to_are_found(model, batch):
    video, references, rest = 16, 16, 16
    assert batch.num_tokens == video + references + rest
    cut = dataclasses.replace(batch, self_plan=AttentionPlan.build([video, references, rest]))
    assert dead_after_a_step(model, cut) == ["references"]


@pytest.mark.parametrize("adapters", [False, True])
def test_states_of_a_layer_that_nothing_reads_are_found(model, batch, adapters):
    if adapters:
        adapt(model, LoRAConfig(rank=2, targets=["blocks.*.ffn.*"]))
    torch.nn.init.zeros_(model.blocks[1].attn2.to_v.weight)
    torch.nn.init.zeros_(model.blocks[1].attn2.to_k.weight)
    assert dead_after_a_step(model, batch) == ["MLLM states of layer 1"]


def test_a_dataset_whose_edits_have_no_source_is_refused(tmp_path):
    sizes = {"channels": DIT.in_channels, "num_layers": DIT.num_layers, "mllm_dim": DIT.mllm_dim}
    whole = [make_sample("a", "video_edit", **sizes), make_sample("b", "t2v", **sizes)]
    check_members([write_dataset(tmp_path / "whole", whole)])
    lacking = make_sample("c", "video_edit", **sizes)
    del lacking.tensors["source"]
    dataset = write_dataset(tmp_path / "lacking", [*whole, lacking])
    with pytest.raises(UserError, match=r"1 samples lack the source that their task needs, such as c \(video_edit\)"):
        check_members([dataset])
