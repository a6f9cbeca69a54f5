"""Wan's VAE at a tiny size: diffusers' own numbers, chunks, tiles, the memory bound and folders."""

import copy
import itertools
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from loomvideo.model.codec import CodecConfig, CodecExecution, build_codec
from loomvideo.model.codec import wan as vae
from loomvideo.model.codec.live_bytes import PeakLiveBytes
from loomvideo.model.codec.wan import OVERLAP, TilePlan, WanVAE
from loomvideo.platform.errors import UserError

CHANNELS = 6
# The layout of Wan2.2's VAE (residual blocks, 2x2 pixel patches), a fraction of its width.
SIZES = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": CHANNELS,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1 * index for index in range(CHANNELS)],
    "latents_std": [0.5 + 0.1 * index for index in range(CHANNELS)],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoencoderKLWan(**SIZES).eval()


@pytest.fixture
def wan(model):
    return WanVAE(model, "random")


def video(frames: int, height: int = 32, width: int = 48, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


@torch.no_grad()
def test_moments_and_frames_are_diffusers(model, wan):
    clips = video(9, batch=2)
    posterior = model.encode(clips).latent_dist
    mean, std = (torch.tensor(SIZES[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    moments = wan.encode(clips)
    assert moments.mean.shape == (2, CHANNELS, 3, 2, 3)
    torch.testing.assert_close(moments.mean, (posterior.mean - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.std, posterior.std / std, rtol=1e-4, atol=1e-4)
    decoded = wan.decode(moments.mean)
    assert decoded.shape == clips.shape
    torch.testing.assert_close(decoded, model.decode(posterior.mean).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [2, 4])
def test_chunks_change_nothing(model, chunk):
    clip = video(17)
    latents = torch.cat(list(vae.encode_chunks(model, clip, 1)), dim=2)
    torch.testing.assert_close(
        torch.cat(list(vae.encode_chunks(model, clip, chunk)), dim=2), latents, rtol=1e-4, atol=1e-4
    )
    raw = latents[:, :CHANNELS]
    frames = torch.cat(list(vae.decode_chunks(model, raw, 1)), dim=2)
    torch.testing.assert_close(
        torch.cat(list(vae.decode_chunks(model, raw, chunk)), dim=2), frames, rtol=1e-4, atol=1e-4
    )


def test_stream_yields_the_decoded_frames_in_order(wan):
    latents = torch.randn(1, CHANNELS, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    pieces = list(wan.decode_stream(latents))
    assert [piece.shape[2] for piece in pieces] == [1, 16, 4]
    assert torch.cat(pieces, dim=2).equal(wan.decode(latents))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_plan_shrinks_with_the_limit(wan, part):
    frame = wan._bytes_per_cell(part, 1) * 24 * 40
    plans = []
    for limit in (100 * frame, 1.01 * frame, frame / 2, frame / 8):
        wan.memory_limit_bytes = int(limit)
        plans.append(wan.plan(part, 9, 24, 40))
    assert plans[:2] == [TilePlan(4, 24, 40), TilePlan(1, 24, 40)]
    areas = [plan.tile_height * plan.tile_width for plan in plans]
    assert areas[1] > areas[2] > areas[3]
    wan.memory_limit_bytes = 1000
    with pytest.raises(UserError, match="smallest tile"):
        wan.plan(part, 9, 24, 40)


def test_memory_stays_within_the_limit_and_tiles_are_close(wan):
    clip = video(5, 128, 192)
    whole = wan.encode(clip)
    frames = wan.decode(whole.mean)
    limits = {part: int(wan._bytes_per_cell(part, 1) * 66) for part in ("encoder", "decoder")}
    wan.memory_limit_bytes = limits["encoder"]
    assert wan.plan("encoder", 2, 8, 12) == TilePlan(1, 8, 8)
    with PeakLiveBytes() as live:
        tiled = wan.encode(clip)
    assert live.peak < limits["encoder"] + 8 * tiled.mean.nbytes
    assert correlation(tiled.mean, whole.mean) > 0.99
    wan.memory_limit_bytes = limits["decoder"]
    with PeakLiveBytes() as live:
        tiled_frames = wan.decode(whole.mean)
    assert live.peak < limits["decoder"] + 3 * frames.nbytes
    assert correlation(tiled_frames, frames) > 0.98


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize(("size", "tile"), [(8, 8), (9, 8), (17, 8), (40, 13), (5, 30)])
def test_tiles_cover_and_their_weights_sum_to_one(size, tile):
    tiles = vae._tiles(size, tile)
    total = torch.zeros(2 * size)
    for part, ramp in zip(tiles, vae._ramps(tiles, 2), strict=True):
        assert part.stop - part.start == min(tile, size)
        total[2 * part.start : 2 * part.stop] += ramp
    torch.testing.assert_close(total, torch.ones_like(total))
    assert all(left.stop - right.start >= OVERLAP for left, right in itertools.pairwise(tiles))


def test_bf16_is_close(wan):
    torch.manual_seed(0)
    half = WanVAE(torch.nn.Module.to(AutoencoderKLWan(**SIZES), torch.bfloat16), "half")
    clip = video(5)
    moments, rounded = wan.encode(clip), half.encode(clip)
    assert rounded.mean.dtype == torch.float32
    assert correlation(rounded.mean, moments.mean) > 0.99
    assert correlation(half.decode(moments.mean), wan.decode(moments.mean)) > 0.99


@torch.no_grad()
def test_channels_last_changes_last_bits_alone(model, wan):
    laid = WanVAE(copy.deepcopy(model), "random", execution=CodecExecution(channels_last=True))
    convolutions = [parameter for parameter in laid.model.encoder.parameters() if parameter.ndim == 5]
    weights = [weight for weight in convolutions if weight[0, 0].numel() > 1]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)
    assert all(parameter.is_contiguous() for parameter in laid.model.decoder.parameters())
    clips = video(13, batch=2)
    expected, found = wan.encode(clips), laid.encode(clips)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.std, expected.std, rtol=1e-4, atol=1e-4)
    assert laid.decode(expected.mean).equal(wan.decode(expected.mean))
    seen = []
    laid.model.encoder.down_blocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    laid.encode(clips)
    assert all(states.is_contiguous(memory_format=torch.channels_last_3d) for states in seen)


@pytest.mark.slow
def test_compiled_is_one_program_a_shape_and_close(model, wan, monkeypatch):
    made = []

    def compiled(encoder, options, **how):
        def backend(graph, inputs):
            made.append(tuple(inputs[0].shape))
            return graph.forward

        assert options == {"deterministic": True}
        return original(encoder, backend=backend, **how)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    fast = WanVAE(copy.deepcopy(model), "random", execution=CodecExecution(compiled=True))
    for clips in (video(41), video(41), video(9)):
        torch.testing.assert_close(fast.encode(clips).mean, wan.encode(clips).mean, rtol=1e-4, atol=1e-4)
    # Of 41 frames: the first, the chunk after it, those after that, and the last two latent frames; of 9: one more.
    assert 3 < len(made) < 8


@pytest.mark.slow
def test_the_compiler_itself_is_close(model, wan):
    fast = WanVAE(copy.deepcopy(model), "random", execution=CodecExecution(channels_last=True, compiled=True))
    picture = video(1)
    torch.testing.assert_close(fast.encode(picture).mean, wan.encode(picture).mean, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_every_way_is_close(model):
    clips = video(17, 64, 96, batch=2).cuda()
    plain = WanVAE(copy.deepcopy(model).cuda().bfloat16(), "random").encode(clips)
    for how in (CodecExecution(channels_last=True), CodecExecution(True, True)):
        found = WanVAE(copy.deepcopy(model).cuda().bfloat16(), "random", execution=how).encode(clips)
        assert correlation(found.mean, plain.mean) > 0.999


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "wan" / "vae")
    return tmp_path / "wan"


def test_folder_round_trip(folder, wan):
    loaded = build_codec(CodecConfig("wan", CHANNELS, str(folder)))
    clip = video(5)
    assert loaded.encode(clip).mean.equal(wan.encode(clip).mean)
    again = WanVAE.from_pretrained(folder / "vae", dtype=torch.bfloat16)
    assert again.fingerprint == loaded.fingerprint
    assert again.model.dtype == torch.bfloat16


def test_folder_refusals(folder, tmp_path):
    with pytest.raises(UserError, match="set its folder"):
        build_codec(CodecConfig("wan"))
    with pytest.raises(UserError, match=r"config\.json: not found"):
        WanVAE.from_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="6 channels"):
        build_codec(CodecConfig("wan", 48, str(folder)))
    weights_file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(weights_file)
    misshapen = weights | {"quant_conv.weight": weights["quant_conv.weight"][:4].clone()}
    save_file(misshapen, weights_file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"quant_conv\.weight"):
        WanVAE.from_pretrained(folder)
    save_file(weights | {"extra": torch.zeros(1)}, weights_file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected weights.*extra"):
        WanVAE.from_pretrained(folder)
    del weights["quant_conv.bias"]
    save_file(weights, weights_file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing weights.*quant_conv\.bias"):
        WanVAE.from_pretrained(folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="AutoencoderKLWan"):
        WanVAE.from_pretrained(folder)
    shutil.rmtree(folder)


def test_shapes_are_checked(wan):
    with pytest.raises(UserError, match="4k\\+1"):
        wan.encode(video(4))
    with pytest.raises(UserError, match="divisible by 16"):
        wan.encode(video(5, 40, 32))
    with pytest.raises(UserError, match="latents of shape"):
        wan.decode(torch.zeros(1, 5, 1, 2, 2))
