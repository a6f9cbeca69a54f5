"""Which rounds of a continued run are trained, and on what."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from fixtures.checkpoints import write_checkpoint

from loomvideo.jobs.evaluation.config import JudgeConfig
from loomvideo.jobs.training import rounds
from loomvideo.jobs.training.config import PreferJobConfig
from loomvideo.model.fingerprints import weights_fingerprint
from loomvideo.pipelines.training.config import NFTConfig, RewardsConfig
from loomvideo.pipelines.training.round_folder import begin_round
from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder


@pytest.fixture
def run(tmp_path):
    """A run of three rounds of four steps, all made, with checkpoints of steps 2, 4 and 8."""
    config = PreferJobConfig()
    config.prefer.nft.rounds, config.prefer.nft.steps_per_round = 3, 4
    folder = RunFolder.open(tmp_path, "prefer", "one")
    for number in range(3):
        made = folder.path / "rounds" / f"round-{number:04d}"
        policy = made / "policy" if number else tmp_path / "start"
        policy.mkdir(parents=True)
        made.mkdir(parents=True, exist_ok=True)
        (policy / "config.json").write_text(str(number))
        facts = {"reward": float(number), "policy_fingerprint": weights_fingerprint(policy)}
        (made / "round.json").write_text(json.dumps(facts))
    for step in (2, 4, 8):
        write_checkpoint(folder.path, step, {"weight": torch.full((4,), float(step))})
    return SimpleNamespace(
        datasets=[],
        config=config,
        folder=folder,
        start=str(tmp_path / "start"),
        tracker=None,
        tasks=[],
        build_recipe=lambda **of_round: of_round,
    )


@pytest.mark.parametrize(("damaged", "trained"), [((), [12]), ((8,), [8, 12]), ((4, 8), [4, 8, 12])])
def test_a_round_is_trained_unless_a_whole_checkpoint_ends_it(run, monkeypatch, damaged, trained):
    calls = []

    def train(config, recipe, urls, *_, last_step, **__):
        calls.append((last_step, recipe, config.mixture.datasets, len(urls)))
        return {"stopped": ""}

    monkeypatch.setattr(rounds, "train", train)
    for step in damaged:
        file = run.folder.path / "checkpoints" / f"step-{step:08d}" / "rank-00000-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    result = rounds.train_in_rounds(run)
    assert [call[0] for call in calls] == trained
    assert result["reward_by_round"] == [0.0, 1.0, 2.0]
    # Every round on its own results alone, with the policy that made them as old policy.
    for last_step, recipe, mixture, num_rounds in calls:
        number = last_step // 4 - 1
        policy = str(run.folder.path / "rounds" / f"round-{number:04d}" / "policy") if number else run.start
        assert recipe == {"policy": policy, "num_rounds": number + 1}
        assert mixture == {f"round-{n:04d}": float(n == number) for n in range(number + 1)}
        assert num_rounds == number + 1


def test_a_round_is_trained_against_the_weights_that_made_it_alone(run, monkeypatch):
    monkeypatch.setattr(rounds, "train", lambda *_, **__: pytest.fail("must not train"))
    file = run.folder.path / "rounds/round-0002/policy/config.json"
    file.write_text("another")
    with pytest.raises(UserError, match=r"round-0002/policy: gone, or not the weights any more that made .*0002;"):
        rounds.train_in_rounds(run)
    file.unlink()
    file.parent.rmdir()
    with pytest.raises(UserError, match=r"round-0002/policy: gone"):
        rounds.train_in_rounds(run)


def test_a_round_goes_on_with_what_decides_its_results(run, tmp_path):
    config, policy = run.config, tmp_path / "start"
    begin_round(tmp_path / "round", rounds._deciding(run, policy))
    # Where and how fast it is made may change, and how it trains.
    config.prefer.nft.actors, config.prefer.nft.beta, config.prefer.rewards.patience_s = 7, 0.5, 1.0
    begin_round(tmp_path / "round", rounds._deciding(run, policy))
    config.prefer.rewards.weights = {"outside": 2.0}
    changed = r"round: was begun with prefer.rewards.weights=\{'garment_colour': 1.0\} \(now \{'outside': 2.0\}\)"
    with pytest.raises(UserError, match=changed):
        begin_round(tmp_path / "round", rounds._deciding(run, policy))
    config.prefer.rewards.weights = {"garment_colour": 1.0}
    (policy / "config.json").write_text("another")
    with pytest.raises(UserError, match="was begun with policy_fingerprint="):
        begin_round(tmp_path / "round", rounds._deciding(run, policy))
    config.judge.kind = "fake"
    assert {"judge.kind", "judge.repeats"} <= rounds._deciding(run, policy).keys()


def test_every_key_that_decides_nothing_is_a_key():
    keys = {
        f"{section}.{field.name}"
        for section, kind in (("prefer.nft", NFTConfig), ("prefer.rewards", RewardsConfig), ("judge", JudgeConfig))
        for field in dataclasses.fields(kind)
    }
    assert keys >= rounds.DECIDES_NOTHING
