"""Actors of a round that are lost: replaced with the round's weights, their prompts made again."""

import contextlib
import os
from functools import partial

import pytest
import torch
from fixtures.dit_samples import random_model
from ray.exceptions import RayActorError

from loomvideo.jobs.command import job_config
from loomvideo.jobs.training import rollout_actors
from loomvideo.jobs.training.config import PreferJobConfig
from loomvideo.jobs.training.rollout_actors import ActorGroup, RolloutActor
from loomvideo.model import kernels
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.training.nft import NFTRecipe
from loomvideo.pipelines.training.round_folder import Prompt
from loomvideo.platform.errors import UserError
from loomvideo.platform.machine import patience

PROMPTS = [Prompt(0, row, f"k{row}") for row in range(5)]


def group(ray_cluster, folder, deaths, max_failures, memory=0):
    """Two actors, of which as many as ``deaths`` end while they make the third prompt."""

    @ray_cluster.remote(num_cpus=0, memory=memory, max_restarts=0)
    class Actor:
        def __init__(self):
            self.weights = "the start's"

        def prepare(self, weights):
            self.weights = weights

        def make(self, prompt, number, folder):
            lost = os.path.join(folder, "lost")
            if prompt.row == 2 and os.path.getsize(lost) < deaths:
                with open(lost, "ab") as file:
                    file.write(b"x")
                os._exit(1)
            if prompt.row == 4 and deaths < 0:
                raise UserError("a sample that cannot be read")
            return f"{prompt.key} of round {number} by {self.weights}"

    folder.mkdir(exist_ok=True)
    (folder / "lost").touch()
    said = []
    return ActorGroup(Actor.remote, 2, max_failures, said.append), said


def test_a_lost_actor_is_replaced_and_knows_the_rounds_weights(ray_cluster, tmp_path):
    actors, said = group(ray_cluster, tmp_path, deaths=2, max_failures=2)
    made = actors.make("new weights", PROMPTS, 3, tmp_path)
    assert made == [f"k{row} of round 3 by new weights" for row in range(5)]
    assert len(said) == 2
    assert "round 3 was lost, another takes its place" in said[0]
    # The next round has actors of its own.
    assert actors.make("newer", PROMPTS[:1], 4, tmp_path) == ["k0 of round 4 by newer"]


@pytest.mark.parametrize(("deaths", "error"), [(2, RayActorError), (-1, UserError)])
def test_too_many_losses_and_mistakes_end_the_round(ray_cluster, tmp_path, deaths, error):
    actors, said = group(ray_cluster, tmp_path, deaths, max_failures=1)
    with pytest.raises(error, match="sample that cannot be read" if error is UserError else "died"):
        actors.make("weights", PROMPTS, 0, tmp_path)
    assert len(said) == max(deaths - 1, 0)


@pytest.mark.parametrize("broken", [False, True])
def test_training_gets_what_the_actors_had(ray_cluster, tmp_path, broken):
    # Memory as Ray counts it, which no other test asks for.
    all_memory = int(ray_cluster.cluster_resources()["memory"])
    actors, _ = group(ray_cluster, tmp_path, deaths=-1 if broken else 0, max_failures=0, memory=all_memory // 2)
    with contextlib.suppress(UserError):
        actors.make("weights", PROMPTS, 0, tmp_path)
    train = ray_cluster.remote(num_cpus=0, memory=all_memory)(lambda: "trained")
    assert ray_cluster.get(train.remote(), timeout=patience(60)) == "trained"


def test_an_actor_has_its_weights_from_memory_and_the_kernels_of_training(monkeypatch):
    config = job_config(PreferJobConfig, "prefer", ["data.shards=[x]", "kernels.backend=eager"])
    opened = []
    monkeypatch.setattr(rollout_actors.ShardDataset, "open", lambda url, reading: opened.append((url, reading)))
    size, policy = model_size("tiny"), random_model(model_size("tiny").dit)
    # No weights file is anywhere.
    build_recipe = partial(NFTRecipe, config.prefer.nft, "", "tiny", config.objective, [], "/nowhere")
    actor = RolloutActor(config, size, ["x"], build_recipe)
    with kernels.use_backend("cpp"):
        actor.prepare(policy.state_dict())
        assert kernels.report()["requested"] == "eager"
    assert opened == [("x", config.data.reading)]
    made = dict(actor.maker.dit.named_parameters())
    assert all(torch.equal(made[name], value) for name, value in policy.named_parameters())
    assert made["proj_out.weight"].data_ptr() != policy.proj_out.weight.data_ptr()
