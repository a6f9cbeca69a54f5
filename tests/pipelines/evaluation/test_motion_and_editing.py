"""Motion and edit measures on videos whose motion and edits are known."""

import cv2
import numpy as np
import pytest

from loomvideo.pipelines.evaluation import editing, motion


def textured(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)


def panning(frames=5, step=(2, 0), size=96, seed=0):
    """A window moving over a texture: the content moves by -step pixels a frame."""
    canvas = textured(size + 40, size + 40, seed)
    corners = [(20 + step[1] * i, 20 + step[0] * i) for i in range(frames)]
    return np.stack([canvas[y : y + size, x : x + size] for y, x in corners])


def test_flow_measures_a_known_pan():
    flow = motion.flow_sequence(panning(step=(2, 0)))
    inner = flow[:, 16:-16, 16:-16]
    assert np.median(inner[..., 0]) == pytest.approx(-2, abs=0.2)
    assert np.median(inner[..., 1]) == pytest.approx(0, abs=0.2)
    assert motion.motion_amount(panning(step=(2, 0))) == pytest.approx(2, abs=0.4)


def test_warp_error_sees_flicker_but_not_motion():
    steady = panning()
    rng = np.random.default_rng(1)
    boiling = np.clip(steady + rng.normal(0, 25, steady.shape), 0, 255).astype(np.uint8)
    plain_difference = np.abs(steady[1:].astype(int) - steady[:-1]).mean()
    assert motion.warp_error(steady) < 0.25 * plain_difference
    assert motion.warp_error(boiling) > 4 * motion.warp_error(steady)
    assert motion.warp_error(steady[:1]) == 0


def test_motion_fidelity_orders_same_recoloured_and_reversed():
    source = panning()
    recoloured = (source * np.array([1.0, 0.8, 0.6])).astype(np.uint8)
    same = motion.motion_fidelity(recoloured, source)
    reverse = motion.motion_fidelity(source[::-1].copy(), source)
    assert same.direction_cosine > 0.95
    assert same.magnitude_ratio == pytest.approx(1, abs=0.1)
    assert reverse.direction_cosine < -0.9
    assert same.endpoint_error < 0.3 < reverse.endpoint_error
    still = np.repeat(source[:1], 4, 0)
    assert np.isnan(motion.motion_fidelity(still, still).direction_cosine)


@pytest.fixture
def edit():
    source = panning(step=(0, 0))
    mask = np.zeros(source.shape[:3], bool)
    mask[:, 20:60, 30:70] = True
    edited = source.copy()
    edited[mask] = (200, 30, 40)
    return source, edited, mask


def test_change_mask_area_and_locality(edit):
    source, edited, mask = edit
    changed = editing.change_mask(edited, source)
    overlap = (changed & mask).sum() / (changed | mask).sum()
    assert overlap > 0.85
    assert editing.edited_area(edited, source) == pytest.approx(mask.mean(), abs=0.03)
    assert editing.edit_locality(edited, source, mask) > 0.9
    spill = edited.copy()
    spill[:, 75:95, 5:25] = 255 - spill[:, 75:95, 5:25]
    assert editing.edit_locality(spill, source, mask) < editing.edit_locality(edited, source, mask)
    assert editing.edit_locality(spill, source) < 0.95
    assert np.isnan(editing.edit_locality(source, source))
    assert editing.edit_strength(source, source) == 0 < editing.edit_strength(edited, source)


def test_preservation_looks_outside_the_mask_only(edit):
    source, edited, mask = edit
    kept = editing.preservation(edited, source, mask)
    assert kept["outside_psnr_db"] == 100
    assert kept["outside_ssim"] == pytest.approx(1)
    assert np.isnan(editing.preservation(edited, source, np.ones_like(mask))["outside_ssim"])


def test_garment_colour_difference(edit):
    source, edited, mask = edit
    product = np.full((1, 40, 40, 3), 255, np.uint8)
    product[:, 8:32, 8:32] = (200, 30, 40)
    assert editing.garment_delta_e(edited, mask, product) < 0.01
    assert editing.garment_delta_e(source, mask, product) > 10
    wrong = edited.copy()
    wrong[mask] = (30, 60, 200)
    assert editing.garment_delta_e(wrong, mask, product) > 30


def test_histogram_distance_and_edges(edit):
    source, edited, _ = edit
    assert editing.colour_histogram_distance(source, source) == pytest.approx(0, abs=1e-6)
    assert editing.colour_histogram_distance(edited, source) > 0.1
    black, white = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    assert editing.colour_histogram_distance(black, white) == 1
    assert editing.edge_f1(source, source) == 1
    assert editing.edge_f1(panning(step=(0, 0), seed=5), source) < 0.8


def test_nearest_colour_goes_by_most_pixels(edit):
    _, edited, mask = edit
    palette = {"red": (205, 34, 46), "blue": (42, 88, 196), "white": (244, 242, 236)}
    assert editing.nearest_colour(edited, mask, palette) == "red"
    striped = edited.copy()
    striped[:, :, 30:60] = (240, 240, 240)
    assert editing.nearest_colour(striped, mask, palette) == "white"
    assert editing.nearest_colour(striped, mask, palette, without="white") == "red"
    # A pattern finer than pixels: between red and white, nearer to pink than to red.
    blurred = np.broadcast_to(np.uint8([225, 138, 141]), edited.shape)
    palette["pink"] = (243, 132, 176)
    assert editing.nearest_colour(blurred, mask, palette, without="white") == "pink"
    assert editing.nearest_colour(blurred, mask, palette, without="white", mixed=True) == "red"
