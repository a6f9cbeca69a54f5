"""Actors of a round that are lost: replaced with the round's weights, their prompts made again."""

import os

import pytest
from ray.exceptions import RayActorError

from loomvideo.jobs.training.rollout_actors import ActorGroup
from loomvideo.pipelines.training.rollouts import Prompt

PROMPTS = [Prompt(0, row, f"k{row}") for row in range(5)]


def group(ray_cluster, folder, deaths, max_failures):
    """Two actors, of which as many as ``deaths`` end while they make the third prompt."""

    @ray_cluster.remote(num_cpus=0, max_restarts=0)
    class Actor:
        def __init__(self):
            self.weights = "the start's"

        def load(self, weights):
            self.weights = weights

        def make(self, prompt, number, folder):
            lost = os.path.join(folder, "lost")
            if prompt.row == 2 and os.path.getsize(lost) < deaths:
                with open(lost, "ab") as file:
                    file.write(b"x")
                os._exit(1)
            if prompt.row == 4 and deaths < 0:
                raise ValueError("a sample that cannot be read")
            return f"{prompt.key} of round {number} by {self.weights}"

    folder.mkdir(exist_ok=True)
    (folder / "lost").touch()
    said = []
    return ActorGroup(Actor.remote, 2, max_failures, said.append), said


def test_a_lost_actor_is_replaced_and_knows_the_rounds_weights(ray_cluster, tmp_path):
    actors, said = group(ray_cluster, tmp_path, deaths=2, max_failures=2)
    try:
        made = actors.make("new weights", PROMPTS, 3, tmp_path)
        assert made == [f"k{row} of round 3 by new weights" for row in range(5)]
        assert len(said) == 2
        assert "round 3 was lost, another takes its place" in said[0]
        assert len(actors.handles) == 2
        # They stay, and take the next round's weights.
        handles = list(actors.handles)
        assert actors.make("newer", PROMPTS[:1], 4, tmp_path) == ["k0 of round 4 by newer"]
        assert actors.handles == handles
    finally:
        actors.close()


@pytest.mark.parametrize(("deaths", "error"), [(2, RayActorError), (-1, ValueError)])
def test_too_many_losses_and_mistakes_end_the_round(ray_cluster, tmp_path, deaths, error):
    actors, said = group(ray_cluster, tmp_path, deaths, max_failures=1)
    try:
        with pytest.raises(error):
            actors.make("weights", PROMPTS, 0, tmp_path)
        assert len(said) == max(deaths - 1, 0)
    finally:
        actors.close()
