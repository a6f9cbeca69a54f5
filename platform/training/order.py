"""The global order of samples: a mixture of sources, each walked in shuffled epochs.

The order is one endless stream, the same for any number of ranks. Position i of the stream takes its source from a
low-discrepancy sequence (the golden-ratio additive recurrence), so that every stretch of the stream follows the mixture
weights closely, and its sample from the source's current epoch, a seeded permutation: each sample once an epoch.
The state is the position and one counter a source.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import MixtureConfig
from loomvideo.platform.training.randomness import SampleRandom, stream

GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class SampleSizes:
    """What samples take of a pack, by row and variant: arrays [rows, variants].

    A visit may be of another variant than the whole sample, such as one whose conditioning is dropped; variant 0 is the
    whole sample and the largest.

    Attributes:
        tokens: Length in the pack's sequence.
        context_tokens: Tokens of conditioning beside the sequence.
        costs: Work, in units of one token's linear layers.
    """

    tokens: np.ndarray
    context_tokens: np.ndarray
    costs: np.ndarray

    @classmethod
    def plain(cls, tokens: Sequence[int]) -> "SampleSizes":
        """One variant, without conditioning, whose cost is its length."""
        lengths = np.asarray(tokens, dtype=np.int64).reshape(-1, 1)
        return cls(lengths, np.zeros_like(lengths), lengths.astype(np.float64))

    def __post_init__(self) -> None:
        if not self.tokens.shape == self.context_tokens.shape == self.costs.shape or self.tokens.ndim != 2:
            raise ValueError("tokens, context_tokens and costs must be arrays [rows, variants] of one shape")

    def take(self, rows: Sequence[int]) -> "SampleSizes":
        """The sizes of some rows, in their order."""
        return SampleSizes(self.tokens[rows], self.context_tokens[rows], self.costs[rows])


@dataclass(frozen=True, slots=True)
class Draw:
    """One visit to one sample.

    Attributes:
        source: Index of the source; ``number`` counts its draws.
        dataset, row: Where the sample is.
        key: The sample's key.
        visit: How often the sample was drawn before.
        tokens: Its length in a pack.
        context_tokens: Its tokens of conditioning.
        cost: Its work in units of one token's linear layers.
    """

    source: int
    number: int
    dataset: int
    row: int
    key: str
    visit: int
    tokens: int
    context_tokens: int
    cost: float


@dataclass
class Source:
    """The samples of one task in one dataset; ``weight`` is its probability."""

    name: str
    weight: float
    dataset: list[int]
    row: list[int]
    key: list[str]
    sizes: SampleSizes


def build_sources(
    indexes: Sequence[Any], sizes: Sequence[SampleSizes], split: str, mixture: MixtureConfig
) -> list[Source]:
    """Group the rows of a split by (task, dataset) and weigh the groups.

    Args:
        indexes: ``pyarrow.Table`` of every dataset folder.
        sizes: The sizes of every row, by folder.
        split: The index split to take.
        mixture: The weights.

    Raises:
        UserError: if a weight names nothing, is negative, or nothing is left.
    """
    groups: dict[tuple[str, str], Source] = {}
    offsets = np.cumsum([0, *(len(part.tokens) for part in sizes)])
    for folder, index in enumerate(indexes):
        columns = (index.column(name).to_pylist() for name in ("task", "dataset", "key", "split"))
        for row, (task, dataset, key, row_split) in enumerate(zip(*columns, strict=True)):
            if row_split != split:
                continue
            source = groups.get((task, dataset))
            if source is None:
                source = groups[task, dataset] = Source(f"{task}/{dataset}", 0.0, [], [], [], _NO_SIZES)
            source.dataset.append(folder)
            source.row.append(row)
            source.key.append(key)
    whole = _joined(sizes)
    for source in groups.values():
        source.sizes = whole.take(offsets[source.dataset] + np.asarray(source.row))
    for section, weights, present in (
        ("tasks", mixture.tasks, {task for task, _ in groups}),
        ("datasets", mixture.datasets, {dataset for _, dataset in groups}),
    ):
        for name, weight in weights.items():
            if weight < 0:
                raise UserError(f"training.mixture.{section}.{name}={weight}: must not be negative")
            if name not in present and weight > 0:
                have = ", ".join(sorted(present)) or f"nothing in split {split}"
                raise UserError(f"training.mixture.{section}.{name}: the shards have {have}")
    of_task: dict[str, float] = {}
    size_of_task: dict[str, int] = {}
    for (task, dataset), source in groups.items():
        source.weight = mixture.datasets.get(dataset, 1.0) * (len(source.key) if mixture.by_size else 1)
        of_task[task] = of_task.get(task, 0.0) + source.weight
        size_of_task[task] = size_of_task.get(task, 0) + len(source.key)
    for (task, _), source in groups.items():
        if of_task[task]:
            size = size_of_task[task] if mixture.by_size else 1
            source.weight *= mixture.tasks.get(task, 1.0) * size / of_task[task]
    sources = [groups[name] for name in sorted(groups) if groups[name].weight > 0]
    if not sources:
        raise UserError(f"no sample to train on: the shards have none of split {split!r}, or all mixture weights are 0")
    total = sum(source.weight for source in sources)
    for source in sources:
        source.weight /= total
    return sources


_NO_SIZES = SampleSizes.plain([])


def _joined(sizes: Sequence[SampleSizes]) -> SampleSizes:
    """All rows, folder after folder."""
    parts = zip(*((part.tokens, part.context_tokens, part.costs) for part in sizes), strict=True)
    return SampleSizes(*(np.concatenate(part) for part in parts))


def data_entry(step: int, datasets: Sequence[str], mixture: MixtureConfig) -> dict[str, Any]:
    """What a run draws from after ``step`` steps, for its checkpoints: digests of the datasets, and the mixture."""
    return {"step": step, "datasets": list(datasets), "mixture": dataclasses.asdict(mixture)}


def continued_data(
    url: str, state: dict[str, Any], datasets: Sequence[Any], mixture: MixtureConfig
) -> list[dict[str, Any]]:
    """What a run drew from so far, and from now on if that changed: datasets may join, weights may change.

    Args:
        url: The address of the checkpoint, for messages.
        state: Its state.
        datasets: The datasets from now on, with ``digest`` and ``index``.
        mixture: The mixture from now on.

    Raises:
        UserError: if a dataset of the run is missing, or one that joins would change the order of another.
    """
    history = state.get("data") or [{"step": 0, "datasets": state["datasets"], "mixture": state["config"]["mixture"]}]
    known, digests = set(history[-1]["datasets"]), [dataset.digest for dataset in datasets]
    missing = known - set(digests)
    if missing:
        raise UserError(
            f"{url}: datasets of the run so far are missing ({', '.join(sorted(missing))}); put the shards back (a "
            "weight of 0 in training.mixture leaves them out), or use another run name"
        )
    old = {name for dataset in datasets if dataset.digest in known for name in _names(dataset)}
    new = {name for dataset in datasets if dataset.digest not in known for name in _names(dataset)}
    if old & new:
        task, name = min(old & new)
        raise UserError(
            f"data.shards: a dataset that joins holds samples of {task} named dataset={name}, as the run has already, "
            "in an order that more of them would change; prepare the new one under another name"
        )
    now = data_entry(state["step"], digests, mixture)
    if all(now[key] == history[-1][key] for key in ("datasets", "mixture")):
        return history
    return [*history, now]


def _names(dataset: Any) -> set[tuple[str, str]]:
    return set(zip(*(dataset.index.column(name).to_pylist() for name in ("task", "dataset")), strict=True))


class SampleOrder:
    """The stream of draws.

    Args:
        sources: What :func:`build_sources` gave.
        seed: The run's seed.
        variant: Which variant of its sample a visit is (a recipe's ``visit_variant``); None for the whole sample.
    """

    BLOCK = 4096

    def __init__(self, sources: Sequence[Source], seed: int, variant: Callable[[SampleRandom], int] | None = None):
        self.sources = list(sources)
        self.seed = seed
        self._variant = variant
        self.position = 0
        self.counts = [0] * len(self.sources)
        self._offset = stream("mixture", seed).random()
        self._bounds = np.cumsum([source.weight for source in self.sources])[:-1]
        self._block_start = -1
        self._block: np.ndarray | None = None
        self._epochs: dict[tuple[int, int], np.ndarray] = {}

    def next(self) -> Draw:
        """The draw at the current position; moves on."""
        block_start = self.position - self.position % self.BLOCK
        if block_start != self._block_start:
            points = (self._offset + np.arange(block_start, block_start + self.BLOCK) * GOLDEN_RATIO) % 1.0
            self._block = np.searchsorted(self._bounds, points, side="right")
            self._block_start = block_start
        source = int(self._block[self.position - block_start])
        self.position += 1
        self.counts[source] += 1
        return self.draw(source, self.counts[source] - 1)

    def draw(self, source: int, number: int) -> Draw:
        """Draw ``number`` of a source."""
        samples = self.sources[source]
        visit, place = divmod(number, len(samples.key))
        index = int(self._epoch(source, visit)[place])
        key, sizes = samples.key[index], samples.sizes
        which = (index, self._variant(SampleRandom(self.seed, key, visit)) if self._variant else 0)
        return Draw(
            source,
            number,
            samples.dataset[index],
            samples.row[index],
            key,
            visit,
            int(sizes.tokens[which]),
            int(sizes.context_tokens[which]),
            float(sizes.costs[which]),
        )

    def _epoch(self, source: int, epoch: int) -> np.ndarray:
        name = (source, epoch)
        if name not in self._epochs:
            samples = self.sources[source]
            # Draws held back by the packer may still be of the epoch before.
            self._epochs.pop((source, epoch - 2), None)
            self._epochs[name] = stream("epoch", self.seed, samples.name, epoch).permutation(len(samples.key))
        return self._epochs[name]

    def state(self) -> dict[str, Any]:
        """A few integers that continue the stream."""
        return {
            "position": self.position,
            "counts": {source.name: count for source, count in zip(self.sources, self.counts, strict=True)},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue a stream; a source that the mixture gained since starts at its first sample."""
        self.position = state["position"]
        self.counts = [state["counts"].get(source.name, 0) for source in self.sources]
