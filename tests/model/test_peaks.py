"""Estimated peaks against the bytes that the real code allocates on fake tensors at the published sizes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3VLModel

from loomvideo.model.codec.live_bytes import PeakLiveBytes
from loomvideo.model.conditioning import mllm as mllm_module
from loomvideo.model.conditioning.inputs import MLLMInputs
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditioning.random_weights import model_config
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.guidance import Guidance
from loomvideo.model.kernels import use_backend
from loomvideo.model.peaks import GIB, Work, choose_mode, codec_limit, mllm_tokens, peaks
from loomvideo.model.quantize import quantize_linears
from loomvideo.model.sampler import Branch, Denoiser
from loomvideo.model.sizes import model_size
from loomvideo.platform.errors import UserError

EDIT = Work("video_edit", 832, 480, 97)
SIZE = model_size("5b")


def by_mode(**bits):
    return {peak.mode: peak for peak in peaks(SIZE, EDIT, **bits)}


def in_bf16(build):
    """A module made in bf16: fake parameters cannot be cast afterwards."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return build().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def denoising(bits: int) -> int:
    """Peak of two guided steps of the real denoiser, weights included."""
    tokens = mllm_tokens(SIZE, EDIT)
    shape = (SIZE.dit.in_channels, *SIZE.grid.latent_shape(EDIT.num_frames, EDIT.width, EDIT.height))
    timesteps = torch.linspace(1000, 20, 50)
    with FakeTensorMode(allow_non_fake_inputs=True), PeakLiveBytes() as live, use_backend("eager"), torch.no_grad():
        dit = in_bf16(lambda: LoomVideoDiT(SIZE.dit))
        for block in dit.blocks:
            quantize_linears(block, bits)
        live.peak = live.live
        source = torch.empty(shape)
        states = [torch.empty(SIZE.dit.num_layers, n, SIZE.dit.mllm_dim, dtype=torch.bfloat16) for n in tokens]
        names = ("full", "visual", "unconditional")
        branches = {name: Branch(state, None if name == "unconditional" else source)
                    for name, state in zip(names, states, strict=True)}  # fmt: skip
        latents = torch.empty(shape)
        denoiser = Denoiser(dit, latents, branches, timesteps)
        for step in range(2):
            latents = latents - Guidance(2.5, 1.5).combine(denoiser.velocities(latents, step))
    return live.peak


def encoding(bits: int, monkeypatch) -> int:
    """Peak of the real decoder over prompts of the branches' lengths, weights included."""
    tokenizer = MLLMTokenizer()
    monkeypatch.setattr(mllm_module, "prompt_positions", lambda ids, *rest: torch.zeros(3, len(ids), dtype=torch.int64))
    with FakeTensorMode(allow_non_fake_inputs=True), PeakLiveBytes() as live, torch.no_grad():
        network = in_bf16(lambda: Qwen3VLModel(model_config(SIZE.mllm, tokenizer)))
        for layer in network.language_model.layers:
            quantize_linears(layer, bits)
        mllm = FrozenMLLM(network, SIZE.dit.num_layers, tokenizer, SIZE.mllm.processor, "fake")
        live.peak = live.live
        mllm.encode([MLLMInputs(torch.zeros(n, dtype=torch.int64)) for n in mllm_tokens(SIZE, EDIT)])
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_estimates_are_what_the_code_allocates(bits, monkeypatch):
    if bits != 16:
        pytest.importorskip("bitsandbytes")
    estimate = by_mode(mllm_bits=bits, dit_bits=bits)["sequential"]
    assert denoising(bits) == pytest.approx(estimate.denoise, rel=0.1)
    assert encoding(bits, monkeypatch) == pytest.approx(estimate.encode, rel=0.1)


def test_an_edit_fits_consumer_cards():
    full, small = by_mode(), by_mode(mllm_bits=4)
    assert full["resident"].num_bytes > 24 * GIB
    assert full["sequential"].num_bytes < 22 * GIB
    assert small["sequential"].num_bytes < 14 * GIB
    assert full["offload"].num_bytes < 7 * GIB


def test_the_fastest_way_that_fits_is_chosen():
    found = peaks(SIZE, EDIT)
    assert choose_mode(found, 80 * GIB).mode == "resident"
    assert choose_mode(found, 24 * GIB).mode == "sequential"
    assert choose_mode(found, 10 * GIB).mode == "offload"
    full, tight = (choose_mode(found, gib * GIB) for gib in (80, 34))
    assert codec_limit(full, 80 * GIB, 12 * GIB) == 12 * GIB
    assert tight.mode == "resident"
    assert 4 * GIB <= codec_limit(tight, 34 * GIB, 12 * GIB) < 8 * GIB
    beside = peaks(SIZE, EDIT, beside=True)
    assert choose_mode(beside, 80 * GIB).mode == "resident"
    assert beside[0].num_bytes > found[0].decode + 2 * GIB
    assert beside[1:] == found[1:]
    with pytest.raises(UserError, match=r"no way fits into 2\.0 GiB .*mllm_bits=4"):
        choose_mode(found, 2 * GIB)
