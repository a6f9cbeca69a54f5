"""Actors that generate and score: what a round needs of them, and what becomes of their work when one is lost."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from torch import Tensor

from loomvideo.jobs.training.config import PreferJobConfig
from loomvideo.model.codec import build_codec
from loomvideo.model.kernels.node import use_kernels
from loomvideo.model.loading import dtype_on
from loomvideo.model.sizes import ModelSize
from loomvideo.model.weights import dit_of
from loomvideo.pipelines.evaluation.judges.rewards import JudgedRewards
from loomvideo.pipelines.training.rollouts import RolloutMaker
from loomvideo.pipelines.training.round_folder import Prompt
from loomvideo.platform.nodes.devices import device_for
from loomvideo.platform.shards.reader import ShardDataset


class RolloutActor:
    """Generates and scores on its own device.

    Args:
        config: The configuration of the job.
        model: The model's size.
        urls: The folders of the shards.
        build_recipe: Builds the recipe, which knows samples and whether the policy is one of few steps.
        judge: Asks the judge of the round, if it has one.
    """

    def __init__(
        self,
        config: PreferJobConfig,
        model: ModelSize,
        urls: Sequence[str],
        build_recipe: Any,
        judge: JudgedRewards | None = None,
    ):
        self.config, self.model, self.urls, self.build_recipe = config, model, urls, build_recipe
        self.judge = judge

    def prepare(self, weights: dict[str, Tensor]) -> None:
        """Build everything, with the kernels and the reading of training and the weights of a round.

        Not when the actor starts: Ray takes a mistake there for the loss of the actor.
        """
        config, nft = self.config, self.config.prefer.nft
        device = device_for(nft.gpus, "prefer.nft.gpus")
        if device.type == "cpu":
            torch.set_num_threads(nft.cpus)
        rewarder = config.rewarder(self.judge)
        rewarder.load()
        recipe = self.build_recipe()
        use_kernels(config.kernels)
        dit = dit_of(weights, recipe.config, device, dtype_on(device)).eval()
        self.maker = RolloutMaker(
            recipe,
            dit,
            build_codec(self.model.codec, device, dtype_on(device)),
            [ShardDataset.open(url, config.data.reading) for url in self.urls],
            nft,
            rewarder,
            self.model.scheduler,
            recipe.few_steps,
            config.training.seed,
            self.model.generate_scheduler,
        )

    def make(self, prompt: Prompt, number: int, folder: str) -> dict[str, Any]:
        """Results of one prompt."""
        return self.maker.make(prompt, number, Path(folder))


class ActorGroup:
    """Actors of a round, which end with it: training needs the devices. One that is lost is replaced.

    Args:
        start: Starts one and returns its handle.
        count: How many at most.
        max_failures: Losses in a round that are borne; negative for any number.
        say: Tells people about a loss.
    """

    def __init__(self, start: Callable[[], Any], count: int, max_failures: int, say: Callable[[str], None]):
        self.start, self.count, self.max_failures, self.say = start, count, max_failures, say

    def make(self, weights: Any, prompts: Sequence[Prompt], number: int, folder: Path) -> list[dict[str, Any]]:
        """What the actors make of a round's prompts, in their order.

        Args:
            weights: Reference of the weights that make the round; an actor makes nothing before it has them.
            prompts: What is asked.
            number: The round.
            folder: Where results are kept.

        Raises:
            RayActorError: when more actors were lost than ``max_failures``.
            Exception: what an actor raised, as it raised it.
        """
        handles = [self.start() for _ in range(min(self.count, len(prompts)))]
        # What runs: the actor, and the place of its prompt or None while it prepares.
        running: dict[Any, tuple[Any, int | None]] = {h.prepare.remote(weights): (h, None) for h in handles}
        todo, made, lost = deque(range(len(prompts))), {}, 0
        try:
            while len(made) < len(prompts):
                (done,), _ = ray.wait(list(running))
                handle, place = running.pop(done)
                try:
                    result = ray.get(done)
                except (RayActorError, OutOfMemoryError) as error:
                    lost += 1
                    if 0 <= self.max_failures < lost:
                        raise
                    first_line = str(error).splitlines()[0]
                    self.say(f"an actor of round {number} was lost, another takes its place: {first_line}")
                    if place is not None:
                        todo.appendleft(place)
                    ray.kill(handle)
                    handles.remove(handle)
                    handles.append(self.start())
                    running[handles[-1].prepare.remote(weights)] = handles[-1], None
                    continue
                except RayTaskError as error:
                    raise error.cause from error
                if place is not None:
                    made[place] = result
                if todo:
                    place = todo.popleft()
                    running[handle.make.remote(prompts[place], number, str(folder))] = handle, place
        finally:
            for handle in handles:
                ray.kill(handle)
        return [made[place] for place in range(len(prompts))]
