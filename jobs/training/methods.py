"""Which recipe trains a job's configuration: flow matching, or what a section of its own asks for."""

from collections.abc import Callable
from functools import partial

from loomvideo.jobs.training.config import DistillJobConfig, PreferJobConfig, TrainingJobConfig
from loomvideo.pipelines.training.distillation import DistillationRecipe
from loomvideo.pipelines.training.dit_recipe import DiTRecipe
from loomvideo.pipelines.training.nft import NFTRecipe
from loomvideo.pipelines.training.recipe import LoomVideoRecipe
from loomvideo.pipelines.training.source_preference import SourcePreferenceRecipe


def recipe_class(config: TrainingJobConfig, policy: str = "") -> Callable[..., DiTRecipe]:
    """What makes a recipe from the arguments of :class:`DiTRecipe`; picklable.

    Args:
        config: The configuration of the job.
        policy: The weights folder of a round's policy, for methods that have rounds.
    """
    if isinstance(config, DistillJobConfig):
        return partial(DistillationRecipe, config.distill)
    if isinstance(config, PreferJobConfig):
        if config.prefer.method == "nft":
            return partial(NFTRecipe, config.prefer.nft, policy)
        return partial(SourcePreferenceRecipe, config.prefer.source)
    return LoomVideoRecipe
