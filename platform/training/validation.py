"""Validation on fixed (sample, noise, level) triples, beside training's random numbers.

The triples depend on the validation seed and the samples' keys alone, so losses of different steps, runs, world sizes
and of averaged and raw weights are paired: their differences carry no sampling noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import ValidationConfig
from loomvideo.platform.training.engine import ZeroEngine
from loomvideo.platform.training.loader import SampleError
from loomvideo.platform.training.randomness import SampleRandom, stream
from loomvideo.platform.training.recipe import Recipe, TrainingDataset

VALIDATION_SEED = 20_240_601


@dataclass(frozen=True)
class Triple:
    """One sample at one noise level."""

    dataset: int
    row: int
    key: str
    task: str
    level: float


def fixed_triples(datasets: Sequence[TrainingDataset], config: ValidationConfig) -> list[Triple]:
    """Up to ``samples_per_task`` samples of every task at every level, samples chosen by the hash of their key.

    Raises:
        UserError: if no dataset has a sample of the split.
    """
    by_task: dict[str, list[tuple[float, int, int, str]]] = {}
    for number, dataset in enumerate(datasets):
        columns = (dataset.index.column(name).to_pylist() for name in ("key", "task", "split"))
        for row, (key, task, split) in enumerate(zip(*columns, strict=True)):
            if split == config.split:
                by_task.setdefault(task, []).append((stream("validation", key).random(), number, row, key))
    if not by_task:
        known = sorted({split for dataset in datasets for split in dataset.index.column("split").unique().to_pylist()})
        raise UserError(
            f"training.validation.split={config.split}: the shards have no such sample, only {', '.join(known)}; "
            "prepare them with heldout_fraction above 0 for held-out ones, or set training.validation.every_steps=0"
        )
    levels = [(number + 0.5) / config.levels for number in range(config.levels)]
    return [
        Triple(number, row, key, task, level)
        for task in sorted(by_task)
        for _, number, row, key in sorted(by_task[task])[: config.samples_per_task]
        for level in levels
    ]


class Validator:
    """Evaluates the fixed triples on all ranks together.

    Args:
        recipe: Loads and computes.
        datasets: The run's datasets.
        config: What to evaluate.
        sequence_ranks: Neighbouring ranks that share a sample's tokens.
    """

    def __init__(
        self, recipe: Recipe, datasets: Sequence[TrainingDataset], config: ValidationConfig, sequence_ranks: int = 1
    ):
        self.recipe, self.datasets, self.config = recipe, datasets, config
        self.sequence_ranks = sequence_ranks
        self.triples = fixed_triples(datasets, config)

    def losses(self, engine: ZeroEngine) -> dict[str, Any]:
        """Mean loss by task, by level and in all: ``{"loss": ..., "task/t2v": ..., "level/0.05": ...}``.

        Every rank makes the same number of forward passes, because ZeRO-3 gathers weights in them. ``each`` of the
        result holds the loss of every triple in their fixed order.
        """
        world_size = dist.get_world_size()
        group, num_groups = dist.get_rank() // self.sequence_ranks, world_size // self.sequence_ranks
        num_rounds = -(-len(self.triples) // num_groups)
        rows: list[tuple[int, float, float]] = []
        engine.module.eval()
        for number in range(num_rounds):
            place = number * num_groups + group
            row = self._row(min(place, len(self.triples) - 1), engine.engine, engine.device, engine.dtype)
            rows += [row] if place < len(self.triples) else []
        engine.module.train()
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, rows)
        return self._summary([row for part in gathered for row in part])

    def losses_alone(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The same with a whole model in one process."""
        return self._summary([self._row(place, model, device, dtype) for place in range(len(self.triples))])

    def _summary(self, rows: Sequence[tuple[int, float, float]]) -> dict[str, Any]:
        # Ranks that share a sample have a row each, of their own tokens.
        sums: dict[int, list[float]] = {}
        for place, *figures in rows:
            sums[place] = [one + other for one, other in zip(sums.get(place, [0.0, 0.0]), figures, strict=True)]
        triples = [(self.triples[place], *sums[place]) for place in sorted(sums)]
        means = mean_losses([(triple.task, triple.level, *figures) for triple, *figures in triples])
        return means | {"each": [total / elements for _, total, elements in triples]}

    @torch.no_grad()
    def _row(self, place: int, model: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[int, float, float]:
        pack = self.recipe.collate([self._example(self.triples[place])]).to(device, dtype)
        output = self.recipe.loss(model, pack)
        return place, float(output.sum), float(output.per_sample_elements.sum())

    def _example(self, triple: Triple) -> Any:
        dataset = self.datasets[triple.dataset]
        row = dataset.index.slice(triple.row, 1).to_pylist()[0]
        random = SampleRandom(VALIDATION_SEED, triple.key, 0)
        try:
            sample = self.recipe.read(dataset, triple.row, row, random)
        except Exception as error:  # whatever is wrong with a sample, its key is told
            raise SampleError(f"validation sample {triple.key}: {type(error).__name__}: {error}") from error
        return self.recipe.load_validation_example(triple.dataset, row, sample, random, triple.level)


def mean_losses(rows: Sequence[tuple[str, float, float, float]]) -> dict[str, float]:
    """Means of (task, level, loss sum, elements) rows: samples weigh equally, whatever their size."""

    def mean(chosen: Callable[[tuple[str, float, float, float]], bool]) -> float:
        values = [total / elements for task, level, total, elements in filter(chosen, rows)]
        return sum(values) / len(values)

    result = {"loss": mean(lambda row: True)}
    for task in sorted({row[0] for row in rows}):
        result[f"task/{task}"] = mean(lambda row, task=task: row[0] == task)
    for level in sorted({row[1] for row in rows}):
        result[f"level/{level:.2f}"] = mean(lambda row, level=level: row[1] == level)
    return result


def paired_change(before: Sequence[float], after: Sequence[float], levels: int) -> tuple[float, float] | None:
    """Mean change of the loss between two validations and its standard error, paired triple by triple.

    Args:
        before, after: Losses of the same triples, the levels of a sample beside each other.
        levels: Noise levels of a sample; their changes are not independent and count as one.

    Returns:
        None when the two did not evaluate the same number of triples, or fewer than two samples.
    """
    if len(before) != len(after) or len(after) < 2 * levels:
        return None
    change = np.subtract(after, before).reshape(-1, levels).mean(1)
    return float(change.mean()), float(change.std(ddof=1) / np.sqrt(len(change)))
