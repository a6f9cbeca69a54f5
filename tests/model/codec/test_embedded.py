"""The embedded codec: shapes, causality, exactness of what it keeps, and quality on photographs."""

import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from loomvideo.model.codec import COEFFICIENTS, CodecConfig, DCTCodec, LatentMoments, build_codec
from loomvideo.platform.errors import UserError


def photograph(name: str, size: int) -> torch.Tensor:
    image = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
    side = min(image.size)
    image = image.crop((0, 0, side, side)).resize((size, size), Image.BICUBIC)
    return torch.as_tensor(np.asarray(image).copy()).permute(2, 0, 1)[None, :, None] / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(4 / (a - b).square().mean().item())


@pytest.mark.parametrize("channels", [16, 24, 48])
def test_shapes(channels):
    codec = DCTCodec(channels)
    moments = codec.encode(torch.rand(2, 3, 9, 32, 48))
    assert moments.mean.shape == moments.std.shape == (2, channels, 3, 2, 3)
    assert not moments.std.any()
    assert codec.decode(moments.mean).shape == (2, 3, 9, 32, 48)


def test_basis_is_orthonormal():
    basis = DCTCodec(len(COEFFICIENTS)).basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(COEFFICIENTS)), atol=1e-5, rtol=0)


def test_decoded_video_has_the_same_latents():
    codec = DCTCodec(24)
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    latents = codec.encode(video).mean
    torch.testing.assert_close(codec.encode(codec.decode(latents)).mean, latents, atol=1e-5, rtol=1e-5)


def test_causal_in_latent_frames():
    codec = DCTCodec(24)
    video = torch.rand(1, 3, 9, 32, 32)
    torch.testing.assert_close(codec.encode(video).mean[:, :, :2], codec.encode(video[:, :, :5]).mean)


def test_picture_and_still_clip_agree():
    codec = DCTCodec(24)
    picture = torch.rand(1, 3, 1, 32, 32)
    latents = codec.encode(picture.expand(-1, -1, 5, -1, -1)).mean
    torch.testing.assert_close(latents[:, :, :1], codec.encode(picture).mean)
    torch.testing.assert_close(latents[:, :, 1:], codec.encode(picture).mean)


@pytest.mark.parametrize(("channels", "least"), [(16, 20.5), (24, 21.3), (32, 22.4), (48, 23.6)])
def test_quality_on_photographs(channels, least):
    codec = DCTCodec(channels)
    photographs = torch.cat([photograph(name, 128) for name in ("astronaut.png", "coffee.png", "chelsea.png")])
    assert psnr(codec.decode(codec.encode(photographs).mean), photographs) > least


def test_latents_of_photographs_have_about_unit_scale():
    photographs = torch.cat([photograph(name, 128) for name in ("astronaut.png", "coffee.png", "chelsea.png")])
    scale = DCTCodec(24).encode(photographs).mean.square().mean((0, 2, 3, 4)).sqrt()
    still = [index for index, (_, time, *_) in enumerate(COEFFICIENTS[:24]) if time == 0]
    assert (scale[still] > 0.3).all()
    assert (scale[still] < 2.5).all()


def test_moments_sample():
    moments = LatentMoments(torch.zeros(1, 2, 1, 4, 4), torch.full((1, 2, 1, 4, 4), 2.0))
    draws = [moments.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


def test_build_and_fingerprint():
    codec = build_codec(CodecConfig(latent_channels=16))
    assert codec.latent_channels == 16
    assert codec.fingerprint == DCTCodec(16).fingerprint != DCTCodec(24).fingerprint


def test_refusals():
    with pytest.raises(UserError, match="4k\\+1"):
        DCTCodec().encode(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(UserError, match="sides"):
        DCTCodec().encode(torch.zeros(1, 3, 5, 30, 32))
    with pytest.raises(UserError, match="1 to 64"):
        DCTCodec(65)
    with pytest.raises(UserError, match="dct, learned or wan"):
        build_codec(CodecConfig(kind="jpeg"))
