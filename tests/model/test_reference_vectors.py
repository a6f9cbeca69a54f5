"""Equality with the published model, on vectors computed by its own code. All sizes are read from the files."""

import itertools
import math

import pytest
import torch
from fixtures.reference import (
    TOLERANCE,
    reference_config,
    reference_dit,
    reference_dit_config,
    reference_sample,
    reference_vectors,
    requires_reference_vectors,
)

from loomvideo.model.flow import dynamic_shift, noised_and_target
from loomvideo.model.guidance import FULL, UNCONDITIONAL, VISUAL, Guidance
from loomvideo.model.kernels.rope import token_angles
from loomvideo.model.packing import pack
from loomvideo.model.sampler import Branch, SchedulerConfig, sample

pytestmark = requires_reference_vectors


@torch.no_grad()
def test_velocities_of_the_packed_samples():
    samples = [reference_sample(index) for index in range(len(reference_config()["samples"]))]
    batch = pack(samples, reference_dit_config().patch_size)
    velocities = batch.unpack(reference_dit()(batch))
    for index, velocity in enumerate(velocities):
        torch.testing.assert_close(velocity, reference_vectors()[f"{index}.velocity"][0], **TOLERANCE)


@torch.no_grad()
def test_velocities_of_each_sample_alone():
    model = reference_dit()
    for index in range(len(reference_config()["samples"])):
        batch = pack([reference_sample(index)], model.config.patch_size)
        (velocity,) = batch.unpack(model(batch))
        torch.testing.assert_close(velocity, reference_vectors()[f"{index}.velocity"][0], **TOLERANCE)


@pytest.mark.parametrize("batch_branches", [False, True])
def test_guided_trajectory(batch_branches):
    vectors, case, model = reference_vectors(), reference_config()["cfg"], reference_dit()
    inputs = reference_sample(case["sample"])
    num_layers = model.config.num_layers
    scheduler = SchedulerConfig(flow_shift=case["flow_shift"])
    branches = {
        FULL: Branch(vectors["cfg.full"][-num_layers:], inputs.source, inputs.references),
        VISUAL: Branch(vectors["cfg.visual"][-num_layers:], inputs.source, inputs.references),
        UNCONDITIONAL: Branch(vectors["cfg.uncond"][-num_layers:]),
    }
    solver = scheduler.build(case["steps"])
    torch.testing.assert_close(solver.timesteps.float(), vectors["cfg.timesteps"], rtol=0, atol=0)
    torch.testing.assert_close(solver.sigmas, vectors["cfg.sigmas"])
    final = sample(
        model,
        vectors["cfg.initial"][0],
        branches,
        Guidance(case["guidance_scale"], case["guidance_scale_visual"]),
        case["steps"],
        scheduler,
        batch_branches,
    )
    torch.testing.assert_close(final, vectors["cfg.final"][0], **TOLERANCE)


def test_flow_matching_objective():
    vectors = reference_vectors()
    noised, target = noised_and_target(vectors["fm.latents"], vectors["fm.noise"], vectors["fm.t"].item())
    torch.testing.assert_close(noised, vectors["fm.z_t"])
    torch.testing.assert_close(target, vectors["fm.target"])


def test_dynamic_shifts():
    for num_tokens, by_scale in reference_config()["dynamic_shift"].items():
        for scale, shift in by_scale.items():
            assert dynamic_shift(int(num_tokens), float(scale)) == pytest.approx(shift, rel=1e-12)


def test_rope_tables():
    """The files hold tables of one grid and of references of the same height and width at negative times."""
    vectors, sizes = reference_vectors(), reference_dit_config()
    references = [name.removesuffix(".cos") for name in vectors if name.startswith("rope.ref") and name.endswith("cos")]
    num_tokens, area = vectors["rope.cos"].shape[1], vectors[f"{references[0]}.cos"].shape[1]
    frames = num_tokens // area
    assert references
    assert frames * area == num_tokens

    def agree(name: str, times: range, height: int) -> bool:
        axes = (times, range(height), range(area // height))
        positions = torch.tensor(list(itertools.product(*axes)), dtype=torch.int32)
        angles = token_angles(positions, sizes.attention_head_dim, sizes.rope_theta, torch.float32)
        tables = [table.repeat_interleave(2, dim=1) for table in angles]
        expected = [vectors[f"{name}.{part}"][0, :, 0].float() for part in ("cos", "sin")]
        return all(torch.allclose(*pair, atol=1e-6) for pair in zip(tables, expected, strict=True))

    heights = [height for height in range(1, area + 1) if area % height == 0 and agree("rope", range(frames), height)]
    assert len(heights) == 1, f"no grid of {frames} x {area} tokens has these tables"
    for name in references:
        time = -int(math.fabs(int(name.removeprefix("rope.ref"))))
        assert agree(name, range(time, time + 1), heights[0]), name
