"""Preference losses against plain formulas."""

import math

import pytest
import torch
from fixtures.stored_samples import MODEL as SIZE
from fixtures.stored_samples import stored_sample

from loomvideo.model.flow import EPS, noised_and_target
from loomvideo.pipelines.evaluation.rewards import Score, group_rewards
from loomvideo.pipelines.training.config import NFTConfig, ObjectiveConfig, SourcePreferenceConfig
from loomvideo.pipelines.training.nft import NFTRecipe, nft_loss
from loomvideo.pipelines.training.source_preference import (
    LEAST_DIFFERENCE,
    REFERENCE,
    SourcePreferenceRecipe,
    preference_loss,
)
from loomvideo.platform.errors import UserError
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import MODEL, Turn

CPU = torch.device("cpu")
NULL = torch.zeros(SIZE.dit.num_layers, 3, SIZE.dit.mllm_dim)
TURN = Turn(0, MODEL)


def network(std=0.08):
    torch.manual_seed(3)
    model = SourcePreferenceRecipe(SourcePreferenceConfig(), "tiny", ObjectiveConfig(), []).build_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


# -- the source as rejected sample ----------------------------------------------------------------------------------


def pairs(tasks=("image_edit", "ref_edit")):
    recipe = SourcePreferenceRecipe(SourcePreferenceConfig(), "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    examples = [recipe.load_example(0, {}, stored_sample(t, t), SampleRandom(0, t, 0)) for t in tasks]
    return recipe, examples, recipe.collate(examples).to(CPU, torch.float32)


def test_both_of_a_pair_share_noise_and_level_and_the_start_is_undecided():
    recipe, examples, batch = pairs()
    for example in examples:
        assert example.preferred.timestep == example.rejected.timestep
        t = example.preferred.source_scale
        source = example.preferred.source
        # (1 - t) (target - source) is all that the noised latents differ by; velocities differ by source - target.
        difference = example.preferred.latents - example.rejected.latents
        torch.testing.assert_close(
            difference, (1 - t) * (example.targets[1] - example.targets[0]), atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(example.rejected.source, source)
    model = network()
    out = recipe.turn_loss(TURN, {MODEL: model, REFERENCE: model}, batch)
    assert float(out.sum.detach()) == pytest.approx(len(examples) * math.log(2))
    assert batch.num_loss_elements == len(examples) == len(out.per_sample_sum)


def test_preference_loss_is_the_plain_formula_and_knows_no_runaway():
    config = SourcePreferenceConfig(beta=2.0, cap=0.5, anchor=3.0)
    preferred, rejected = (torch.tensor(values, requires_grad=True) for values in ([-0.1, 0.2], [0.1, 5.0]))
    loss = preference_loss(preferred, rejected, config)
    plain = [-math.log(1 / (1 + math.exp(-2 * 0.2))), -math.log(1 / (1 + math.exp(-2 * 0.5))) + 3 * 0.2]
    assert loss.tolist() == pytest.approx(plain)
    loss.sum().backward()
    # Above the cap nothing is gained by being worse at the source, and the target's own error is charged.
    assert rejected.grad[0] < 0 == rejected.grad[1]
    assert preferred.grad[1] == 3.0
    assert preferred.grad[0] > 0


def test_relative_errors_are_parts_of_what_lies_between_target_and_source():
    recipe, examples, batch = pairs()
    recipe.preference = SourcePreferenceConfig(beta=2.0, cap=1.5, anchor=3.0, relative=True)
    to_source, half = 0.3, len(batch.target) // 2
    # The start lies 0.3 of the way back to the source for both samples of a pair, the model on the target.
    towards = batch.target[half:] - batch.target[:half]
    start = torch.cat([batch.target[:half] + to_source * towards] * 2)
    arrived = torch.cat([batch.target[:half]] * 2)
    out = recipe.turn_loss(TURN, {MODEL: lambda _: arrived, REFERENCE: lambda _: start}, batch)
    for number, example in enumerate(examples):
        between = float((example.targets[1] - example.targets[0]).square().mean())
        part = between / (between + LEAST_DIFFERENCE)
        # (1 - 0.7^2) + 0.3^2 = 2 * 0.3 of the squared difference.
        assert float(out.per_sample_sum[number]) == pytest.approx(math.log1p(math.exp(-2.0 * 0.6 * part)), rel=1e-4)
    assert float(out.figures["margin"]) == pytest.approx(2 * to_source * len(examples), rel=0.2)


def test_drift_is_the_mean_squared_distance_from_the_start():
    recipe, examples, batch = pairs()
    reference, model = network(), network()
    assert float(recipe.turn_loss(TURN, {MODEL: model, REFERENCE: reference}, batch).figures["drift"]) == 0
    torch.nn.init.normal_(next(iter(model.blocks[0].parameters())), std=0.3)
    out = recipe.turn_loss(TURN, {MODEL: model, REFERENCE: reference}, batch)
    with torch.no_grad():
        moved = batch.batch.unpack((model(batch.batch) - reference(batch.batch)).square())
    # All preferred samples come first: a pair's are one behind the other by the number of pairs.
    each = [float((moved[n].mean() + moved[n + len(examples)].mean()) / 2) for n in range(len(examples))]
    assert min(each) > 0
    assert float(out.figures["drift"]) == pytest.approx(sum(each), rel=1e-4)
    assert not out.figures["drift"].requires_grad


def test_a_task_without_source_is_named():
    recipe, _, _ = pairs()
    with pytest.raises(UserError, match=r"t2v has no source.*mixture.tasks"):
        recipe.load_example(0, {}, stored_sample("a", "t2v"), SampleRandom(0, "a", 0))


# -- DiffusionNFT ---------------------------------------------------------------------------------------------------


def test_nft_loss_moves_to_good_samples_and_away_from_bad_ones():
    torch.manual_seed(0)
    old, target = torch.randn(6), torch.randn(6)
    for reward in (0.0, 0.3, 1.0):
        same = nft_loss(old, old, target, torch.tensor(reward), beta=0.7)
        torch.testing.assert_close(same, (old - target).square())
        velocity = old.clone().requires_grad_()
        nft_loss(velocity, old, target, torch.tensor(reward), beta=0.7).sum().backward()
        # At the old policy the gradient is 2 beta (2 r - 1) (v - v*): none for an average sample.
        torch.testing.assert_close(velocity.grad, 2 * 0.7 * (2 * reward - 1) * (old - target))
    plain = 0.25 * (0.3 * old + 0.7 * target - target) ** 2
    found = nft_loss(target, old, target, torch.tensor(0.25), beta=0.7)
    torch.testing.assert_close(found, plain + 0.75 * (1.7 * old - 0.7 * target - target) ** 2)


def test_nft_raises_the_reward_of_a_flow_of_two_dimensions():
    """A policy whose samples are N(mean, 0.5^2), with its exact velocity: three rounds move the mean to the goal."""
    goal, spread = torch.tensor([2.0, -1.0]), 0.5

    def velocity(mean, noised, t):
        kept, noise_share = 1 - t, EPS + (1 - EPS) * t
        gain = spread**2 * kept / (spread**2 * kept**2 + noise_share**2)
        clean = mean + gain * (noised - kept * mean)
        return (1 - EPS) * (noised - kept * clean) / noise_share - clean

    def distance_after(beta, liked, rounds=3):
        generator = torch.Generator().manual_seed(0)
        mean = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([mean], lr=0.05)
        for _ in range(rounds):
            old = mean.detach().clone()
            made = old + spread * torch.randn(64, 2, generator=generator)
            scores = [Score({}, total=liked * -float((each - goal).norm())) for each in made]
            reward = torch.tensor(group_rewards(scores, 1.0))[:, None]
            for _ in range(25):
                t = torch.rand(64, 1, generator=generator)
                noised, target = noised_and_target(made, torch.randn(64, 2, generator=generator), t)
                loss = nft_loss(velocity(mean, noised, t), velocity(old, noised, t), target, reward, beta)
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
        return float((mean.detach() - goal).norm())

    start = float(goal.norm())
    assert distance_after(1.0, liked=1) < start - 0.7
    # A smaller beta goes further in the same rounds; a reward turned around leads away.
    assert distance_after(0.4, liked=1) < start - 1.4
    assert distance_after(1.0, liked=-1) > start + 0.5


def test_nft_recipe_weighs_samples_by_their_rewards():
    recipe = NFTRecipe(NFTConfig(beta=1.0), "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    rewards = (1.0, 0.0)
    examples = [
        recipe.load_example(0, {"reward": reward}, stored_sample(key, "video_edit"), SampleRandom(0, key, 0))
        for key, reward in zip("ab", rewards, strict=True)
    ]
    batch = recipe.collate(examples).to(CPU, torch.float32)
    old, model = network(), network(0.07)
    out = recipe.turn_loss(TURN, {MODEL: model, "old": old, "reference": old}, batch)
    with torch.no_grad():
        v, v_old = model(batch.batch), old(batch.batch)
        each = [(v - batch.target).square(), (2 * v_old - v - batch.target).square()]
        rows = batch.batch.video_row_ids.long()
        expected = [each[number][rows == number].sum() for number in (0, 1)]
    torch.testing.assert_close(out.per_sample_sum, torch.stack(expected))
    assert float(out.figures["drift"]) == pytest.approx(float((v - v_old).square().sum()), rel=1e-4)
