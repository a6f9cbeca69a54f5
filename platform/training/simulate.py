"""What the packer will do, before launch: fill, imbalance and mixture for a number of ranks."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loomvideo.platform.training.config import PackConfig
from loomvideo.platform.training.order import SampleOrder, Source
from loomvideo.platform.training.packing import PackPlanner, fill_and_imbalance
from loomvideo.platform.training.randomness import SampleRandom


@dataclass
class Simulation:
    """Means over the simulated steps.

    Attributes:
        num_packs: Packs a step.
        budget: The token budget of a pack.
        fill: Cost over the budget.
        imbalance: Most expensive pack of a step over the step's mean, less 1.
        worst_imbalance: The largest of a step.
        tokens_per_step, samples_per_step: Over all ranks.
        num_held: Samples waiting in the packer at the end.
        largest_pack: Tokens and context tokens of the pack with most of both, weighed alike.
        most_context_tokens: The most of a pack.
        mean_context_tokens: The mean of a pack.
        draws: Samples drawn of every source, ``task/dataset``.
        epochs: The same over the source's size.
    """

    num_packs: int
    budget: int
    fill: float
    imbalance: float
    worst_imbalance: float
    tokens_per_step: float
    samples_per_step: float
    num_held: int
    largest_pack: tuple[int, int]
    most_context_tokens: int
    mean_context_tokens: float
    draws: dict[str, int] = field(default_factory=dict)
    epochs: dict[str, float] = field(default_factory=dict)


def simulate(
    sources: Sequence[Source],
    config: PackConfig,
    num_packs: int,
    num_steps: int,
    seed: int = 0,
    variant: Callable[[SampleRandom], int] | None = None,
) -> Simulation:
    """Plan ``num_steps`` steps of ``num_packs`` packs; ``variant`` as in :class:`SampleOrder`."""
    order = SampleOrder(sources, seed, variant)
    planner = PackPlanner(order, config, num_packs)
    fills, imbalances, sizes = [], [], []
    samples = 0
    draws: collections.Counter[str] = collections.Counter()
    for _ in range(num_steps):
        packs = planner.next_step()
        fill, imbalance = fill_and_imbalance(packs, config)
        fills.append(fill)
        imbalances.append(imbalance)
        for pack in packs:
            sizes.append((sum(draw.tokens for draw in pack), sum(draw.context_tokens for draw in pack)))
            samples += len(pack)
            draws.update(order.sources[draw.source].name for draw in pack)
    sources_sizes = {source.name: len(source.key) for source in order.sources}
    return Simulation(
        num_packs,
        config.tokens,
        sum(fills) / num_steps,
        sum(imbalances) / num_steps,
        max(imbalances),
        sum(tokens for tokens, _ in sizes) / num_steps,
        samples / num_steps,
        len(planner.state()["held"]),
        max(sizes, key=sum),
        max(context for _, context in sizes),
        sum(context for _, context in sizes) / len(sizes),
        dict(sorted(draws.items())),
        {name: draws[name] / size for name, size in sources_sizes.items()},
    )


def suggest_budget(sources: Sequence[Source], config: PackConfig, num_packs: int, num_steps: int = 8) -> int | None:
    """The smallest budget, up to four times the longest sample's cost, that fills packs to 97 %; None if none does.

    Fill depends on whether the lengths that occur add up to the budget, so a slightly different one can do much better.
    """
    longest = max(float(source.sizes.costs.max()) for source in sources)
    start = max(longest, 0.5 * config.tokens)
    for factor in (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0):
        budget = round(start * factor)
        tried = dataclasses.replace(config, tokens=budget)
        if simulate(sources, tried, num_packs, num_steps).fill >= 0.97:
            return budget
    return None
