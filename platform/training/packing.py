"""Packs of whole samples, and their assignment to ranks.

A step is ``per_step`` packs, filled from the global stream by best fit under a cost budget, and is the same for any
number of ranks. The cost of a sample of L tokens is L + L^2 / attention_tokens, in units of one token's linear work
(projections, feed-forward), so equally full packs take equally long whatever mixture of lengths they hold. Nothing is
dropped and nothing waits for long: what did not fit one step is placed first in the next.
"""

import bisect
from collections.abc import Collection, Sequence
from typing import Any

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import PackConfig
from loomvideo.platform.training.order import Draw, SampleOrder


def sample_cost(tokens: int, attention_tokens: int) -> float:
    """Cost of a sample of ``tokens`` in units of one token's linear work."""
    return tokens + (tokens * tokens / attention_tokens if attention_tokens else 0.0)


class _Bin:
    __slots__ = ("draws", "gap", "room")

    def __init__(self, budget: float, room: float):
        self.draws: list[Draw] = []
        self.gap = budget
        self.room = room


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
        longest = max(max(source.tokens) for source in order.sources)
        if config.max_tokens and longest > config.max_tokens:
            raise UserError(
                f"training.pack.max_tokens={config.max_tokens}: a sample has {longest} tokens; "
                "raise it, or prepare shorter clips"
            )

    def cost(self, draw: Draw) -> float:
        """Cost of a draw."""
        return sample_cost(draw.tokens, self.config.attention_tokens)

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
        total = sum(map(self.cost, held))
        attempts = 0
        while total < wanted:
            draw = self.order.next()
            attempts += 1
            if draw.key not in excluded:
                held.append(draw)
                total += self.cost(draw)
            elif attempts > 100 * sum(len(source.key) for source in self.order.sources) + 100:
                raise UserError("every sample is quarantined; look at quarantine.json in the run folder")
        prefix, due_cost = num_due, sum(map(self.cost, held[:num_due]))
        while prefix < len(held) and due_cost + self.cost(held[prefix]) <= need:
            due_cost += self.cost(held[prefix])
            prefix += 1
        bins = [_Bin(budget, self.config.max_tokens or float("inf")) for _ in range(self.packs_per_step)]
        placed: set[int] = set()
        for part in (range(num_due), range(num_due, prefix)):
            for place in sorted(part, key=lambda place: (-self.cost(held[place]), place)):
                if self._place(bins, held[place]):
                    placed.add(place)
        self._fill_gaps(bins, held, placed)
        late = [place for place in range(len(held)) if place not in placed]
        self._held = [held[place] for place in late]
        self._num_due = sum(place < prefix for place in late)
        self.step += 1
        bins.sort(key=lambda item: item.gap)
        return [item.draws for item in bins]

    def _place(self, bins: list[_Bin], draw: Draw) -> bool:
        """Put a draw into the fullest bin it fits; a draw larger than any budget gets an empty bin."""
        cost = self.cost(draw)
        fitting = [item for item in bins if item.gap >= cost and item.room >= draw.tokens]
        if not fitting and cost > self.config.tokens:
            fitting = [item for item in bins if not item.draws]
        if not fitting:
            return False
        self._put(min(fitting, key=lambda item: item.gap), draw, cost)
        return True

    @staticmethod
    def _put(item: _Bin, draw: Draw, cost: float) -> None:
        item.draws.append(draw)
        item.gap -= cost
        item.room -= draw.tokens

    def _fill_gaps(self, bins: list[_Bin], held: list[Draw], placed: set[int]) -> None:
        """Fill what is left of every bin with the largest samples that fit, widest gap first."""
        free = sorted((self.cost(held[place]), -place) for place in range(len(held)) if place not in placed)
        for item in sorted(bins, key=lambda item: -item.gap):
            end = bisect.bisect_right(free, (item.gap, 0))
            while end > 0:
                cost, place = free[end - 1]
                if held[-place].tokens <= item.room:
                    free.pop(end - 1)
                    placed.add(-place)
                    self._put(item, held[-place], cost)
                    end = bisect.bisect_right(free, (item.gap, 0))
                else:
                    end -= 1
        # Widest gaps took first pick; an empty bin is left only if every sample exceeds the budget.
        for item in bins:
            if not item.draws and free:
                cost, place = free.pop(0)
                placed.add(-place)
                self._put(item, held[-place], cost)

    def state(self) -> dict[str, Any]:
        """A few integers that continue the plan."""
        return {
            "step": self.step,
            "order": self.order.state(),
            "held": [[self.order.sources[draw.source].name, draw.number] for draw in self._held],
            "num_due": self._num_due,
            "packs_per_step": self.packs_per_step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue a plan; draws held of a source that the mixture lost are let go."""
        self.order.load_state(state["order"])
        number_of = {source.name: number for number, source in enumerate(self.order.sources)}
        self._held = [self.order.draw(number_of[name], draw) for name, draw in state["held"] if name in number_of]
        self._num_due = min(state["num_due"], len(self._held))
        self.step = state["step"]


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
    costs = [sum(sample_cost(draw.tokens, config.attention_tokens) for draw in pack) for pack in packs]
    mean = sum(costs) / len(costs)
    return mean / config.tokens, max(costs) / mean - 1.0
