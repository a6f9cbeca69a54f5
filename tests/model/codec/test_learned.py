"""The learned codec: shapes, streams, causality, quality on photographs and drawn figures, no block edges."""

import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from loomvideo.model.codec import CodecConfig, LearnedCodec, build_codec
from loomvideo.model.codec.learned import WEIGHTS
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.evaluation.metrics import block_edge_ratio
from loomvideo.pipelines.sample_data.figures import Renderer, random_figure
from loomvideo.platform.errors import UserError


@pytest.fixture(scope="module")
def codec() -> LearnedCodec:
    return LearnedCodec()


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    """A clip of a figure of the sample dataset, [1, 3, 9, 96, 96]."""
    from loomvideo.pipelines.sample_data.fashion import random_look

    random = np.random.default_rng(123)
    figure = random_figure(random)
    renderer = Renderer(figure, random_look(figure.outfit, random), 96, 96)
    frames = np.stack([renderer.frame(i) for i in range(9)])
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(4 / (a - b).square().mean().item())


def test_shapes(codec):
    moments = codec.encode(torch.rand(2, 3, 9, 32, 48))
    assert moments.mean.shape == moments.std.shape == (2, codec.latent_channels, 3, 4, 6)
    assert not moments.std.any()
    assert codec.decode(moments.mean).shape == (2, 3, 9, 32, 48)
    assert codec.encode(torch.rand(1, 3, 1, 32, 32)).mean.shape == (1, codec.latent_channels, 1, 4, 4)


def test_causal_in_latent_frames_and_exact_as_a_stream(codec, drawn):
    latents = codec.encode(drawn).mean
    torch.testing.assert_close(latents[:, :, :2], codec.encode(drawn[:, :, :5]).mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(list(codec.decode_stream(latents)), dim=2), codec.decode(latents))


def test_picture_and_still_clip_agree(codec, drawn):
    picture = drawn[:, :, :1]
    latents = codec.encode(picture.expand(-1, -1, 5, -1, -1)).mean
    torch.testing.assert_close(latents[:, :, 1:], codec.encode(picture).mean, atol=1e-4, rtol=1e-4)


def test_quality_on_the_sample_world(codec, drawn):
    decoded = codec.decode(codec.encode(drawn).mean)
    assert psnr(decoded, drawn) > 28
    pixels = [((v[0].permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy() for v in (decoded, drawn)]
    assert block_edge_ratio(*pixels, 8) < 1.35


@pytest.mark.parametrize(("name", "least"), [("coffee.png", 23.0), ("chelsea.png", 26.0)])
def test_quality_on_photographs(codec, name, least):
    image = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB").resize((96, 96), Image.LANCZOS)
    photograph = torch.as_tensor(np.asarray(image).copy()).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    assert psnr(codec.decode(codec.encode(photograph).mean), photograph) > least


def test_latents_have_about_unit_scale_and_noise_is_forgiven(codec, drawn):
    latents = codec.encode(drawn).mean
    assert 0.5 < latents.std() < 2
    noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert psnr(codec.decode(latents + noise), drawn) > psnr(codec.decode(latents), drawn) - 3


def test_it_is_the_codec_of_tiny_and_light_to_ship(codec):
    config = model_size("tiny").codec
    built = build_codec(config)
    assert (built.fingerprint, built.latent_channels) == (codec.fingerprint, config.latent_channels)
    assert config.is_built_in
    assert WEIGHTS.stat().st_size < 1_100_000


def test_refusals(codec):
    with pytest.raises(UserError, match="4k\\+1"):
        codec.encode(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(UserError, match="channels"):
        codec.decode(torch.zeros(1, 3, 1, 4, 4))
    with pytest.raises(UserError, match="the learned codec has"):
        build_codec(CodecConfig(kind="learned", latent_channels=7, spatial_stride=8))
    with pytest.raises(UserError, match="the preset says"):
        build_codec(CodecConfig(kind="learned", latent_channels=codec.latent_channels))
