"""Strides come from the codec: the same arithmetic at every stride, and a whole edit with a finer codec."""

import numpy as np
import pytest
import torch

from loomvideo.model.clips import clip_indices
from loomvideo.model.codec import CodecConfig, LatentGrid, LatentMoments, build_codec
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.sizes import model_size
from loomvideo.platform.errors import UserError


@pytest.mark.parametrize("temporal", [1, 4, 8])
@pytest.mark.parametrize("spatial", [4, 8, 16])
def test_frames_and_cells_go_there_and_back(temporal, spatial):
    grid = LatentGrid(temporal, spatial)
    for num_frames in range(1, 50):
        whole = grid.whole_frames(num_frames)
        assert num_frames - temporal < whole <= num_frames
        assert grid.frames(grid.latent_frames(whole)) == whole
    _, rows, columns = grid.latent_shape(1, 96, 64)
    assert grid.size(rows, columns) == (96, 64)
    assert grid.side_multiples == (2 * spatial, 2 * spatial)
    assert len(clip_indices(24, 100, 33, 0.0, grid)) == grid.whole_frames(33)


def test_published_token_counts():
    grid = model_size("5b").grid
    assert grid.num_tokens(97, 832, 480) == 9_750
    assert grid.num_tokens(121, 832, 480) == 12_090
    assert grid.num_tokens(121, 1280, 704) == 27_280


def test_refusals_name_the_key_and_a_fix():
    grid = LatentGrid(8, 4)
    with pytest.raises(UserError, match=r"clips\.num_frames=12: must be 8k\+1, for example 9"):
        grid.check_frames("clips.num_frames", 12)
    with pytest.raises(UserError, match="size=100x64: sides must be multiples of 8"):
        grid.check_size("size", 100, 64)
    with pytest.raises(UserError, match="strides 4 in time and 16 in space, the preset says 4 and 8"):
        build_codec(CodecConfig(latent_channels=16, spatial_stride=8))


class MeanCodec:
    """Block means, twice as fine as Wan's in space and time."""

    latent_channels, spatial_stride, temporal_stride, fingerprint = model_size("tiny").dit.in_channels, 8, 2, "mean"

    def encode(self, video):
        first = video[:, :, :1].repeat_interleave(2, 2)
        means = torch.nn.functional.avg_pool3d(torch.cat([first, video[:, :, 1:]], 2), (2, 8, 8))
        mean = torch.nn.functional.pad(means, (0, 0) * 3 + (0, self.latent_channels - 3))
        return LatentMoments(mean, torch.zeros_like(mean))

    def decode_stream(self, latents):
        video = latents[:, :3].repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        yield video[:, :, 1:]


def test_a_finer_codec_edits():
    model = model_size("tiny")
    pipeline = LoomVideoPipeline(LoomVideoDiT(model.dit), MeanCodec(), FrozenMLLM.of_size(model))
    source = np.random.default_rng(0).integers(0, 255, (7, 48, 64, 3), dtype=np.uint8)
    conditions = pipeline.encode("video_edit", "make it red", source)
    assert conditions.latent_shape == (model.dit.in_channels, 4, 6, 8)
    assert pipeline.denoise(conditions, steps=1).shape == source.shape
    with pytest.raises(UserError, match=r"num_frames=6: must be 2k\+1"):
        pipeline.encode("video_edit", "make it red", source[:6])
