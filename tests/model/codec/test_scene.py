"""The scene reader: what it says of figures that it has not seen, and its place in the codec's latents."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loomvideo.model.codec import LearnedCodec
from loomvideo.model.codec.scene import CHANNELS, CLASSES, WEIGHTS, SceneReader
from loomvideo.pipelines.sample_data.fashion import random_look
from loomvideo.pipelines.sample_data.figures import Renderer, random_figure
from loomvideo.pipelines.sample_data.garments import LOWER


@pytest.fixture(scope="module")
def reader() -> SceneReader:
    return SceneReader.load()


def figure(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A picture as the codec sees a still [1, 12, 96, 96], and the share of each cell that its garments cover."""
    random = np.random.default_rng([5, seed])
    person = random_figure(random)
    look = random_look(person.outfit, random)
    renderer = Renderer(person, look, 96, 96)
    picture = torch.from_numpy(renderer.frame(0)).permute(2, 0, 1).float() / 127.5 - 1
    cover = {}
    for garment in look.garments:
        mask = torch.from_numpy(renderer.garment_mask(0, garment.type)).float()[None, None] / 255
        cover["lower garment" if garment.type in LOWER else "upper garment"] = F.avg_pool2d(mask, 8)[0, 0]
    return picture[:, None].expand(-1, 4, -1, -1).flatten(0, 1)[None], cover


def test_it_finds_the_garments_of_figures_it_has_not_seen(reader):
    right, empty = [], []
    for seed in range(8):
        picture, cover = figure(seed)
        shares = dict(zip(CLASSES, reader(picture).softmax(1)[0], strict=True))
        found = shares["upper garment"] + shares["lower garment"]
        garments = torch.stack(list(cover.values())).amax(0)
        right.append(found[garments > 0.9].mean().item())
        empty.append(found[garments < 0.02].mean().item())
    assert np.mean(right) > 0.85
    assert np.mean(empty) < 0.1


def test_any_size_and_unit_scale(reader):
    assert reader.channels(torch.rand(2, 12, 64, 112)).shape == (2, CHANNELS, 8, 14)
    values = torch.cat([reader.channels(figure(seed)[0]) for seed in range(8)])
    assert 0.5 < values.std() < 1.6


def test_the_codec_carries_them_and_decodes_without_them():
    codec = LearnedCodec()
    picture, _ = figure(0)
    latents = codec.encode(picture.unflatten(1, (3, 4))[:, :, :1]).mean
    torch.testing.assert_close(latents[:, -CHANNELS:, 0], codec.scene_reader.channels(picture), atol=1e-5, rtol=1e-4)
    blind = latents.clone()
    blind[:, -CHANNELS:] = 0
    assert torch.equal(codec.decode(blind), codec.decode(latents))


def test_light_to_ship():
    assert WEIGHTS.stat().st_size < 400_000
