"""A rank's parts of parameters, and what fills them: weights, checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Request = tuple[str, str, int, int]
"""Elements [start, stop) of a flattened parameter: (``master``, ``exp_avg``, ``exp_avg_sq`` or ``ema``, name, start,
stop)."""

Source = Callable[[Sequence[Request]], Iterator[Tensor | None]]
"""Answers requests in their order: [stop - start] float32 each, or None when there is no such state."""


@dataclass
class ParameterSlice:
    """A rank's contiguous part of one parameter, elements [start, stop) of it flattened.

    Attributes:
        views: ``master``, and once they exist ``exp_avg``, ``exp_avg_sq`` and ``ema``: [stop - start] float32.
    """

    name: str
    start: int
    stop: int
    views: dict[str, Tensor]


def requests_of(wanted: Sequence[tuple[ParameterSlice, str, Tensor]]) -> list[Request]:
    """What (part, kind, view) rows ask a source for."""
    return [(kind, part.name, part.start, part.stop) for part, kind, _ in wanted]


def read_from(weights: Mapping[str, Tensor]) -> Source:
    """A source of master weights, one whole parameter in memory at a time."""

    def answer(requests: Sequence[Request]) -> Iterator[Tensor | None]:
        for kind, name, start, stop in requests:
            yield weights[name].flatten()[start:stop].float() if kind == "master" else None

    return answer
