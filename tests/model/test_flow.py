import math

import pytest
import torch

from loomvideo.model.flow import EPS, dynamic_shift, noised_and_target, sample_timestep, shift_time


def test_target_is_the_derivative_of_the_path():
    latents, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t, step = 0.4, 1e-6
    before, target = noised_and_target(latents, noise, t)
    after, _ = noised_and_target(latents, noise, t + step)
    torch.testing.assert_close((after - before) / step, target, atol=1e-8, rtol=1e-6)


def test_ends_of_the_path():
    latents, noise = torch.randn(2, 3, 1, 4, 4)
    torch.testing.assert_close(noised_and_target(latents, noise, 0.0)[0], latents + EPS * noise)
    torch.testing.assert_close(noised_and_target(latents, noise, 1.0)[0], noise)


def test_timesteps_are_logit_normal_after_undoing_the_shift():
    generator = torch.Generator().manual_seed(0)
    num_tokens, scale = 9750, 0.5
    drawn = torch.tensor([sample_timestep(generator, num_tokens, scale) for _ in range(4000)], dtype=torch.float64)
    shift = dynamic_shift(num_tokens, scale)
    normal = torch.logit(drawn / (shift - (shift - 1) * drawn))
    assert abs(normal.mean()) < 0.05
    assert normal.std() == pytest.approx(1, abs=0.04)


def test_shift_keeps_the_ends_and_moves_the_middle_towards_noise():
    assert shift_time(0.0, 5.0) == 0
    assert shift_time(1.0, 5.0) == 1
    assert shift_time(0.5, 5.0) == pytest.approx(5 / 6)


def test_dynamic_shift_is_clamped():
    assert dynamic_shift(1, 0.5) == 1
    assert dynamic_shift(2**40, 0.5) == 8
    assert dynamic_shift(256, 0.65) == pytest.approx(1 + 0.65 * math.log2(4))
