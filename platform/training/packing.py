"""Packs of whole samples, and their assignment to ranks.

A step is ``per_step`` packs, filled from the global stream by best fit under a cost budget, and is the same for any
number of ranks. The cost of a visit is the recipe's (ours counts the operations of the network, attention and
conditioning included), in units of one token's linear layers, so equally full packs take equally long whatever mixture
they hold. Nothing is dropped and nothing waits for long: what did not fit one step is placed first in the next.
"""

import bisect
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import PackConfig, TrainingConfig
from loomvideo.platform.training.order import Draw, SampleOrder, build_sources
from loomvideo.platform.training.recipe import Recipe, TrainingDataset

GOOD_SPREAD = 0.005
"""Widest less narrowest gap, in budgets, at which no other way of packing is tried."""


class _Bin:
    __slots__ = ("context_room", "draws", "gap", "room")

    def __init__(self, config: PackConfig):
        self.draws: list[Draw] = []
        self.gap = float(config.tokens)
        self.room = config.max_tokens or float("inf")
        self.context_room = config.max_context_tokens or float("inf")

    def fits(self, draw: Draw) -> bool:
        """Whether the hard limits leave room for a draw."""
        return draw.tokens <= self.room and draw.context_tokens <= self.context_room

    def put(self, draw: Draw) -> None:
        """Add a draw."""
        self.draws.append(draw)
        self.gap -= draw.cost
        self.room -= draw.tokens
        self.context_room -= draw.context_tokens

    def take(self, number: int) -> Draw:
        """Remove the draw at a place."""
        draw = self.draws.pop(number)
        self.gap += draw.cost
        self.room += draw.tokens
        self.context_room += draw.context_tokens
        return draw


class PackPlanner:
    """Plans the packs of one step after another.

    Args:
        order: The global stream.
        config: Budgets.
        packs_per_step: Packs in a step over all ranks.
    """

    def __init__(self, order: SampleOrder, config: PackConfig, packs_per_step: int):
        self.order, self.config, self.packs_per_step = order, config, packs_per_step
        self.step = 0
        self._held: list[Draw] = []
        self._num_due = 0
        for key, limit, kind, fix in (
            ("max_tokens", config.max_tokens, "tokens", "prepare shorter clips"),
            ("max_context_tokens", config.max_context_tokens, "context_tokens", "prepare shorter texts"),
        ):
            longest = max(int(getattr(source.sizes, kind).max()) for source in order.sources)
            if limit and longest > limit:
                name = kind.replace("_", " ")
                raise UserError(f"training.pack.{key}={limit}: a sample has {longest} {name}; raise it, or {fix}")

    def next_step(self, excluded: Collection[str] = ()) -> list[list[Draw]]:
        """The packs of the next step, most expensive first.

        Args:
            excluded: Keys of quarantined samples; their draws are passed over.
        """
        budget = float(self.config.tokens)
        need = budget * self.packs_per_step
        held = [draw for draw in self._held if draw.key not in excluded]
        num_due = min(self._num_due, len(held))
        # At least a few packs of lookahead, or small steps would find nothing to fill their gaps with.
        wanted = need + max(self.config.lookahead * need, 8 * budget)
        total = sum(draw.cost for draw in held)
        attempts = 0
        while total < wanted:
            draw = self.order.next()
            attempts += 1
            if draw.key not in excluded:
                held.append(draw)
                total += draw.cost
            elif attempts > 100 * sum(len(source.key) for source in self.order.sources) + 100:
                raise UserError("every sample is quarantined; look at quarantine.json in the run folder")
        prefix, due_cost = num_due, sum(draw.cost for draw in held[:num_due])
        while prefix < len(held) and due_cost + held[prefix].cost <= need:
            due_cost += held[prefix].cost
            prefix += 1
        # Into the widest gap: every pack gets of everything. Into the narrowest: large samples meet that fit together.
        bins, placed = self._packed(held, num_due, prefix, widest=True)
        if _spread(bins) > GOOD_SPREAD * budget:
            others, placed_there = self._packed(held, num_due, prefix, widest=False)
            if _spread(others) < _spread(bins):
                bins, placed = others, placed_there
        late = [place for place in range(len(held)) if place not in placed]
        self._held = [held[place] for place in late]
        self._num_due = sum(place < prefix for place in late)
        self.step += 1
        bins.sort(key=lambda item: item.gap)
        return [item.draws for item in bins]

    def _packed(self, held: list[Draw], num_due: int, prefix: int, widest: bool) -> tuple[list[_Bin], set[int]]:
        """Packs of the first ``prefix`` draws, those that are due before others, and of what fills the gaps."""
        bins = [_Bin(self.config) for _ in range(self.packs_per_step)]
        # (gap, number) in order, so that a place is found in logarithmic time.
        gaps = [(item.gap, number) for number, item in enumerate(bins)]
        placed: set[int] = set()
        for part in (range(num_due), range(num_due, prefix)):
            for place in sorted(part, key=lambda place: (-held[place].cost, place)):
                if self._place(bins, gaps, held[place], widest):
                    placed.add(place)
        self._fill_gaps(bins, held, placed)
        self._exchange(bins, held, placed, num_due)
        return bins, placed

    def _place(self, bins: list[_Bin], gaps: list[tuple[float, int]], draw: Draw, widest: bool) -> bool:
        """Put a draw into the bin with the widest or narrowest gap it fits; one over any budget gets an empty bin."""
        first = bisect.bisect_left(gaps, (draw.cost, -1))
        if draw.cost > self.config.tokens:
            first = bisect.bisect_left(gaps, (float(self.config.tokens), -1))
        order = range(len(gaps) - 1, first - 1, -1) if widest else range(first, len(gaps))
        for position in order:
            number = gaps[position][1]
            if bins[number].fits(draw):
                gaps.pop(position)
                bins[number].put(draw)
                bisect.insort(gaps, (bins[number].gap, number))
                return True
        return False

    def _fill_gaps(self, bins: list[_Bin], held: list[Draw], placed: set[int]) -> None:
        """Fill what is left of every bin with the largest samples that fit, widest gap first."""
        free = sorted((held[place].cost, -place) for place in range(len(held)) if place not in placed)
        for item in sorted(bins, key=lambda item: -item.gap):
            end = bisect.bisect_right(free, (item.gap, 0))
            while end > 0:
                _, place = free[end - 1]
                if item.fits(held[-place]):
                    free.pop(end - 1)
                    placed.add(-place)
                    item.put(held[-place])
                    end = bisect.bisect_right(free, (item.gap, 0))
                else:
                    end -= 1
        # Widest gaps took first pick; an empty bin is left only if every sample exceeds the budget.
        for item in bins:
            if not item.draws and free:
                _, place = free.pop(0)
                placed.add(-place)
                item.put(held[-place])

    def _exchange(self, bins: list[_Bin], held: list[Draw], placed: set[int], num_due: int) -> None:
        """Narrow the widest gaps by giving a pack a larger sample for one of its own, which the next step then takes.

        A sample that waits already keeps its place, so none waits for more than one step because of this.
        """
        place_of = {id(held[place]): place for place in range(len(held))}
        free = sorted((held[place].cost, -place) for place in range(len(held)) if place not in placed)
        for item in sorted(bins, key=lambda item: -item.gap):
            while item.gap > GOOD_SPREAD * self.config.tokens:
                best_gain, best = 0.0, None
                for number, draw in enumerate(item.draws):
                    if place_of[id(draw)] < num_due:
                        continue
                    end = bisect.bisect_right(free, (draw.cost + item.gap, 0))
                    gain = free[end - 1][0] - draw.cost if end else 0.0
                    if gain > best_gain and _fits_instead(item, held[-free[end - 1][1]], draw):
                        best_gain, best = gain, (number, end - 1)
                if best is None:
                    break
                number, position = best
                _, place = free.pop(position)
                given = place_of[id(item.take(number))]
                item.put(held[-place])
                placed.remove(given)
                placed.add(-place)
                bisect.insort(free, (held[given].cost, -given))

    def state(self) -> dict[str, Any]:
        """A few integers that continue the plan."""
        return {
            "step": self.step,
            "order": self.order.state(),
            "held": [[self.order.sources[draw.source].name, draw.number] for draw in self._held],
            "num_due": self._num_due,
            "packs_per_step": self.packs_per_step,
            "tokens_per_step": self.packs_per_step * self.config.tokens,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue a plan; draws held of a source that the mixture lost are let go."""
        self.order.load_state(state["order"])
        number_of = {source.name: number for number, source in enumerate(self.order.sources)}
        self._held = [self.order.draw(number_of[name], draw) for name, draw in state["held"] if name in number_of]
        self._num_due = min(state["num_due"], len(self._held))
        self.step = state["step"]


def _fits_instead(item: _Bin, draw: Draw, other: Draw) -> bool:
    """Whether the hard limits let a pack hold a draw in place of another."""
    return draw.tokens <= item.room + other.tokens and draw.context_tokens <= item.context_room + other.context_tokens


def _spread(bins: Sequence[_Bin]) -> float:
    return max(item.gap for item in bins) - min(item.gap for item in bins)


def planner_of(
    recipe: Recipe, datasets: Sequence[TrainingDataset], config: TrainingConfig, packs_per_step: int
) -> PackPlanner:
    """The planner of a run, at its first step.

    Args:
        recipe: Knows what samples take of a pack.
        datasets: The run's datasets.
        config: The run's configuration.
        packs_per_step: Packs in a step over all ranks.
    """
    indexes = [dataset.index for dataset in datasets]
    sizes = [recipe.sample_sizes(number, index) for number, index in enumerate(indexes)]
    order = SampleOrder(build_sources(indexes, sizes, config.split, config.mixture), config.seed, recipe.visit_variant)
    return PackPlanner(order, config.pack, packs_per_step)


def packs_for(tokens_per_step: float, tokens: int, world_size: int, stretch: float) -> tuple[int, int]:
    """Packs a step and the budget of a pack that keep a step's tokens on a number of workers.

    A few workers less get somewhat larger packs: 64 packs on 56 workers would take two micro-steps, twice the time.

    Args:
        tokens_per_step: Budget of all packs of a step.
        tokens: Budget of a pack as configured.
        world_size: Workers.
        stretch: How much larger than configured a pack may be.
    """
    micro_steps = max(1, math.ceil(tokens_per_step / (tokens * world_size * stretch) - 1e-9))
    packs = micro_steps * world_size
    return packs, round(tokens_per_step / packs)


def packs_of_run(config: PackConfig, state: Mapping[str, Any] | None, pack_ranks: int) -> tuple[PackConfig, int]:
    """Budget and number of a step's packs: on another number of workers than before, the same tokens a step.

    Args:
        config: What is configured.
        state: The state in the checkpoint that the run goes on from; None at the start.
        pack_ranks: Workers that have packs of their own.
    """
    if config.per_step or state is None:
        return config, config.per_step or pack_ranks
    planned = state["planner"]
    before = state["config"]["pack"]["tokens"]
    tokens_per_step = planned.get("tokens_per_step", planned["packs_per_step"] * before) * config.tokens / before
    packs, tokens = packs_for(tokens_per_step, config.tokens, pack_ranks, config.stretch)
    return dataclasses.replace(config, tokens=tokens), packs


def packs_of_rank(num_packs: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """The packs a rank computes, one a micro-step, as (pack index, counts).

    Packs come sorted by cost; each micro-step takes neighbours, so ranks that wait for each other have equal work. When
    the packs do not divide, the last micro-step repeats packs whose loss then does not count.
    """
    num_micro_steps = -(-num_packs // world_size)
    places = [micro_step * world_size + rank for micro_step in range(num_micro_steps)]
    return [(place, True) if place < num_packs else (num_packs - 1, False) for place in places]


def fill_and_imbalance(packs: Sequence[Sequence[Draw]], config: PackConfig) -> tuple[float, float]:
    """Mean cost over the budget, and the most expensive pack over the mean less 1."""
    costs = [sum(draw.cost for draw in pack) for pack in packs]
    mean = sum(costs) / len(costs)
    return mean / config.tokens, max(costs) / mean - 1.0
