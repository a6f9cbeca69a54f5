"""Honest statistics of sample scores: clustered intervals, paired tests, reliability, detectable differences.

Samples that share a source video are not independent, so the *cluster* (the source) is the unit that is resampled,
sign-flipped and counted everywhere. Scores are float arrays with NaN for a sample without a valid score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

DEFAULT_RESAMPLES = 2000
_EXACT_CLUSTERS = 14
_BOOTSTRAP_CLUSTERS = 12


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval.

    Attributes:
        value: The point estimate.
        low: Lower end of the interval; NaN when one cluster alone leaves the spread unknown.
        high: Upper end.
        num_samples: Valid samples.
        num_clusters: Clusters with a valid sample.
    """

    value: float
    low: float
    high: float
    num_samples: int
    num_clusters: int


def micro_mean(scores: np.ndarray) -> float:
    """Mean over valid samples; NaN when there is none."""
    valid = scores[~np.isnan(scores)]
    return float(valid.mean()) if valid.size else float("nan")


def bootstrap_mean(
    scores: np.ndarray,
    clusters: Sequence[str] | np.ndarray,
    categories: Sequence[str] | np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    method: Literal["bootstrap", "t"] = "bootstrap",
) -> Estimate:
    """Cluster bootstrap of the micro mean, or of the macro mean when ``categories`` is given.

    The interval is the expanded percentile one (Hesterberg 2015, "What teachers should know about the bootstrap"):
    percentiles are widened to Student's t with clusters - 1 degrees of freedom and for the bootstrap's bias of the
    variance, without which intervals of a few dozen clusters cover too little. Under a dozen it is a t interval.

    Args:
        scores: ``[samples]`` with NaN for invalid.
        clusters: The source of each sample.
        categories: The category of each sample, for a macro mean.
        confidence: Coverage aimed at.
        resamples: Bootstrap draws.
        seed: Seed of the draws.
        method: ``t`` takes the t interval for any number of clusters; one of its ends alone then errs as often as it
            says, where percentiles of a dozen clusters err half as often again.
    """
    valid = ~np.isnan(scores)
    names = np.asarray(clusters)[valid]
    kept = scores[valid]
    groups = np.asarray(categories)[valid] if categories is not None else np.zeros(len(kept), int)
    if not kept.size:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, 0)
    cluster_of, group_of = (np.unique(values, return_inverse=True)[1] for values in (names, groups))
    num_clusters, num_groups = cluster_of.max() + 1, group_of.max() + 1
    sums, counts = np.zeros((num_clusters, num_groups)), np.zeros((num_clusters, num_groups))
    np.add.at(sums, (cluster_of, group_of), kept)
    np.add.at(counts, (cluster_of, group_of), 1)
    value = float((sums.sum(0) / counts.sum(0)).mean())
    if num_clusters == 1:
        return Estimate(value, float("nan"), float("nan"), len(kept), 1)
    if num_clusters < _BOOTSTRAP_CLUSTERS or method == "t":
        # Percentiles of so few clusters cannot reach beyond the data: Student's t on the linearised ratio instead.
        influence = ((sums - counts * (sums.sum(0) / counts.sum(0))) / counts.sum(0)).mean(1)
        error = np.sqrt(num_clusters / (num_clusters - 1) * np.sum(influence**2))
        reach = float(stats.t.ppf(0.5 + confidence / 2, num_clusters - 1) * error)
        return Estimate(value, value - reach, value + reach, len(kept), int(num_clusters))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = np.nanmean((weights @ sums) / (weights @ counts), axis=1)
    # z_expanded = t * sqrt(n / (n - 1)): the percentile whose normal quantile equals the wanted t quantile.
    quantile = stats.t.ppf(0.5 + confidence / 2, num_clusters - 1) * np.sqrt(num_clusters / (num_clusters - 1))
    tail = stats.norm.cdf(-quantile)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), len(kept), int(num_clusters))


@dataclass(frozen=True)
class PairedTest:
    """Comparison of two runs on shared samples; ``difference`` is b - a.

    Attributes:
        difference: Mean over shared valid samples.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        permutation_p: Two-sided sign-flip permutation test over cluster sums.
        num_samples: Shared valid samples.
        num_clusters: Clusters among them.
        spread: Standard deviation of the clusters' mean differences.
    """

    difference: float
    low: float
    high: float
    permutation_p: float
    num_samples: int
    num_clusters: int
    spread: float

    def detectable(self, alpha: float = 0.05) -> float:
        """Smallest true difference found with 80 % power at this number of clusters, spread and level."""
        return detectable_difference(self.spread, self.num_clusters, alpha)


def paired_test(a: np.ndarray, b: np.ndarray, clusters: Sequence[str], seed: int = 0) -> PairedTest:
    """Test whether run ``b`` differs from run ``a`` on the same samples (arrays aligned, NaN where invalid)."""
    difference = b - a
    valid = ~np.isnan(difference)
    kept, names = difference[valid], np.asarray(clusters)[valid]
    estimate = bootstrap_mean(kept, names, seed=seed)
    nan = float("nan")
    if not kept.size:
        return PairedTest(nan, nan, nan, nan, 0, 0, nan)
    sums, means = cluster_means(kept, names)
    spread = float(means.std(ddof=1)) if len(means) > 1 else nan
    return PairedTest(
        difference=estimate.value,
        low=estimate.low,
        high=estimate.high,
        permutation_p=sign_flip_test(sums, seed=seed),
        num_samples=len(kept),
        num_clusters=len(sums),
        spread=spread,
    )


def cluster_means(scores: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and mean of each cluster's valid scores, in the order of the clusters' names."""
    _, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(cluster_of, weights=scores)
    return sums, sums / np.bincount(cluster_of)


def enough_clusters(num_clusters: int, alpha: float) -> bool:
    """Whether any result of a two-sided sign-flip test of so many clusters could be under the level at all."""
    return num_clusters > _EXACT_CLUSTERS or 2.0 ** (1 - num_clusters) < alpha


def sign_flip_test(differences: np.ndarray, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the mean of symmetric differences: exact up to 14 clusters, else random sign flips."""
    n = len(differences)
    observed = abs(differences.sum())
    if n <= _EXACT_CLUSTERS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ differences) >= observed - 1e-12))
    signs = np.random.default_rng(seed).integers(0, 2, (resamples, n)) * 2 - 1
    hits = np.sum(np.abs(signs @ differences) >= observed - 1e-12)
    return float((hits + 1) / (resamples + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values; NaN stays NaN and does not count as a test."""
    tested = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    adjusted = dict.fromkeys(p_values, float("nan"))
    largest = 0.0
    for rank, (p, name) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[name] = largest
    return adjusted


def detectable_difference(spread: float, num_clusters: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest mean difference a two-sided paired t-test finds with the given power.

    Args:
        spread: Standard deviation of the cluster differences.
        num_clusters: Clusters compared.
        alpha: Significance level.
        power: Probability of finding it.
    """
    if num_clusters < 2:
        return float("nan")
    quantiles = stats.t.ppf([1 - alpha / 2, power], num_clusters - 1)
    return float(quantiles.sum() * spread / np.sqrt(num_clusters))


@dataclass(frozen=True)
class Reliability:
    """Agreement of repeated judgements of the same samples.

    Attributes:
        icc: ICC(1,1), one-way random effects, of a single judgement (Shrout & Fleiss 1979).
        icc_mean: ICC(1,k) of the mean of the k repeats.
        changed: Share of samples whose repeats are not all equal.
        deviation: Standard deviation between repeats of one sample.
        num_samples: Samples with every repeat valid.
        num_repeats: Repeats a sample.
        answers: Share of single answers (questions or axes) that are the same in every repeat.
    """

    icc: float
    icc_mean: float
    changed: float
    deviation: float
    num_samples: int
    num_repeats: int
    answers: float = float("nan")


def test_retest(repeats: np.ndarray) -> Reliability:
    """Reliability from ``[samples, repeats]``; samples with a missing repeat are left out."""
    complete = repeats[~np.isnan(repeats).any(axis=1)]
    n, k = complete.shape
    if n < 2 or k < 2:
        nan = float("nan")
        return Reliability(nan, nan, nan, nan, n, k)
    between = k * complete.mean(1).var(ddof=1)
    within = complete.var(axis=1, ddof=1).mean()
    total = between + (k - 1) * within
    changed = float(np.mean(complete.min(1) != complete.max(1)))
    icc = float((between - within) / total) if total > 0 else float("nan")
    icc_mean = float((between - within) / between) if between > 0 else float("nan")
    return Reliability(icc, icc_mean, changed, float(np.sqrt(within)), n, k)


test_retest.__test__ = False


def item_agreement(repeats: Sequence[Sequence[Mapping[str, float]]]) -> float:
    """Share of answers that are the same in every repeat: single questions of a checklist, or axes of a rubric.

    Args:
        repeats: The answers of each sample in each repeat, by name; names missing in a repeat are left out.
    """
    same = []
    for sample in repeats:
        shared = set.intersection(*(set(answers) for answers in sample)) if len(sample) > 1 else set()
        same += [len({answers[name] for answers in sample}) == 1 for name in shared]
    return float(np.mean(same)) if same else float("nan")


@dataclass(frozen=True)
class Agreement:
    """Agreement of a judge with people on the same items.

    Attributes:
        exact: Share of equal scores.
        within_one: Share of scores at most one apart.
        weighted_kappa: Cohen's kappa with quadratic weights.
        spearman: Rank correlation.
        bias: Mean judge score minus mean human score.
        num_items: Items with both scores.
    """

    exact: float
    within_one: float
    weighted_kappa: float
    spearman: float
    bias: float
    num_items: int


def agreement(judge: np.ndarray, human: np.ndarray, levels: int = 5) -> Agreement:
    """Compare judge scores with human ones on a 1..levels scale; pairs with a NaN are left out."""
    valid = ~np.isnan(judge) & ~np.isnan(human)
    a, b = judge[valid], human[valid]
    if not a.size:
        nan = float("nan")
        return Agreement(nan, nan, nan, nan, nan, 0)
    rounded = [np.clip(np.rint(x), 1, levels).astype(int) - 1 for x in (a, b)]
    observed = np.zeros((levels, levels))
    np.add.at(observed, tuple(rounded), 1)
    expected = np.outer(observed.sum(1), observed.sum(0)) / len(a)
    grid = np.arange(levels)
    weights = (grid[:, None] - grid) ** 2
    disagreement = (weights * expected).sum()
    kappa = 1 - (weights * observed).sum() / disagreement if disagreement else float("nan")
    varied = len(a) > 2 and a.std() > 0 and b.std() > 0
    return Agreement(
        exact=float(np.mean(a == b)),
        within_one=float(np.mean(np.abs(a - b) <= 1)),
        weighted_kappa=float(kappa),
        spearman=float(stats.spearmanr(a, b).statistic) if varied else float("nan"),
        bias=float(a.mean() - b.mean()),
        num_items=len(a),
    )
