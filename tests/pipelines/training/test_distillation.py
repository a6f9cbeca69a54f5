"""Distribution matching against plain formulas, sample by sample, and the traps that others fell into."""

import dataclasses

import pytest
import torch
from fixtures.stored_samples import MODEL as SIZE
from fixtures.stored_samples import stored_sample

from loomvideo.model.config import LoRAConfig
from loomvideo.model.few_steps import FewSteps, few_steps_of, sample_few_steps
from loomvideo.model.flow import EPS
from loomvideo.model.guidance import Guidance
from loomvideo.model.packing import pack, velocity_patches
from loomvideo.model.sampler import Branch
from loomvideo.pipelines.training.config import DistillConfig, ObjectiveConfig
from loomvideo.pipelines.training.distillation import CRITIC, TEACHER, DistillationRecipe
from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import OptimizerConfig
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import MODEL, Turn
from loomvideo.platform.training.zero import build_optimizer, select_trainable

CPU = torch.device("cpu")
TASKS = ("ref_edit", "t2v", "image_edit")


def build(lora=None, **changes):
    null = torch.randn(SIZE.dit.num_layers, 3, SIZE.dit.mllm_dim, generator=torch.Generator().manual_seed(9))
    distill = DistillConfig(**{"critic_warmup": 2, "critic_steps": 2} | changes)
    return DistillationRecipe(distill, "tiny", ObjectiveConfig(shift_base_tokens=1), [null], lora=lora)


def packed(recipe, tasks=TASKS):
    examples = [recipe.load_example(0, {}, stored_sample(t, t), SampleRandom(0, t, 0)) for t in tasks]
    return examples, recipe.collate(examples).to(CPU, torch.float32)


@pytest.fixture(scope="module")
def network():
    """A transformer whose every part matters: nothing is at its zero start."""
    torch.manual_seed(3)
    model = build().build_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model


def plain_velocity(network, example, latents, t):
    """The guided velocity of one sample alone, one branch after another."""
    velocities = {}
    for name, branch in example.branches.items():
        sample = dataclasses.replace(branch, latents=latents, timestep=1000 * t, source_scale=t)
        sample = dataclasses.replace(sample, mllm_states=branch.mllm_states.float())
        batch = pack([sample], SIZE.dit.patch_size)
        velocities[name] = batch.unpack(network(batch))[0]
    return velocities


def clean(z, v, t):
    return (1 - EPS) * z - (EPS + (1 - EPS) * t) * v


def noised(x, n, t):
    return (1 - t) * x + (EPS + (1 - EPS) * t) * n


def test_the_students_gradient_is_the_plain_formula_of_every_sample(network):
    recipe = build()
    examples, batch = packed(recipe)
    step = next(step for step in range(50) if recipe.role_at(step) == MODEL and recipe.level_at(step) == 0)
    torch.manual_seed(0)
    velocity = torch.randn_like(batch.noise).requires_grad_()
    critic = network.__class__(network.config)
    critic.load_state_dict({name: 0.9 * value for name, value in network.state_dict().items()})
    networks = {MODEL: lambda asked: velocity, TEACHER: network, CRITIC: critic}
    recipe.turn_loss(Turn(step, MODEL), networks, batch).sum.backward()
    expected = []
    with torch.no_grad():
        for example, part in zip(examples, batch.flow.batch.unpack(velocity), strict=True):
            x, t = clean(example.noises[0], part, 1.0), example.t
            z = noised(x, example.noise, t)
            scales = Guidance(5.0) if example.task == "t2v" else Guidance(2.5, 1.5)
            real = clean(z, scales.combine(plain_velocity(network, example, z, t)), t)
            fake = clean(z, plain_velocity(critic, example, z, t)["full"], t)
            gradient = (fake - real) / (x - real).abs().mean()
            # x is (1 - eps) z - (eps + (1 - eps) t) v, at t = 1 here.
            expected.append(velocity_patches(-gradient, SIZE.dit.patch_size))
    torch.testing.assert_close(velocity.grad, torch.cat(expected), rtol=2e-3, atol=2e-5)


def test_a_scale_of_one_is_no_guidance_and_two_is_not_one_more(network):
    examples, batch = packed(build(scale=1.0, visual_scale=1.0, generate_scale=1.0))
    assert all(list(example.weights) == ["full"] for example in examples)
    for scale in (1.0, 2.0):
        recipe = build(scale=scale, visual_scale=1.0, generate_scale=scale)
        examples, batch = packed(recipe)
        with torch.no_grad():
            found = recipe.guided_velocity(network, batch, batch.noise)
            for example, part in zip(examples, batch.flow.batch.unpack(found), strict=True):
                each = plain_velocity(network, example, example.noise, example.t)
                base = each.get("visual", each.get("unconditional"))
                expected = each["full"] if base is None else base + scale * (each["full"] - base)
                torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-4)


def test_training_simulates_exactly_what_generation_does(network):
    """Levels, their shifts, source scales and noises: a student must meet in use what it met in training."""
    recipe = build(generate_shift=2.0)
    examples, batch = packed(recipe)
    with torch.no_grad():
        made = recipe.student_sample(network, batch, recipe.few_steps.num_steps - 1)
    for example, part in zip(examples, batch.flow.batch.unpack(made), strict=True):
        full = example.branches["full"]
        branch = Branch(full.mllm_states, full.source, full.references)
        alone = sample_few_steps(network, list(example.noises), branch, recipe.few_steps)
        torch.testing.assert_close(alone, part, rtol=1e-3, atol=1e-3)


def test_levels_of_what_has_no_source_take_its_shift():
    recipe = build()
    recipe.objective = dataclasses.replace(recipe.objective, generate_shift_limit=1.0)
    same, own = packed(build())[0], packed(recipe)[0]
    moved = [a.t != b.t for a, b in zip(same, own, strict=True)]
    assert dict(zip(TASKS, moved, strict=True)) == {"ref_edit": False, "t2v": True, "image_edit": False}


def test_the_schedule_is_shifted_like_the_samplers_sigmas():
    shifted = FewSteps.of([1000, 750, 500, 250], shift=5.0).timesteps
    assert shifted == pytest.approx([1000.0, 937.5, 5000 / 6, 625.0])
    assert FewSteps.of([1000, 750, 500, 250], shift=1.0).timesteps == pytest.approx([1000, 750, 500, 250])
    own = FewSteps.of([1000, 750, 500, 250], 5.0, generate_shift=1.0)
    assert own.timesteps_of(has_source=True) == shifted
    assert own.timesteps_of(has_source=False) == pytest.approx([1000, 750, 500, 250])
    assert few_steps_of(own.to_dict()) == own
    assert own.first(2).timesteps_of(has_source=False) == pytest.approx([1000, 750])
    with pytest.raises(UserError, match=r"distill\.generate_shift=0\.5"):
        DistillConfig(generate_shift=0.5).check()
    for wrong in ([], [750, 500], [1000, 500, 500], [1000, 0], [1000 - 100 * n for n in range(9)]):
        with pytest.raises(UserError, match=r"fall from 1000"):
            FewSteps.of(wrong, shift=5.0)


def test_the_critic_leads_and_has_its_turns():
    turns = [build().role_at(step) for step in range(8)]
    assert turns == [CRITIC, CRITIC] + 2 * [CRITIC, CRITIC, MODEL]
    levels = {build().level_at(step) for step in range(40)}
    assert levels == {0, 1, 2, 3}


@pytest.mark.parametrize("role", [MODEL, CRITIC])
def test_every_rank_calls_every_network_equally_often(network, role):
    """Ranks gather weights together: what a pack holds must not change the number of passes."""
    recipe, calls = build(), []
    step = next(step for step in range(50) if recipe.role_at(step) == role and recipe.level_at(step) == 2)
    for tasks in (("t2i",), TASKS):
        counts = dict.fromkeys((MODEL, TEACHER, CRITIC), 0)

        def counted(name, counts=counts):
            def call(asked):
                counts[name] += 1
                return network(asked)

            return call

        _, batch = packed(recipe, tasks)
        recipe.turn_loss(Turn(step, role), {name: counted(name) for name in counts}, batch)
        calls.append(counts)
    assert calls[0] == calls[1]
    assert calls[0] == ({MODEL: 3, TEACHER: 1, CRITIC: 1} if role == MODEL else {MODEL: 3, TEACHER: 0, CRITIC: 1})


def test_only_the_role_of_the_turn_gets_gradients(network):
    recipe = build()
    _, batch = packed(recipe)
    for role in (MODEL, CRITIC):
        step = next(step for step in range(50) if recipe.role_at(step) == role)
        networks = {name: network.__class__(network.config) for name in (MODEL, TEACHER, CRITIC)}
        for each in networks.values():
            each.load_state_dict(network.state_dict())
        recipe.turn_loss(Turn(step, role), networks, batch).sum.backward()
        taught = {name for name, each in networks.items() if any(p.grad is not None for p in each.parameters())}
        assert taught == {role}


def test_adapters_start_without_effect_and_know_no_dropout(network, tmp_path):
    """A student that starts as its own critic and teacher, unguided, has nothing to learn, whatever the noise."""
    recipe = build(lora=LoRAConfig(rank=2), scale=1.0, visual_scale=1.0, generate_scale=1.0)
    plain = build()
    plain.export(network.state_dict(), tmp_path / "weights")
    recipe.initial_weights = str(tmp_path / "weights")
    student = recipe.build_model().train()
    teacher, initial = recipe.roles()[0].start()
    teacher.load_state_dict(dict(initial), assign=True)
    assert not any(name.endswith("lora_A") for name, _ in teacher.named_parameters())
    critic = recipe.build_model().train()
    _, batch = packed(recipe)
    step = next(step for step in range(50) if recipe.role_at(step) == MODEL)
    loss = recipe.turn_loss(Turn(step, MODEL), {MODEL: student, TEACHER: teacher.train(), CRITIC: critic}, batch)
    assert float(loss.sum.detach()) < 1e-6


def test_mistakes_in_the_critics_optimiser_name_its_key(network):
    key = next(role for role in build().roles() if role.name == CRITIC).optimizer_key
    with pytest.raises(UserError, match=r"^distill\.critic\.trainable: 'nothing' matches no parameter"):
        select_trainable(network, ["nothing"], key)
    shapes, small = {name: tuple(each.shape) for name, each in network.named_parameters()}, OptimizerConfig("adamw8bit")
    with pytest.raises(UserError, match=r"^distill\.critic\.name=adamw8bit: needs a CUDA device"):
        build_optimizer(network, shapes, small, CPU, key)
