"""Conditioning that is silently dead: found before and in the first steps, as it would only look like slow learning.

Before: every sample of a task that edits has a source, and of a task with references has references. In the first
steps: the gradient of the loss reaches the source's patches, the references' patches and every layer's MLLM states.
That is asked of the inputs, not of weights, so it holds for adapters and frozen weights too.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch import Tensor

from loomvideo.model.packing import PackedBatch
from loomvideo.model.tasks import WORDINGS
from loomvideo.platform.errors import UserError
from loomvideo.platform.training.recipe import TrainingDataset

SOURCE, REFERENCES = "source", "references"
NEEDED_MEMBERS = {
    "source": frozenset(name for name, task in WORDINGS.items() if task.needs_source),
    "refs": frozenset(name for name, task in WORDINGS.items() if task.needs_references),
}
"""Members of a sample, and the tasks whose samples must have them."""


def check_members(datasets: Sequence[TrainingDataset]) -> None:
    """Refuse datasets with samples that lack what their task is conditioned on.

    Raises:
        UserError: naming the dataset, a sample and their number.
    """
    for dataset in datasets:
        index = dataset.index
        members = index.column("members").combine_chunks()
        names, rows = pc.list_flatten(members).to_numpy(zero_copy_only=False), pc.list_parent_indices(members)
        tasks = index.column("task").to_numpy()
        for member, needing in NEEDED_MEMBERS.items():
            has = np.zeros(len(index), bool)
            has[rows.to_numpy()[names == member]] = True
            (lacking,) = np.nonzero(np.isin(tasks, list(needing)) & ~has)
            if len(lacking):
                row = index.slice(int(lacking[0]), 1).to_pylist()[0]
                raise UserError(
                    f"{row['dataset']}: {len(lacking)} samples lack the {member} that their task needs, such as "
                    f"{row['key']} ({row['task']}): it would be trained as if there were none; prepare them again"
                )


class ConditioningWatch:
    """Follows whether the loss depends on what conditions the model.

    Args:
        uses_source: Whether the model reads sources at all.
    """

    def __init__(self, uses_source: bool):
        self.uses_source = uses_source
        self.is_on = False
        self._confirmed: set[str] = set()
        self._leaves: dict[str, Tensor] = {}
        self._reference_rows: Tensor | None = None

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """The same batch, whose backward pass will show which inputs mattered; nothing is copied."""
        if not self.is_on:
            return batch
        changes: dict[str, Any] = {}
        names = [f"MLLM states of layer {number}" for number in range(len(batch.mllm_states))]
        if not self._confirmed.issuperset(names):
            layers = [layer.requires_grad_() for layer in batch.mllm_states.detach().unbind(0)]
            self._leaves |= dict(zip(names, layers, strict=True))
            # The model takes one layer after the other; one tensor of all would gather its gradient as often.
            changes["mllm_states"] = tuple(layers)
        if self.uses_source and SOURCE not in self._confirmed and bool(batch.source_patches.any()):
            self._leaves[SOURCE] = changes["source_patches"] = batch.source_patches.detach().requires_grad_()
        rows = batch.row_ids == batch.num_samples
        if REFERENCES not in self._confirmed and bool(rows.any()):
            self._leaves[REFERENCES] = changes["patches"] = batch.patches.detach().requires_grad_()
            self._reference_rows = rows
        return dataclasses.replace(batch, **changes)

    def dead(self) -> list[str]:
        """After the backward pass: which of the inputs attached had a gradient of zeros; forgets them."""
        found = []
        for name, leaf in self._leaves.items():
            gradient = leaf.grad
            if gradient is not None and name == REFERENCES:
                gradient = gradient[self._reference_rows]
            # A gradient that is not finite is the guard's business.
            if gradient is None or not bool(gradient.any()):
                found.append(name)
            else:
                self._confirmed.add(name)
        self._leaves, self._reference_rows = {}, None
        return found
