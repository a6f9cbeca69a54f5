"""Two runs on the same samples: paired tests with Holm correction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loomvideo.pipelines.evaluation.results import SavedSuite
from loomvideo.pipelines.evaluation.statistics import PairedTest, enough_clusters, holm, paired_test
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
        test: Difference b - a with its interval.
        adjusted_p: Permutation p after Holm over all metrics of the suite, or over the metric's categories.
        detectable: Smallest true difference found with 80 % power at the level that the correction leaves.
        verdict: ``better``, ``worse``, ``different`` (no direction is better), ``no difference found``, or ``too few
            samples to tell`` when no outcome of so few sources could have been significant.
    """

    suite: str
    metric: str
    category: str
    test: PairedTest
    adjusted_p: float
    detectable: float
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
        seed: The seed of the resampling.
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
            found.append(_comparison(suite, metric, "", test, adjusted, alpha))
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
                    found.append(_comparison(suite, metric, group, test, by_group, alpha))
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


def _comparison(
    suite: str, metric: str, category: str, test: PairedTest, adjusted: Mapping[str, float], alpha: float
) -> Comparison:
    p = adjusted[category or metric]
    level = alpha / max(1, sum(not np.isnan(value) for value in adjusted.values()))
    better = known_metric(metric).higher_is_better
    if not enough_clusters(test.num_clusters, level):
        verdict = "too few samples to tell"
    elif np.isnan(p) or p >= alpha:
        verdict = "no difference found"
    elif better is None:
        verdict = "different"
    else:
        verdict = "better" if (test.difference > 0) == better else "worse"
    return Comparison(suite, metric, category, test, p, test.detectable(level), verdict)
