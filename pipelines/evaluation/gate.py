"""A gate: whether a candidate may replace a baseline, decided on one named metric.

A test of non-inferiority: the candidate passes when the lower bound of its gain lies above a threshold, by default a
loss of the metric's margin. Finding no difference is therefore no pass, and an equal model passes with a power that is
stated. One metric decides, so its p-value needs no correction; categories can only veto.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from loomvideo.pipelines.evaluation.compare import differing_headers
from loomvideo.pipelines.evaluation.results import SavedSuite
from loomvideo.pipelines.evaluation.statistics import (
    bootstrap_mean,
    cluster_means,
    detectable_difference,
    enough_clusters,
)
from loomvideo.pipelines.evaluation.table import metric as known_metric
from loomvideo.platform.errors import UserError

PASSED, FAILED, UNDECIDED = "passed", "failed", "too few samples to tell"
POWER = 0.8
MOST_SOURCES = 1_000_000


@dataclass(frozen=True)
class GateRule:
    """What a candidate must hold against the baseline.

    Attributes:
        suite: Benchmark.
        metric: The one metric that decides, in the direction that is better.
        margin: Loss of the mean that counts as none; None takes the metric's own.
        min_gain: Gain that must be shown instead of a loss within the margin; None asks for none.
        max_regress: Loss of a category that vetoes when it is shown; infinite for no veto.
        p: One-sided level of the bound, and of all vetoes together.
        idle: Whether a metric that improves by doing nothing may decide.
    """

    suite: str
    metric: str
    margin: float | None = None
    min_gain: float | None = None
    max_regress: float = float("inf")
    p: float = 0.05
    idle: bool = False

    def threshold(self) -> float:
        """The gain that the lower bound must lie above.

        Raises:
            UserError: for a metric that cannot be a gate, or has no margin of its own.
        """
        known = known_metric(self.metric)
        if known.higher_is_better is None:
            raise UserError(f"metric {self.metric}: neither high nor low is better, so it cannot be a gate")
        if known.idle and not self.idle:
            raise UserError(f"metric {self.metric}: improves by doing nothing; to gate on it all the same say --idle")
        if not 0 < self.p < 0.5:
            raise UserError(f"--p {self.p:g}: must be above 0 and under 0.5")
        if self.min_gain is not None:
            return self.min_gain
        margin = known.margin if self.margin is None else self.margin
        if margin is None:
            raise UserError(
                f"metric {self.metric}: has no margin of its own; say with --margin which loss counts as none"
            )
        if margin <= 0:
            raise UserError(f"--margin {margin:g}: must be above 0; to ask for a gain use --min-gain")
        return -margin


@dataclass(frozen=True)
class GateDecision:
    """What came of a gate.

    Attributes:
        verdict: ``passed``, ``failed`` or ``too few samples to tell``.
        reasons: Why it did not pass.
        gain: Mean gain of the candidate in the better direction.
        bound: Lower bound of the gain at the rule's level.
        threshold: What the bound must lie above.
        num_clusters: Sources compared.
        power: Probability that an equal model passes, at this spread and number of sources; of a model with twice the
            gain asked for, where a gain is.
        needed: Sources at which that power would be 80 %; 0 when it cannot be told.
    """

    verdict: str
    reasons: tuple[str, ...] = field(default=())
    gain: float = float("nan")
    bound: float = float("nan")
    threshold: float = float("nan")
    num_clusters: int = 0
    power: float = float("nan")
    needed: int = 0

    def line(self, name: str) -> str:
        """One line on the deciding metric."""
        told = f"{name}: gain {self.gain:+.3f}, bound {self.bound:+.3f} against {self.threshold:+.3f}"
        return f"{told}, {self.num_clusters} sources; power {self.power:.0%}, 80 % at {self.needed or '?'} sources"


def decide_gate(rule: GateRule, a: Mapping[str, SavedSuite], b: Mapping[str, SavedSuite]) -> GateDecision:
    """Whether candidate ``b`` may replace baseline ``a``.

    Raises:
        UserError: if the metric cannot be a gate or is missing from either run.
    """
    threshold = rule.threshold()
    if rule.suite not in a or rule.suite not in b:
        raise UserError(f"{rule.suite}/{rule.metric}: suite {rule.suite} is not in both runs")
    left, right = a[rule.suite], b[rule.suite]
    reasons = list(differing_headers({rule.suite: left}, {rule.suite: right}))
    for name, saved in (("baseline", left), ("candidate", right)):
        if saved.header.get("status") != "complete":
            reasons.append(f"{rule.suite}: the {name}'s run is {saved.header.get('status')}, so its means may flatter")
    gains, units, categories = _gains(rule, left, right)
    if not len(gains):
        raise UserError(f"metric {rule.suite}/{rule.metric}: not in both runs")
    only = len(left.values()) + len(right.values()) - 2 * len(left.values().keys() & right.values().keys())
    if only:
        reasons.append(f"{rule.suite}: {only} samples are in one run alone; evaluate both on the same samples")
    estimate = bootstrap_mean(gains, units, confidence=1 - 2 * rule.p, method="t")
    _, means = cluster_means(gains, units)
    spread = float(means.std(ddof=1)) if len(means) > 1 else float("nan")
    room = -threshold if threshold < 0 else max(threshold, 1e-9)
    power = passing_power(room, spread, len(means), rule.p)
    needed = sources_needed(room, spread, rule.p)
    reasons += _vetoes(rule, gains, units, categories)
    verdict = FAILED if reasons else PASSED
    decided = enough_clusters(len(means), 2 * rule.p) and not math.isnan(estimate.low)
    if not (decided and estimate.low > threshold):
        name = f"{rule.suite}/{rule.metric}"
        if decided and estimate.high < threshold:
            verdict = FAILED
            reasons.append(f"{name}: a gain of {estimate.value:+.3f} is under {threshold:+.3f}, and not by chance")
        elif not decided or power < POWER:
            verdict = FAILED if reasons else UNDECIDED
            reasons.append(f"{name}: {UNDECIDED} ({len(means)} sources, {needed or 'more'} needed)")
        else:
            verdict = FAILED
            reasons.append(f"{name}: not shown to be above {threshold:+.3f} (bound {estimate.low:+.3f})")
    return GateDecision(verdict, tuple(reasons), estimate.value, estimate.low, threshold, len(means), power, needed)


def passing_power(room: float, spread: float, num_clusters: int, p: float) -> float:
    """Probability that the bound of a model, whose true gain lies ``room`` above the threshold, lies above it too."""
    if num_clusters < 2 or not enough_clusters(num_clusters, 2 * p):
        return 0.0
    if spread == 0:
        return 1.0
    shift = room * math.sqrt(num_clusters) / spread
    return float(stats.nct.sf(stats.t.ppf(1 - p, num_clusters - 1), num_clusters - 1, shift))


def sources_needed(room: float, spread: float, p: float, power: float = POWER) -> int:
    """Fewest sources with this power; 0 when there is no spread to tell from or a million are not enough."""
    if math.isnan(spread):
        return 0
    # The normal distribution's answer is nearly right, and each look at the power is dear.
    near = ((stats.norm.ppf(1 - p) + stats.norm.ppf(power)) * spread / room) ** 2
    if near > MOST_SOURCES:
        return 0
    high = max(2, math.ceil(near))
    step = max(4, high // 16)
    while passing_power(room, spread, high, p) < power:
        high += step
    low = max(2, high - step)
    while low > 2 and passing_power(room, spread, low, p) >= power:
        low, high = max(2, low - step), low
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passing_power(room, spread, middle, p) >= power else (middle + 1, high)
    return high


def sample_size_line(suite: str, num_sources: int, p: float = 0.05) -> str:
    """What so many sources can tell about a judge's mean, for a look before anything is spent."""
    known = known_metric("judge")
    if num_sources < 2 or not enough_clusters(num_sources, p):
        return f"{suite}: {num_sources} sources: {UNDECIDED} two runs apart by the judge"
    found = detectable_difference(known.spread, num_sources, p)
    needed = sources_needed(known.margin, known.spread, p)
    return (
        f"{suite}: {num_sources} sources detect a judge difference of {found:.2f} with 80 % power; a gate with margin "
        f"{known.margin:g} wants {needed} (differences taken to spread by {known.spread:g})"
    )


def _gains(rule: GateRule, a: SavedSuite, b: SavedSuite) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains of the samples that both runs have a value of, their sources and categories."""
    values_a, values_b, units, categories = a.values(), b.values(), a.units(), a.categories()
    sign = 1 if known_metric(rule.metric).higher_is_better else -1
    rows = []
    for key in values_a.keys() & values_b.keys():
        gain = sign * (values_b[key].get(rule.metric, np.nan) - values_a[key].get(rule.metric, np.nan))
        if not np.isnan(gain):
            rows.append((key, gain))
    rows.sort()
    keys = [key for key, _ in rows]
    return (
        np.array([gain for _, gain in rows]),
        np.array([units[key] for key in keys]),
        np.array([categories[key] for key in keys]),
    )


def _vetoes(rule: GateRule, gains: np.ndarray, units: np.ndarray, categories: np.ndarray) -> list[str]:
    """Categories whose loss is shown to be over the limit; the level is shared among them."""
    groups = sorted(set(categories))
    if math.isinf(rule.max_regress) or len(groups) < 2:
        return []
    reasons = []
    for group in groups:
        chosen = categories == group
        estimate = bootstrap_mean(gains[chosen], units[chosen], confidence=1 - 2 * rule.p / len(groups), method="t")
        if enough_clusters(estimate.num_clusters, 2 * rule.p / len(groups)) and estimate.high < -rule.max_regress:
            name = f"{rule.suite}/{rule.metric}/{group}"
            reasons.append(f"{name}: lost {-estimate.value:.3f}, shown to be more than {rule.max_regress:g}")
    return reasons
