"""Which recipe trains a job's configuration: flow matching, or what a section of its own asks for."""

from collections.abc import Callable
from functools import partial

from loomvideo.jobs.training.config import DistillJobConfig, TrainingJobConfig
from loomvideo.pipelines.training.distillation import DistillationRecipe
from loomvideo.pipelines.training.recipe import LoomVideoRecipe


def recipe_class(config: TrainingJobConfig) -> Callable[..., LoomVideoRecipe]:
    """What takes the arguments of :class:`LoomVideoRecipe`; picklable."""
    if isinstance(config, DistillJobConfig):
        return partial(DistillationRecipe, config.distill)
    return LoomVideoRecipe
