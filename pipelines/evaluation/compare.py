"""Two runs on the same samples: paired tests with Holm correction, and a gate that lets a checkpoint pass or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loomvideo.pipelines.evaluation.results import SavedSuite
from loomvideo.pipelines.evaluation.statistics import PairedTest, holm, paired_test
from loomvideo.pipelines.evaluation.table import metric as known_metric
from loomvideo.platform.errors import UserError

COMPARED_HEADERS = ("manifest", "judge", "prompt_set", "mode", "sampling", "inputs")


@dataclass(frozen=True)
class Comparison:
    """One metric of two runs on the samples both have.

    Attributes:
        suite: Benchmark.
        metric: Metric name.
        category: A category, or empty for the whole suite.
        test: Difference b - a with its interval and p-values.
        adjusted_p: Permutation p after Holm over all metrics of the suite, or over the metric's categories.
        verdict: ``better``, ``worse``, ``different`` (no direction is better) or ``no difference found``.
    """

    suite: str
    metric: str
    category: str
    test: PairedTest
    adjusted_p: float
    verdict: str


def differing_headers(a: Mapping[str, SavedSuite], b: Mapping[str, SavedSuite]) -> list[str]:
    """What was measured differently in the two runs, one line each; such differences make scores incomparable."""
    lines = []
    for name in sorted(a.keys() & b.keys()):
        for field in COMPARED_HEADERS:
            left, right = a[name].header.get(field), b[name].header.get(field)
            if left != right:
                lines.append(f"{name}: {field} differs ({left} against {right})")
    return lines


def compare_runs(
    a: Mapping[str, SavedSuite],
    b: Mapping[str, SavedSuite],
    metrics: Sequence[str] = (),
    alpha: float = 0.05,
    seed: int = 0,
    by_category: bool = True,
) -> list[Comparison]:
    """Compare run ``b`` with run ``a`` on every shared suite.

    Args:
        a: The baseline's suites.
        b: The candidate's suites.
        metrics: Metrics to test; all that both have when empty. Fewer metrics mean more power after Holm.
        alpha: Significance level of verdicts.
        seed: Of the resampling.
        by_category: Also test each category.

    Raises:
        UserError: if no suite or no sample is shared.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise UserError(f"the runs share no suite ({', '.join(a)} against {', '.join(b)})")
    found = []
    for suite in shared:
        values_a, values_b = a[suite].values(), b[suite].values()
        keys = [key for key in values_a if key in values_b]
        if not keys:
            raise UserError(f"suite {suite}: the runs share no sample")
        units, categories = a[suite].units(), a[suite].categories()
        names = sorted({n for k in keys for n in values_a[k].keys() & values_b[k].keys()} - {"copy_psnr_db"})
        names = [name for name in names if not metrics or name in metrics]
        overall = {}
        for metric in names:
            overall[metric] = _test(metric, keys, values_a, values_b, units, seed)
        adjusted = holm({metric: test.permutation_p for metric, test in overall.items()})
        for metric, test in overall.items():
            verdict = _verdict(metric, test.difference, adjusted[metric], alpha)
            found.append(Comparison(suite, metric, "", test, adjusted[metric], verdict))
            groups = sorted({categories[key] for key in keys})
            if len(groups) < 2 or not by_category:
                continue
            tests = {}
            for group in groups:
                members = [key for key in keys if categories[key] == group and metric in values_a[key]]
                tests[group] = _test(metric, members, values_a, values_b, units, seed)
            by_group = holm({group: test.permutation_p for group, test in tests.items()})
            for group, test in tests.items():
                if test.num_samples:
                    verdict = _verdict(metric, test.difference, by_group[group], alpha)
                    found.append(Comparison(suite, metric, group, test, by_group[group], verdict))
    return found


def _test(
    metric: str,
    keys: Sequence[str],
    a: Mapping[str, Mapping[str, float]],
    b: Mapping[str, Mapping[str, float]],
    units: Mapping[str, str],
    seed: int,
) -> PairedTest:
    nan = float("nan")
    left, right = (np.array([side[key].get(metric, nan) for key in keys], dtype=float) for side in (a, b))
    return paired_test(left, right, [units[key] for key in keys], seed)


def _verdict(metric: str, difference: float, p: float, alpha: float) -> str:
    if np.isnan(p) or p >= alpha:
        return "no difference found"
    better = known_metric(metric).higher_is_better
    if better is None:
        return "different"
    return "better" if (difference > 0) == better else "worse"


@dataclass(frozen=True)
class GateRule:
    """What a candidate must hold against the baseline.

    Attributes:
        suite: Benchmark.
        metric: Metric, in the direction that is better.
        min_delta: Least improvement of the suite's mean; negative tolerates a loss.
        max_regress: Largest loss of any category that is not noise; infinite for no limit.
        p: Significance level; a loss counts as real below it after Holm, and a required gain must be real.
    """

    suite: str
    metric: str
    min_delta: float = 0.0
    max_regress: float = float("inf")
    p: float = 0.05


def check_gate(rule: GateRule, a: Mapping[str, SavedSuite], b: Mapping[str, SavedSuite]) -> list[str]:
    """Why candidate ``b`` must not replace baseline ``a``; an empty list lets it pass.

    Raises:
        UserError: if the metric has no better direction or is missing from either run.
    """
    better = known_metric(rule.metric).higher_is_better
    if better is None:
        raise UserError(f"metric {rule.metric}: neither high nor low is better, so it cannot be a gate")
    compared = [c for c in compare_runs(a, b, [rule.metric]) if c.suite == rule.suite]
    overall = next((c for c in compared if not c.category), None)
    if overall is None or overall.test.num_samples == 0:
        raise UserError(f"metric {rule.suite}/{rule.metric}: not in both runs")
    reasons = list(differing_headers({rule.suite: a[rule.suite]}, {rule.suite: b[rule.suite]}))
    status = b[rule.suite].header.get("status")
    if status != "complete":
        reasons.append(f"{rule.suite}: the candidate's run is {status}, so its means may flatter it")
    sign = 1 if better else -1
    gain = sign * overall.test.difference
    if gain < rule.min_delta:
        reasons.append(f"{rule.suite}/{rule.metric}: gain {gain:.3f} is under {rule.min_delta:g}")
    elif rule.min_delta > 0 and overall.adjusted_p >= rule.p:
        reasons.append(f"{rule.suite}/{rule.metric}: gain {gain:.3f} may be chance (p = {overall.adjusted_p:.3f})")
    for c in compared:
        loss = -sign * c.test.difference
        if c.category and loss > rule.max_regress and c.adjusted_p < rule.p:
            reasons.append(f"{rule.suite}/{rule.metric}/{c.category}: lost {loss:.3f}, more than {rule.max_regress:g}")
    return reasons
