"""The definitions against independent formulas, and their gradients in float64."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck

from loomvideo.model import kernels
from loomvideo.model.kernels.rope import axis_sizes, token_angles

VECTORS = Path(os.environ.get("LOOMVIDEO_SHARED", Path(__file__).parents[4] / "shared")) / "reference_vectors"


def rotate_by_complex_numbers(x, positions, num_heads, theta=10000.0):
    """RoPE as a product of complex numbers in float64, head by head."""
    head_dim = x.shape[-1] // num_heads
    angles = []
    for axis, size in enumerate(axis_sizes(head_dim)):
        frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles.append(positions[:, axis, None].double() * frequencies)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, dim=1))
    pairs = torch.view_as_complex(x.double().reshape(len(x), num_heads, head_dim // 2, 2).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(1)


def test_axis_split_of_the_published_head():
    assert axis_sizes(128) == (44, 42, 42)
    assert axis_sizes(32) == (12, 10, 10)


def test_qk_norm_rope_turns_pairs_by_signed_positions():
    torch.manual_seed(0)
    q, k = torch.randn(5, 64), torch.randn(5, 64)
    weight = torch.randn(64)
    positions = torch.tensor([[0, 0, 0], [3, 1, 2], [-10, 0, 4], [-20, 3, 0], [7, 1023, 9]], dtype=torch.int32)
    got_q, got_k = kernels.qk_norm_rope(q, k, weight, weight, positions, num_heads=2, eps=1e-6)
    for got, x in ((got_q, q), (got_k, k)):
        normed = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
        torch.testing.assert_close(got.double(), rotate_by_complex_numbers(normed, positions, 2), rtol=1e-5, atol=1e-5)


def test_rounding_the_norm_is_a_choice_in_bfloat16_and_none_in_float32():
    torch.manual_seed(1)
    q = torch.randn(64, 96).bfloat16()
    positions = torch.randint(0, 20, (64, 3), dtype=torch.int32)
    arguments = (torch.ones(96), torch.ones(96), positions, 3, 1e-6)
    rounded, _ = kernels.qk_norm_rope(q, q, *arguments, round_norm=True)
    exact, _ = kernels.qk_norm_rope(q, q, *arguments, round_norm=False)
    assert not torch.equal(rounded, exact)
    in_float = [kernels.qk_norm_rope(q.float(), q.float(), *arguments, round_norm=r)[0] for r in (True, False)]
    assert torch.equal(*in_float)


@pytest.mark.skipif(not VECTORS.is_dir(), reason="reference vectors absent")
def test_angles_equal_the_published_tables_bit_for_bit():
    vectors = load_file(VECTORS / "vectors.safetensors")
    for name, t0, num_frames in (("rope", 0, 3), ("rope.ref-10", -10, 1), ("rope.ref-20", -20, 1)):
        axes = torch.arange(t0, t0 + num_frames), torch.arange(2), torch.arange(3)
        cos, sin = token_angles(torch.cartesian_prod(*axes), 32, 10000.0, torch.float32)
        assert torch.equal(cos.repeat_interleave(2, dim=1), vectors[f"{name}.cos"][0, :, 0])
        assert torch.equal(sin.repeat_interleave(2, dim=1), vectors[f"{name}.sin"][0, :, 0])


def test_scale_and_add_keeps_the_source_bias_without_a_source_and_drops_it_for_references():
    torch.manual_seed(2)
    weights = [torch.randn(8, 6), torch.randn(8), torch.randn(8, 6), torch.randn(8)]
    patches, source = torch.randn(4, 6), torch.randn(4, 6)
    source[1] = 0
    rows = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    out = kernels.scale_and_add(patches, source, torch.tensor([0.25, 0.5]), rows, *weights)
    plain = patches @ weights[0].T + weights[1]
    torch.testing.assert_close(out[0], plain[0] + 0.25 * (weights[2] @ source[0] + weights[3]))
    torch.testing.assert_close(out[1], plain[1] + 0.5 * weights[3])
    torch.testing.assert_close(out[2:], plain[2:])


def test_residual_norm_equals_its_parts():
    torch.manual_seed(3)
    x, y = torch.randn(7, 12).bfloat16(), torch.randn(7, 12).bfloat16()
    gate, shift, scale = torch.randn(3, 3, 12)
    rows = torch.tensor([0, 0, 2, 2, 2, 0, 1], dtype=torch.int32)
    hidden, normed = kernels.residual_norm(x, y, gate, shift, scale, rows, 1e-6)
    assert torch.equal(hidden, kernels.gated_residual(x, y, gate, rows))
    assert torch.equal(normed, kernels.layer_norm_modulate(hidden, shift, scale, rows, 1e-6))
    hidden, normed = kernels.residual_norm(x, y, None, shift[0], scale[0], rows, 1e-6, affine=True)
    assert torch.equal(hidden, x + y)
    assert torch.equal(normed, kernels.layer_norm(hidden, scale[0], shift[0], 1e-6))


def leaves(*shapes):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


ROWS = torch.tensor([0, 0, 2, 2, 1], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 0, 0], [1, 2, 3], [-10, 0, 1], [-20, 1, 0], [5, 4, 3]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda p, s, t, *w: kernels.scale_and_add(p, s, t, ROWS, *w), [(5, 3), (5, 3), 2, (4, 3), 4, (4, 3), 4]),
        (lambda q, k, a, b: kernels.qk_norm_rope(q, k, a, b, POSITIONS, 2, 1e-6), [(5, 24), (5, 24), 24, 24]),
        (lambda x, w: kernels.rms_norm(x, w, 1e-6), [(5, 6), 6]),
        (lambda x, w, b: kernels.layer_norm(x, w, b, 1e-6), [(5, 6), 6, 6]),
        (lambda x, b, w: kernels.layer_norm_modulate(x, b, w, ROWS, 1e-6), [(5, 6), (3, 6), (3, 6)]),
        (lambda x, y, g: kernels.gated_residual(x, y, g, ROWS), [(5, 6), (5, 6), (3, 6)]),
        (
            lambda x, y, g, b, w: kernels.residual_norm(x, y, g, b, w, ROWS, 1e-6),
            [(5, 6), (5, 6), (3, 6), (3, 6), (3, 6)],
        ),
    ],
    ids=["scale_and_add", "qk_norm_rope", "rms_norm", "layer_norm", "modulate", "residual", "residual_norm"],
)
def test_gradients_in_float64(function, inputs):
    assert gradcheck(function, leaves(*inputs))
