"""Which rounds of a continued run are trained, and on what."""

import json
from types import SimpleNamespace

import pytest
import torch
from fixtures.checkpoints import write_checkpoint

from loomvideo.jobs.training import rounds
from loomvideo.jobs.training.config import PreferJobConfig
from loomvideo.platform.runs import RunFolder


@pytest.fixture
def run(tmp_path):
    """A run of three rounds of four steps, all made, with checkpoints of steps 2, 4 and 8."""
    config = PreferJobConfig()
    config.prefer.nft.rounds, config.prefer.nft.steps_per_round = 3, 4
    folder = RunFolder.open(tmp_path, "prefer", "one")
    for number in range(3):
        made = folder.path / "rounds" / f"round-{number:04d}"
        made.mkdir(parents=True)
        (made / "round.json").write_text(json.dumps({"reward": float(number)}))
    for step in (2, 4, 8):
        write_checkpoint(folder.path, step, {"weight": torch.full((4,), float(step))})
    return SimpleNamespace(
        datasets=[],
        config=config,
        folder=folder,
        start="start",
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
        policy = str(run.folder.path / "rounds" / f"round-{number:04d}" / "policy") if number else "start"
        assert recipe == {"policy": policy, "num_rounds": number + 1}
        assert mixture == {f"round-{n:04d}": float(n == number) for n in range(number + 1)}
        assert num_rounds == number + 1
