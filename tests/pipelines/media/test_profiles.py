"""Colours of garments survive the profiles of phones, cameras and presses."""

import numpy as np
import pytest
from fixtures import profiles
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from loomvideo.pipelines.media.decode import open_media

# Beige, navy, burgundy, olive, blush, charcoal, denim, white: within sRGB, so that every wider space has them.
FASHION = np.array(
    [(214, 196, 168), (24, 38, 78), (110, 20, 40), (96, 104, 56), (236, 190, 190), (54, 54, 58), (70, 110, 160),
     (250, 248, 245)],
    np.uint8,
)  # fmt: skip


def decoded(path):
    return next(open_media(str(path)).read([0]))[0][8, 8::16]


def difference(found, wanted):
    return deltaE_ciede2000(rgb2lab(found / 255), rgb2lab(wanted / 255)).max()


@pytest.mark.parametrize("space", ["srgb", "display-p3", "adobe-rgb"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_rgb_spaces(tmp_path, space, suffix):
    pixels = profiles.numbers_in(space, FASHION)[None].repeat(16, axis=0).repeat(16, axis=1)
    options = {"quality": 98} if suffix in ("jpg", "webp") else {}
    Image.fromarray(pixels).save(tmp_path / f"p.{suffix}", icc_profile=profiles.rgb_profile(space), **options)
    assert difference(decoded(tmp_path / f"p.{suffix}"), FASHION) < 2
    if space != "srgb" and suffix == "png":
        assert difference(pixels[8, 8::16], FASHION) > 2, "the numbers alone are other colours"


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_inks_of_a_press(tmp_path, suffix):
    inks = np.array(list(profiles.INKS), np.uint8) * 255
    pixels = inks[None].repeat(16, axis=0).repeat(16, axis=1)
    options = {"quality": 98} if suffix == "jpg" else {}
    image = Image.frombytes("CMYK", pixels.shape[1::-1], pixels.tobytes())
    image.save(tmp_path / f"p.{suffix}", icc_profile=profiles.cmyk_profile(), **options)
    assert difference(decoded(tmp_path / f"p.{suffix}"), np.array(list(profiles.INKS.values()))) < 2
