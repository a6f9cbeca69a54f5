"""Pairwise arena: A against B with the order swapped, Bradley-Terry strengths with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize


@dataclass(frozen=True)
class Match:
    """One comparison after both orders were judged.

    Attributes:
        first: A model.
        second: The other model.
        outcome: 1 when ``first`` won, 0 when ``second`` won, 0.5 for a tie.
        item: The sample it was judged on, the unit of resampling.
    """

    first: str
    second: str
    outcome: float
    item: str


def match_from_orders(first: str, second: str, item: str, forward: float, swapped: float) -> Match:
    """Combine two judgements of one pair.

    Args:
        first: A model.
        second: The other model.
        item: The sample.
        forward: Outcome for ``first`` when it was shown first: 1 won, 0 lost, 0.5 tie.
        swapped: Outcome for ``first`` when it was shown second.

    Returns:
        The agreed outcome; orders that contradict each other are a tie, so that a position bias cancels.
    """
    return Match(first, second, forward if forward == swapped else 0.5, item)


def position_bias(judgements: Sequence[tuple[float, float]]) -> float:
    """Share of pairs whose winner changes with the order, from ``(forward, swapped)`` outcomes of ``first``."""
    return float(np.mean([a != b for a, b in judgements])) if judgements else float("nan")


@dataclass(frozen=True)
class Strength:
    """A model's Bradley-Terry strength on the Elo scale (400 points = odds of 10), mean 1000."""

    model: str
    rating: float
    low: float
    high: float
    num_matches: int


def bradley_terry(matches: Sequence[Match], resamples: int = 200, seed: int = 0) -> list[Strength]:
    """Maximum-likelihood strengths (Bradley & Terry 1952), ties as half wins, 95 % intervals over resampled items.

    A weak Gaussian prior (sd 800 points) keeps a model that won everything finite.

    Returns:
        Strengths, best first.
    """
    models = sorted({m for match in matches for m in (match.first, match.second)})
    position = {model: i for i, model in enumerate(models)}
    first = np.array([position[m.first] for m in matches])
    second = np.array([position[m.second] for m in matches])
    outcome = np.array([m.outcome for m in matches])
    items, item_of = np.unique([m.item for m in matches], return_inverse=True)
    point = _fit(first, second, outcome, np.ones(len(matches)), len(models))
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(items), np.full(len(items), 1 / len(items)), size=resamples)
    ratings = np.array([_fit(first, second, outcome, draw[item_of], len(models)) for draw in draws])
    low, high = np.quantile(ratings, [0.025, 0.975], axis=0)
    counts = np.bincount(np.concatenate([first, second]), minlength=len(models))
    strengths = [
        Strength(model, float(point[i]), float(low[i]), float(high[i]), int(counts[i]))
        for i, model in enumerate(models)
    ]
    return sorted(strengths, key=lambda s: -s.rating)


def _fit(first: np.ndarray, second: np.ndarray, outcome: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    scale = 400 / np.log(10)
    prior = 1 / (800 / scale) ** 2

    def loss_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
        gap = theta[first] - theta[second]
        loss = np.sum(weight * (np.logaddexp(0, gap) - outcome * gap)) + 0.5 * prior * np.sum(theta**2)
        slope = weight * (1 / (1 + np.exp(-gap)) - outcome)
        gradient = np.bincount(first, slope, count) - np.bincount(second, slope, count) + prior * theta
        return float(loss), gradient

    theta = minimize(loss_and_gradient, np.zeros(count), jac=True, method="L-BFGS-B").x
    return 1000 + scale * (theta - theta.mean())
