import pytest
import torch

from loomvideo.model.packing import DiTSample, pack


def make_sample(shape=(4, 2, 4, 6), tokens=5, references=(), source=False, seed=0, layers=2):
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator)

    return DiTSample(
        latents=random(*shape),
        timestep=700.0,
        mllm_states=random(layers, tokens, 8),
        source=random(*shape) if source else None,
        source_scale=0.7,
        references=[random(shape[0], 1, *size) for size in references],
    )


def test_layout():
    batch = pack([make_sample(references=[(2, 4)], source=True), make_sample((4, 1, 2, 2), tokens=3)])
    assert batch.num_samples == 2
    assert (batch.num_tokens, batch.num_video_tokens, batch.num_mllm_tokens) == (12 + 2 + 1, 12 + 1, 8)
    assert batch.num_loss_elements == 4 * 2 * 4 * 6 + 4 * 2 * 2
    assert batch.row_ids.tolist() == [0] * 12 + [2] * 2 + [1]
    assert batch.video_index.tolist() == [*range(12), 14]
    assert batch.positions[:4].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]]
    assert batch.positions[12:].tolist() == [[-10, 0, 0], [-10, 0, 1], [0, 0, 0]]
    assert batch.self_plan.query_offsets.tolist() == [0, 14, 15]
    assert batch.cross_plan.key_offsets.tolist() == [0, 5, 8]
    assert batch.source_patches[:12].abs().min() > 0
    assert not batch.source_patches[12:].any()


def test_references_count_down_in_tens():
    batch = pack([make_sample(references=[(2, 2), (2, 2), (2, 2)])])
    assert batch.positions[-3:, 0].tolist() == [-10, -20, -30]


def test_patches_read_like_a_convolution():
    sample = make_sample()
    weight = torch.randn(7, 4, 1, 2, 2)
    expected = torch.nn.functional.conv3d(sample.latents[None], weight, stride=(1, 2, 2))[0].flatten(1).T
    torch.testing.assert_close(pack([sample]).patches @ weight.flatten(1).T, expected)


def test_unpack_inverts_pack_targets():
    samples = [make_sample(references=[(2, 4)]), make_sample((4, 1, 2, 2)), make_sample((4, 3, 6, 2))]
    batch = pack(samples)
    latents = [sample.latents for sample in samples]
    for restored, expected in zip(batch.unpack(batch.pack_targets(latents)), latents, strict=True):
        assert torch.equal(restored, expected)


def test_sums_per_sample():
    samples = [make_sample(references=[(2, 4)]), make_sample((4, 1, 2, 2), seed=1)]
    batch = pack(samples)
    values = batch.pack_targets([sample.latents for sample in samples])
    expected = torch.stack([sample.latents.sum() for sample in samples])
    torch.testing.assert_close(batch.sum_per_sample(values), expected)


def test_dtype_applies_to_what_layers_compute_in():
    batch = pack([make_sample(references=[(2, 4)])]).to(dtype=torch.bfloat16)
    assert batch.patches.dtype == batch.source_patches.dtype == batch.mllm_states.dtype == torch.bfloat16
    assert batch.timesteps.dtype == batch.source_scale.dtype == torch.float32
    assert batch.positions.dtype == batch.row_ids.dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.zeros(4, 1, 4, 6)}, "source"),
        ({"references": [torch.zeros(4, 2, 4, 6)]}, "one latent frame"),
        ({"references": [torch.zeros(3, 1, 4, 6)]}, "reference"),
        ({"latents": torch.zeros(4, 2, 3, 6)}, "divide into patches"),
        ({"mllm_states": torch.zeros(2, 0, 8)}, "mllm_states"),
    ],
)
def test_misfits_are_named(change, message):
    sample = make_sample()
    for name, value in change.items():
        setattr(sample, name, value)
    with pytest.raises(ValueError, match=message):
        pack([make_sample(), sample])
