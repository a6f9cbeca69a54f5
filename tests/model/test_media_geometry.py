"""Buckets, resizing and clip indices; equality with the published ones is in test_reference_conditioning."""

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from loomvideo.model import buckets, clips
from loomvideo.model.codec import LatentGrid
from loomvideo.platform.errors import UserError


@pytest.mark.parametrize("kind", ["image", "video"])
def test_every_bucket_is_a_multiple_of_32_and_chooses_itself(kind):
    for key, sizes in buckets.buckets(kind).items():
        for size in sizes:
            assert size[0] % 32 == 0
            assert size[1] % 32 == 0
            assert buckets.choose_bucket(*size, [key], kind) == size


def test_choose_bucket_refuses_unknown_class():
    with pytest.raises(UserError, match="300"):
        buckets.choose_bucket(100, 100, ["300"], "image")


@pytest.mark.parametrize(("size", "bucket"), [((97, 33), (64, 64)), ((33, 97), (96, 64)), ((64, 64), (64, 64))])
def test_resize_and_crop_fills_the_bucket(size, bucket):
    frames = torch.full((3, size[1], size[0], 3), 77, dtype=torch.uint8)
    out = buckets.resize_and_crop(frames, bucket)
    assert out.shape == (3, bucket[1], bucket[0], 3)
    assert out.unique().tolist() == [77]


def test_resize_and_crop_keeps_the_centre():
    frame = np.zeros((1, 64, 192, 3), np.uint8)
    frame[:, :, 64:128] = 200
    assert buckets.resize_and_crop(frame, (64, 64)).min() == 200


def test_resize_agrees_with_pillow():
    image = skimage.data.astronaut()
    ours = buckets.resize_frames(torch.as_tensor(image)[None], 128, 160)[0].int()
    pillow = torch.as_tensor(np.asarray(Image.fromarray(image).resize((160, 128), Image.BICUBIC)).copy()).int()
    assert (ours - pillow).abs().max() <= 2


@pytest.mark.parametrize("total", [1, 2, 5, 40, 200])
@pytest.mark.parametrize("fps", [8, 23.976, 60])
@pytest.mark.parametrize("start", [0.0, 0.37, 1.0])
def test_clip_indices_are_4k_plus_1_and_inside(total, fps, start):
    indices = clips.clip_indices(fps, total, 33, start, LatentGrid(4, 16))
    assert len(indices) % 4 == 1
    assert indices == sorted(indices)
    assert 0 <= indices[0] <= indices[-1] < total


def test_clip_indices_refuses_an_empty_file():
    with pytest.raises(UserError, match="0 frames"):
        clips.clip_indices(24, 0, 33, 0.0, LatentGrid(4, 16))


def test_mllm_frames_include_both_ends():
    assert clips.mllm_frame_indices(15) == list(range(15))
    assert clips.mllm_frame_indices(16) == [0]
    for total in range(30, 300):
        indices = clips.mllm_frame_indices(total)
        assert (indices[0], indices[-1]) == (0, total - 1)
        assert len(indices) == total // 15
