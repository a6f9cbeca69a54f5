"""Ways of using memory: the same frames with parts one after another and blocks streamed, near ones with few bits."""

import pytest
import torch

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.loading import ModelSource
from loomvideo.model.parts import SequentialParts
from loomvideo.model.pipeline import load_pipeline
from loomvideo.model.quantize import QuantizedLinear, quantize_linears
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import save_dit
from loomvideo.platform.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = model_size("tiny").dit
    dit = LoomVideoDiT(config)
    torch.nn.init.normal_(dit.proj_out.weight, std=0.1)
    save_dit(dit, config, folder)
    return str(folder)


def source(weights, **keys):
    return ModelSource(weights, "tiny", kernels="", device="cpu", **keys)


def latents(pipeline):
    frames = torch.arange(5 * 64 * 64 * 3).reshape(5, 64, 64, 3).mul(7).remainder(255).to(torch.uint8).numpy()
    return pipeline.sample(pipeline.encode("video_edit", "make it red", frames), steps=2)


@pytest.mark.parametrize("mode", ["sequential", "offload"])
def test_the_same_frames_with_less_at_once(weights, mode):
    exact = latents(load_pipeline(source(weights)))
    pipeline = load_pipeline(source(weights, memory=mode))
    assert torch.equal(latents(pipeline), exact)
    assert torch.equal(latents(pipeline), exact)


def test_one_part_at_a_time(weights):
    parts = load_pipeline(source(weights, memory="sequential")).parts
    assert isinstance(parts, SequentialParts)
    with parts.use("mllm") as first:
        assert parts._part is first
    with parts.use("dit") as dit:
        assert parts._part is dit
    with parts.use("dit") as again:
        assert again is dit


def test_streamed_blocks_are_on_the_device_for_their_turn_only(weights):
    with load_pipeline(source(weights, memory="offload")).parts.use("dit") as dit:
        hosts = [block.ffn.net[2].weight.data_ptr() for block in dit.blocks]
        seen = []
        for block in dit.blocks:
            block.ffn.register_forward_pre_hook(
                lambda module, inputs: seen.append([b.ffn.net[2].weight.data_ptr() for b in dit.blocks])
            )
    pipeline = load_pipeline(source(weights))
    pipeline.parts.replace("dit", dit)
    latents(pipeline)
    for turn, addresses in enumerate(seen):
        away = [index for index, (now, host) in enumerate(zip(addresses, hosts, strict=True)) if now != host]
        assert away == [turn % len(hosts)]
    assert [block.ffn.net[2].weight.data_ptr() for block in dit.blocks] == hosts


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.12)])
def test_few_bits_are_near_and_small(bits, error):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(512, 384))
    x = torch.randn(7, 512)
    exact = linear(x)
    quantize_linears(linear, bits)
    layer = linear[0]
    assert isinstance(layer, QuantizedLinear)
    stored = sum(buffer.nbytes for buffer in layer.buffers())
    assert stored < 512 * 384 * 4 * (bits + 1.5) / 32 + 2048
    assert ((linear(x) - exact).norm() / exact.norm()) < error


@pytest.mark.parametrize("mode", ["resident", "offload"])
def test_a_model_in_few_bits_generates_nearly_the_same(weights, mode):
    pytest.importorskip("bitsandbytes")
    exact = latents(load_pipeline(source(weights)))
    near = latents(load_pipeline(source(weights, memory=mode, mllm_bits=8, dit_bits=8)))
    assert not torch.equal(near, exact)
    assert (near - exact).norm() / exact.norm() < 0.05


def test_what_does_not_go_together(weights):
    for keys, message in (
        ({"memory": "little"}, "memory=little: choose one of auto, resident"),
        ({"mllm_bits": 5}, "mllm_bits=5: choose one of 16, 8, 4"),
        ({"compile": True, "memory": "offload"}, "compile=true"),
        ({"drop_exact": True, "dit_bits": 4}, "shortcuts.fp8"),
    ):
        if keys.get("dit_bits"):
            pytest.importorskip("bitsandbytes")
        with pytest.raises(UserError, match=message):
            load_pipeline(source(weights, **keys))
