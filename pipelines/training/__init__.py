"""From shards to a loss: the recipe of a training job, and frozen MLLMs for states that are not stored."""
