"""Several networks in one run: turns, their own state, shared weights, resume, other world sizes."""

import pytest
from helpers.ranks import Scenario, run_ranks, steps_of, train_scenarios
from helpers.toy_training import RolesRecipe, SharedRolesRecipe

from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.config import (
    CheckpointConfig,
    EmaConfig,
    OptimizerConfig,
    PackConfig,
    TrainingConfig,
    ZeroConfig,
)

pytestmark = pytest.mark.slow

NUM_STEPS = 9
RECIPES = {"whole": RolesRecipe, "adapted": SharedRolesRecipe}


def config(stage=3):
    return TrainingConfig(
        steps=NUM_STEPS,
        precision="fp32",
        log_every=1,
        pack=PackConfig(tokens=60, per_step=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        ema=EmaConfig(decay=0.9),
        zero=ZeroConfig(stage=stage, persistence_elements=100),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=9),
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("roles")
    scenarios = {}
    for kind, recipe in RECIPES.items():
        for stage in (3, 2):
            scenarios[f"{kind}_{stage}"] = Scenario(str(root / f"{kind}{stage}"), config(stage), recipe=recipe)
        source = str(root / f"{kind}3")
        again = Scenario(str(root / f"{kind}-again"), config(3), recipe=recipe, copy_from=source, from_step=4)
        scenarios[f"{kind}_again"] = again
    outcomes = run_ranks(train_scenarios, 2, list(scenarios.values()))
    return root, dict(zip(scenarios, outcomes[0], strict=True))


def losses(outcome):
    return {record["step"]: (record["role"], record["loss"], record["grad_norm"]) for record in steps_of(outcome[0])}


@pytest.mark.parametrize("kind", RECIPES)
def test_turns_and_stages(two_ranks, kind):
    three, two = (losses(two_ranks[1][f"{kind}_{stage}"]) for stage in (3, 2))
    assert [three[step][0] for step in sorted(three)] == ["critic", "critic", "model"] * 3
    for step in three:
        assert three[step][1:] == pytest.approx(two[step][1:], rel=1e-4), step


@pytest.mark.parametrize("kind", RECIPES)
def test_resume_is_bitwise_for_all_roles(two_ranks, kind):
    whole, again = losses(two_ranks[1][f"{kind}_3"]), losses(two_ranks[1][f"{kind}_again"])
    assert sorted(again) == [5, 6, 7, 8, 9]
    assert all(again[step] == whole[step] for step in again)


@pytest.mark.parametrize("kind", RECIPES)
def test_one_process_equals_two_and_goes_on_from_their_checkpoint(two_ranks, tmp_path, kind):
    root, outcomes = two_ranks
    alone = Scenario(str(tmp_path / "alone"), config(2), recipe=RECIPES[kind])
    resumed = Scenario(
        str(tmp_path / "resumed"), config(3), recipe=RECIPES[kind], copy_from=str(root / f"{kind}3"), from_step=4
    )
    expected = losses(outcomes[f"{kind}_3"])
    for outcome in run_ranks(train_scenarios, 1, [alone, resumed])[0]:
        found = losses(outcome)
        for step in found:
            assert found[step][1:] == pytest.approx(expected[step][1:], rel=1e-4), step


def test_a_checkpoint_exports_the_model_alone_and_names_the_teacher(two_ranks):
    checkpoint = CheckpointFolder(two_ranks[0] / "whole3" / "checkpoints").open()
    assert not any(":" in name for name in checkpoint.weights("ema"))
    assert checkpoint.state["roles"]["teacher"] == {"base": {"path": "t", "digest": "1"}}
    assert checkpoint.state["roles"]["critic"]["updates"] == 6
    assert not any(name.startswith("teacher:") for name in checkpoint.slices["master"])
