"""What samples take of a pack: tokens, MLLM tokens and counted operations, for every variant of a visit."""

from typing import Any

import numpy as np

from loomvideo.model.codec.grid import LatentGrid
from loomvideo.model.config import DiTConfig
from loomvideo.model.flops import relative_cost
from loomvideo.model.tasks import wording
from loomvideo.platform.training.order import SampleSizes

VARIANTS = ("full", "visual", "null")
"""What a visit is conditioned on: everything, pictures alone, or nothing (guidance dropout)."""


def sample_sizes(config: DiTConfig, grid: LatentGrid, index: Any, num_null_tokens: int) -> SampleSizes:
    """Sizes of the rows of a dataset's index, a column for each of :data:`VARIANTS`.

    The MLLM tokens of ``visual`` count its text too, which the index does not tell apart from pictures.

    Args:
        config: The configuration of the transformer.
        grid: The grid of the codec and the transformer.
        index: ``pyarrow.Table`` of a dataset.
        num_null_tokens: MLLM tokens of the empty message.
    """
    column = {
        name: index.column(name).to_numpy().astype(np.int64)
        for name in ("width", "height", "num_frames", "dit_tokens", "mllm_tokens")
    }
    video = grid.num_tokens(column["num_frames"], column["width"], column["height"])
    video = np.minimum(video, column["dit_tokens"])
    tokens = np.stack([column["dit_tokens"], column["dit_tokens"], video], axis=1)
    tasks = index.column("task").to_pylist()
    has_media = {task: wording(task).has_media for task in set(tasks)}
    shown = np.array([has_media[task] for task in tasks], dtype=bool)
    null = np.full_like(video, num_null_tokens)
    context = np.stack([column["mllm_tokens"], np.where(shown, column["mllm_tokens"], null), null], axis=1)
    return SampleSizes(tokens, context, relative_cost(config, tokens, context, np.repeat(video[:, None], 3, axis=1)))
