"""The arithmetic of learned metrics on features with known answers; networks are not part of the tests."""

import numpy as np
import pytest

from loomvideo.pipelines.evaluation.learned import (
    cosine_rows,
    kernel_distance,
    learned_metrics,
    temporal_similarity,
)
from loomvideo.platform.errors import UserError


def test_similarities_over_time():
    a, b = np.array([1.0, 0]), np.array([0, 1.0])
    assert cosine_rows(np.stack([a, b]), np.stack([2 * a, a])) == pytest.approx([1, 0])
    assert temporal_similarity(np.stack([a, a, a])) == pytest.approx(1)
    # Frame 2 differs from both the first and the previous one, frame 3 from the previous one only.
    assert temporal_similarity(np.stack([a, b, a])) == pytest.approx((0 + 0.5) / 2)
    assert temporal_similarity(np.stack([a, -a])) == 0


def test_kernel_distance_is_unbiased_and_grows_with_a_shift():
    rng = np.random.default_rng(0)
    same = [kernel_distance(rng.normal(size=(60, 8)), rng.normal(size=(60, 8))) for _ in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(40)
    assert kernel_distance(rng.normal(size=(60, 8)), rng.normal(1.0, size=(60, 8))) > 10 * np.std(same)
    with pytest.raises(ValueError, match="two samples"):
        kernel_distance(np.ones((1, 4)), np.ones((5, 4)))


def test_unknown_learned_metrics_are_named():
    with pytest.raises(UserError, match="'fid' is unknown; choose from lpips, clip, dino"):
        learned_metrics(["lpips", "fid"])
