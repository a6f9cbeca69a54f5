"""The LoomVideo recipe on a transformer of two blocks, for tests that train it many times."""

import dataclasses

from loomvideo.model.sizes import model_size
from loomvideo.pipelines.training.recipe import LoomVideoRecipe

DIT = dataclasses.replace(model_size("tiny").dit, num_layers=2)


class SmallRecipe(LoomVideoRecipe):
    """Training of :data:`DIT`; arguments as of the ``tiny`` model."""

    def __init__(self, *args, **options):
        super().__init__("tiny", *args, **options)
        self.config = dataclasses.replace(self.config, num_layers=DIT.num_layers)
