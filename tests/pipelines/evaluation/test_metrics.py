"""Video metrics against their definitions and against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from loomvideo.pipelines.evaluation import metrics


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (3, 40, 52, 3)).astype(np.float64)
    for axis in (1, 2):
        video = (video + np.roll(video, 1, axis) + np.roll(video, 2, axis)) / 3
    noisy = np.clip(video + rng.normal(0, 12, video.shape), 0, 255)
    return video.astype(np.uint8), noisy.astype(np.uint8)


def test_psnr_is_that_of_the_whole_video(pair):
    assert metrics.psnr_db(*pair) == pytest.approx(peak_signal_noise_ratio(pair[1], pair[0], data_range=255))


def test_psnr_of_a_known_difference():
    black = np.zeros((2, 8, 8, 3), np.uint8)
    assert metrics.psnr_db(black, black + 255) == 0
    assert metrics.psnr_db(black, black + 1) == pytest.approx(48.1308, abs=1e-4)
    assert metrics.psnr_db(black, black) == metrics.MAX_PSNR_DB


def test_mask_restricts_to_marked_pixels(pair):
    video, noisy = pair
    mixed = video.copy()
    mixed[:, :, 26:] = noisy[:, :, 26:]
    left = np.zeros(video.shape[:3], bool)
    left[:, :, :20] = True
    assert metrics.psnr_db(mixed, video, left) == metrics.MAX_PSNR_DB
    assert metrics.ssim(mixed, video, left) == pytest.approx(1)
    assert metrics.psnr_db(mixed, video, ~left) < metrics.psnr_db(mixed, video)
    assert np.isnan(metrics.psnr_db(mixed, video, np.zeros_like(left)))


def test_ssim_matches_scikit_image(pair):
    expected = np.mean(
        [
            structural_similarity(
                a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
            )
            for a, b in zip(*pair, strict=True)
        ]
    )
    assert metrics.ssim(*pair) == pytest.approx(expected, abs=1e-6)


def test_ms_ssim_of_one_scale_is_ssim_and_orders_quality(pair):
    video, noisy = pair
    small = (video[:, :16, :16], noisy[:, :16, :16])
    assert metrics.ms_ssim(*small) == pytest.approx(metrics.ssim(*small), abs=1e-9)
    worse = (noisy.astype(int) // 64 * 64).astype(np.uint8)
    assert metrics.ms_ssim(video, video) == pytest.approx(1)
    assert metrics.ms_ssim(video, worse) < metrics.ms_ssim(video, noisy) < 1


def test_ms_ssim_uses_the_five_published_scales():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (1, 176, 176, 3)).astype(np.uint8)
    shifted = np.clip(image.astype(int) + 10, 0, 255).astype(np.uint8)
    # A constant shift leaves contrast nearly intact: only the last scale's weight sees the luminance term.
    assert metrics.ms_ssim(image, shifted) > metrics.ssim(image, shifted) ** 0.5


def test_stability_measures_of_constructed_videos():
    still = np.full((6, 16, 16, 3), 100, np.uint8)
    blink = still.copy()
    blink[1::2] = 151
    ramp = (still + np.arange(6, dtype=np.uint8)[:, None, None, None] * 10).astype(np.uint8)
    assert metrics.temporal_flicker(still) == 1
    assert metrics.temporal_flicker(blink) == pytest.approx((255 - 51) / 255)
    assert metrics.jitter(ramp) == 0
    assert metrics.jitter(blink) == pytest.approx(102)
    assert metrics.freeze_ratio(still) == 1
    assert metrics.freeze_ratio(np.concatenate([still[:3], ramp[3:]])) == pytest.approx(2 / 5)
    assert metrics.brightness_drift(ramp) == pytest.approx(50)
    half_black = still.copy()
    half_black[3:] = 3
    assert metrics.black_ratio(half_black) == 0.5


def test_sharpness_falls_with_blur(pair):
    video, _ = pair
    blurred = ((video.astype(int) + np.roll(video, 1, 2)) // 2).astype(np.uint8)
    assert metrics.sharpness(blurred) < metrics.sharpness(video)


def test_shapes_and_types_are_checked(pair):
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.psnr_db(pair[0], pair[0][:2])
    with pytest.raises(ValueError, match="uint8"):
        metrics.sharpness(pair[0].astype(np.float32))
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(pair[0][:, :8], pair[1][:, :8])


def test_block_edge_ratio_sees_a_grid_and_nothing_else():
    smooth = np.tile(np.linspace(40, 200, 64).astype(np.uint8)[None, None, :, None], (2, 64, 1, 3))
    assert metrics.block_edge_ratio(smooth, smooth, 8) == 1
    random = np.random.default_rng(0)
    noisy = (smooth + random.integers(0, 12, smooth.shape)).astype(np.uint8)
    assert metrics.block_edge_ratio(noisy, noisy[::-1].copy(), 8) == pytest.approx(1, abs=0.05)
    blocks = noisy.copy()
    blocks[:, :, ::8] += 20
    assert metrics.block_edge_ratio(blocks, noisy, 8) > 2
    assert metrics.block_edge_ratio(blocks, noisy, 16) > 1.5
