import pytest
import torch
from fixtures.dit_samples import random_model, random_sample

from loomvideo.model.config import DiTConfig
from loomvideo.model.guidance import FULL, UNCONDITIONAL, VISUAL, Guidance
from loomvideo.model.packing import DiTSample, pack
from loomvideo.model.sampler import Branch, GuidedVelocity, SchedulerConfig, sample
from loomvideo.model.shortcuts import BlockCache, Shortcuts
from loomvideo.platform.errors import UserError

CONFIG = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=48, in_channels=4, mllm_dim=12, freq_dim=16
)


def make_branches(references=((2, 4),)):
    full = random_sample(CONFIG, (2, 4, 6), 7, references=references, source=True, seed=1)
    empty = random_sample(CONFIG, (2, 4, 6), 3, seed=2)
    visual = random_sample(CONFIG, (2, 4, 6), 5, seed=3)
    branches = {
        FULL: Branch(full.mllm_states, full.source, full.references),
        VISUAL: Branch(visual.mllm_states, full.source, full.references),
        UNCONDITIONAL: Branch(empty.mllm_states),
    }
    return full.latents, branches


def plain_sample(model, latents, branches, guidance, steps, shortcuts=None):
    """Every branch packed and computed from scratch at every step."""
    shortcuts = shortcuts or Shortcuts()
    solver = SchedulerConfig().build(steps)
    age = shortcuts.branch_refresh
    for timestep in solver.timesteps:
        velocity = {}
        for name, branch in branches.items():
            step = DiTSample(
                latents, timestep.item(), branch.mllm_states, branch.source, timestep.item() / 1000, branch.references
            )
            batch = pack([step])
            (velocity[name],) = batch.unpack(model(batch))
        unconditional = velocity[UNCONDITIONAL]
        if guidance.visual_scale is None:
            guided = unconditional + guidance.scale * (velocity[FULL] - unconditional)
        else:
            guided = (
                unconditional
                + guidance.visual_scale * (velocity[VISUAL] - unconditional)
                + guidance.scale * (velocity[FULL] - velocity[VISUAL])
            )
        if not shortcuts.guidance_to <= timestep.item() / 1000 <= shortcuts.guidance_from:
            guided = velocity[FULL]
        elif age == shortcuts.branch_refresh:
            difference, age = guided - velocity[FULL], 1
        else:
            guided, age = velocity[FULL] + difference, age + 1
        latents = solver.step(guided, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("batch_branches", [False, True])
@pytest.mark.parametrize("guidance", [Guidance(2.5, 1.5), Guidance(5.0)])
@pytest.mark.parametrize("references", [(), ((2, 4), (4, 2))])
def test_equal_to_the_plain_path(batch_branches, guidance, references):
    model = random_model(CONFIG)
    initial, branches = make_branches(references)
    seen = []
    final = sample(
        model, initial, branches, guidance, 5, batch_branches=batch_branches, on_step=lambda step, _: seen.append(step)
    )
    with torch.no_grad():
        expected = plain_sample(model, initial, branches, guidance, 5)
    torch.testing.assert_close(final, expected, rtol=1e-4, atol=1e-4)
    assert seen == list(range(5))


@pytest.mark.parametrize("batch_branches", [False, True])
@pytest.mark.parametrize("shortcuts", [Shortcuts(), Shortcuts(guidance_to=0.9)])
def test_several_videos_in_one_pass_are_what_each_is_alone(batch_branches, shortcuts):
    model = random_model(CONFIG)
    initial, branches = make_branches()
    noises = torch.stack([initial, initial.flip(0), 2 * initial])
    made = sample(model, noises, branches, Guidance(2.5, 1.5), 4, None, batch_branches, shortcuts=shortcuts)
    alone = [sample(model, noise, branches, Guidance(2.5, 1.5), 4, shortcuts=shortcuts) for noise in noises]
    torch.testing.assert_close(made, torch.stack(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_branches", [False, True])
@pytest.mark.parametrize(
    "shortcuts",
    [Shortcuts(branch_refresh=3), Shortcuts(guidance_to=0.9), Shortcuts(branch_refresh=2, guidance_from=0.98)],
)
def test_left_out_branches_are_those_that_the_shortcut_names(batch_branches, shortcuts):
    model = random_model(CONFIG)
    initial, branches = make_branches()
    final = sample(model, initial, branches, Guidance(2.5, 1.5), 7, None, batch_branches, shortcuts=shortcuts)
    with torch.no_grad():
        expected = plain_sample(model, initial, branches, Guidance(2.5, 1.5), 7, shortcuts)
        exact = plain_sample(model, initial, branches, Guidance(2.5, 1.5), 7)
    torch.testing.assert_close(final, expected, rtol=1e-4, atol=1e-4)
    assert (final - exact).abs().max() > 1e-2


def test_fewer_steps_are_what_the_scheduler_makes_of_them():
    initial, branches = make_branches()
    model = random_model(CONFIG)
    fewer = sample(model, initial, branches, Guidance(2.5, 1.5), 9, shortcuts=Shortcuts(steps=4))
    assert torch.equal(fewer, sample(model, initial, branches, Guidance(2.5, 1.5), 4))


def test_step_cache_skips_blocks_and_is_exact_where_nothing_may_change():
    initial, branches = make_branches()
    model = random_model(CONFIG)
    calls = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))

    def run(threshold):
        calls.clear()
        return sample(model, initial, branches, Guidance(2.5, 1.5), 8, shortcuts=Shortcuts(step_cache=threshold))

    exact, never = run(0.0), run(1e-9)
    assert len(calls) == 24
    torch.testing.assert_close(never, exact, rtol=1e-4, atol=1e-4)
    some = run(0.05)
    assert 3 < len(calls) < 24
    assert 0 < (some - exact).square().mean() / exact.square().mean() < 0.1
    run(1e9)
    assert len(calls) == 3


def test_block_cache_compares_with_the_last_full_step():
    cache = BlockCache(0.1)
    assert cache.reuse(torch.full((4,), 1.0)) is None
    cache.keep(torch.full((4,), 7.0))
    assert cache.reuse(torch.full((4,), 1.09))[0] == 7
    # Within a tenth of the one before, but not of the one whose blocks ran.
    assert cache.reuse(torch.full((4,), 1.18)) is None
    cache.keep(torch.full((4,), 8.0))
    assert cache.reuse(torch.full((4,), 1.18))[0] == 8
    assert cache.num_skipped == 2


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_taylor_predictor_goes_on_with_polynomials_of_its_order(order):
    """Two branches whose difference is a polynomial of the step: exact as soon as enough of it is known."""
    timesteps = SchedulerConfig().build(12).timesteps.float()

    class Known:
        calls = 0

        def velocities(self, latents, step, names):
            self.calls += len(names)
            t = torch.tensor(step / 12, dtype=torch.float64)
            values = {FULL: torch.sin(t), UNCONDITIONAL: torch.sin(t) - (1 + t + 3 * t**order)}
            return {name: values[name].reshape(1) for name in names}

    def errors(**keys):
        known = Known()
        guided = GuidedVelocity(known, Guidance(5.0), timesteps, Shortcuts(**keys))
        exact = GuidedVelocity(Known(), Guidance(5.0), timesteps, Shortcuts())
        return known, [abs(float(guided(None, step) - exact(None, step))) for step in range(12)]

    known, made = errors(branch_refresh=3, branch_order=max(order, 1))
    assert known.calls == 12 + 4
    assert max(made[3 * max(order, 1) :]) < 1e-6
    _, kept = errors(branch_refresh=3)
    assert max(kept[3:]) > 0.1


def test_shortcuts_by_themselves_and_bad_ones():
    shortcuts = Shortcuts(steps=10, guidance_from=0.9, guidance_to=0.1, fp8=True)
    assert shortcuts.alone() == {
        "steps=10": Shortcuts(steps=10),
        "guidance_from=0.9 guidance_to=0.1": Shortcuts(guidance_from=0.9, guidance_to=0.1),
        "fp8=True": Shortcuts(fp8=True),
    }
    assert Shortcuts().alone() == {}
    predicted = Shortcuts(branch_refresh=3, branch_order=2)
    assert predicted.alone() == {"branch_refresh=3 branch_order=2": predicted}
    for bad in (
        Shortcuts(branch_order=1),
        Shortcuts(branch_refresh=2, branch_order=4),
        Shortcuts(branch_refresh=0),
        Shortcuts(guidance_to=0.5, guidance_from=0.4),
        Shortcuts(step_cache=-1),
    ):
        with pytest.raises(UserError, match=r"^shortcuts\.[a-z_]+=.*$"):
            bad.check()


def test_branches_without_weight_are_not_computed():
    initial, branches = make_branches()
    only = sample(random_model(CONFIG), initial, {FULL: branches[FULL]}, Guidance(1.0), 2)
    both = sample(random_model(CONFIG), initial, branches, Guidance(1.0, 1.0), 2)
    assert torch.equal(only, both)


def test_bfloat16_model_keeps_latents_in_float32():
    initial, branches = make_branches()
    model = random_model(CONFIG)
    expected = sample(model, initial, branches, Guidance(2.5, 1.5), 3)
    final = sample(model.bfloat16(), initial, branches, Guidance(2.5, 1.5), 3)
    assert final.dtype == torch.float32
    assert (final - expected).square().mean() / expected.square().mean() < 1e-2


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("t2v", Guidance(5.0)),
        ("t2i", Guidance(5.0)),
        ("mi2v", Guidance(5.0, 1.5)),
        ("video_edit", Guidance(2.5, 1.5)),
        ("image_edit", Guidance(2.5, 1.5)),
        ("ref_edit", Guidance(2.5, 1.5)),
    ],
)
def test_published_scales(task, expected):
    assert Guidance.default(task) == expected


def test_weights_add_up():
    for guidance in (Guidance(2.5, 1.5), Guidance(5.0), Guidance(1.0), Guidance(3.0, 3.0)):
        assert sum(guidance.weights().values()) == pytest.approx(1)
