import numpy as np
import pytest
from PIL import Image

from loomvideo.model.codec import LatentGrid
from loomvideo.model.media_inputs import as_clip, as_picture, fit_clip, fit_picture
from loomvideo.platform.errors import UserError

GRID = LatentGrid(4, 16)
PIXELS = np.random.default_rng(0).integers(0, 255, (8, 50, 70, 3), dtype=np.uint8)


def test_arrays_and_pillow_images_are_the_same():
    pictures = [Image.fromarray(frame) for frame in PIXELS]
    assert np.array_equal(as_clip(pictures), PIXELS)
    assert np.array_equal(as_clip(PIXELS), PIXELS)
    assert np.array_equal(as_clip(pictures[0]), PIXELS[:1])
    assert np.array_equal(as_clip(PIXELS[0]), PIXELS[:1])
    assert as_picture(pictures[0].convert("RGBA")).shape == (50, 70, 3)


def test_clips_are_resampled_cut_and_brought_to_their_bucket():
    assert fit_clip(PIXELS, [64], 97, 24.0, GRID).shape == (5, 64, 96, 3)
    assert fit_clip(PIXELS, [64], 97, 12.0, GRID).shape == (13, 64, 96, 3)
    assert fit_clip(PIXELS, [64], 9, 12.0, GRID).shape == (9, 64, 96, 3)
    assert fit_picture(Image.fromarray(PIXELS[0]), [64]).shape == (64, 96, 3)


@pytest.mark.parametrize("bad", [PIXELS.astype(float), PIXELS[..., :2], [], [PIXELS[0], PIXELS[0, :40]]])
def test_what_is_no_clip(bad):
    with pytest.raises(UserError, match=r"^(picture|clip) of [^\n]*$"):
        as_clip(bad)
