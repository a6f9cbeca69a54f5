"""Rows to figures: every mean with its interval, counts of valid and failed samples, failures counted both ways."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from loomvideo.pipelines.evaluation.distances import set_distances
from loomvideo.pipelines.evaluation.rows import IDENTITY, MODEL, ParsedFields, Row, item_of
from loomvideo.pipelines.evaluation.statistics import Reliability, bootstrap_mean, item_agreement, test_retest
from loomvideo.pipelines.evaluation.store import Store
from loomvideo.pipelines.evaluation.suites.parsers import Parsed
from loomvideo.pipelines.evaluation.suites.protocols import Judged
from loomvideo.pipelines.evaluation.suites.registry import SCORES, SHARES
from loomvideo.pipelines.evaluation.suites.registry import suite as find_suite
from loomvideo.pipelines.evaluation.table import METRICS

COVERAGE_FOR_COMPLETE = 0.98


@dataclass(frozen=True)
class Figure:
    """One mean.

    Attributes:
        suite: Benchmark.
        metric: Metric name; ``judge/<axis>`` for one axis.
        category: A category, or empty for the whole suite.
        value: The mean.
        low: Lower end of its 95 % interval.
        high: Upper end.
        num_valid: Samples it is over.
        num_failed: Samples that should have had a value.
        series: ``model`` or ``identity``.
    """

    suite: str
    metric: str
    category: str
    value: float
    low: float
    high: float
    num_valid: int
    num_failed: int
    series: str = MODEL

    @property
    def name(self) -> str:
        """``suite/metric[/category]``."""
        parts = [self.suite, self.metric] + ([self.category] if self.category else [])
        return "/".join(parts)


@dataclass(frozen=True)
class SuiteResult:
    """All figures of a suite.

    Attributes:
        suite: Benchmark.
        figures: Means of the model's results.
        identity: The same of the source copied.
        official: The benchmark's own figures, in the official and loomvideo modes or from its outside scorer.
        coverage: Share of samples with everything they should have.
        failures: Samples without a result or a judgement, by reason.
        defects: Results with a plain fault, by fault.
        reliability: The reliability of repeated judgements.
        cap_violations: Share of judged samples in which a later axis exceeds the first one.
        cost_usd: Paid for judgements in this run.
        calls: Judge calls made in this run; answers from the cache do not count.
        judge_models: Model versions that answered.
    """

    suite: str
    figures: tuple[Figure, ...]
    identity: tuple[Figure, ...]
    official: dict[str, float]
    coverage: float
    failures: dict[str, int]
    defects: dict[str, int]
    reliability: Reliability | None
    cap_violations: float
    cost_usd: float
    calls: int
    judge_models: tuple[str, ...] = field(default=())

    @property
    def status(self) -> str:
        """``complete``, or ``partial`` under 98 % coverage."""
        return "complete" if self.coverage >= COVERAGE_FOR_COMPLETE else "partial"


def sample_values(row: Row) -> dict[str, float]:
    """Every value of a row: its metrics, and its judgements averaged over repeats."""
    values = {name: float(value) for name, value in row.get("metrics", {}).items() if value is not None}
    judgements = [j["parsed"] for j in row.get("judgements", ())]
    valid = [parsed for parsed in judgements if parsed["sample"] is not None]
    scale = SHARES if row.get("judged") == SHARES else SCORES
    worst = cast(float, METRICS[f"{scale}_worst"].floor)
    if row.get("judged") and not judgements:
        values[f"{scale}_worst"] = worst
    if judgements:
        values[scale] = _mean([score for p in judgements if (score := p["sample"]) is not None])
        values[f"{scale}_worst"] = _mean([worst if p["sample"] is None else p["sample"] for p in judgements])
        minima = [p["minimum"] for p in valid if p["minimum"] is not None]
        if minima:
            values[f"{scale}_min"] = _mean(minima)
        for axis in dict.fromkeys(axis for p in valid for axis in p["scores"]):
            values[f"{scale}/{axis}"] = _mean([p["scores"][axis] for p in valid if axis in p["scores"]])
    return values


def aggregate_suite(
    name: str, rows: Sequence[Row], mode: str = "strict", judged: bool = True, store: Store | None = None
) -> SuiteResult:
    """Aggregate the rows of one suite.

    Args:
        name: Suite.
        rows: Finished rows of both series.
        mode: The judge's mode, for the official figures.
        judged: Whether a judge was asked, so that its absence is a failure.
        store: Where features of learned metrics are, for the distances between sets.
    """
    own = sorted((row for row in rows if row["series"] == MODEL), key=lambda row: row["key"])
    copies = sorted((row for row in rows if row["series"] == IDENTITY), key=lambda row: row["key"])
    judged = judged and find_suite(name).judged
    failures: Counter[str] = Counter()
    for row in own:
        if row["failure"]:
            failures[row["failure"]] += 1
        elif judged:
            reasons = [j["parsed"]["failure"] for j in row["judgements"] if j["parsed"]["sample"] is None]
            if reasons and len(reasons) == len(row["judgements"]):
                failures[f"judge: {reasons[0]}"] += 1
        if not row["failure"] and not row["metrics"]:
            failures["other size or length"] += 1
    judgements = [j for row in own for j in row.get("judgements", ())]
    official = {}
    if judged and judgements and mode != "strict" and mode in find_suite(name).protocols:
        official = find_suite(name).protocol(mode).aggregate([_judged(row) for row in own])
    scored = [j["parsed"]["scores"] for j in judgements if not j["parsed"].get("answers")]
    violations = [_violates_cap(scores) for scores in scored if len(scores) > 1]
    return SuiteResult(
        suite=name,
        figures=(*_figures(name, own, MODEL), *_set_figures(name, own, MODEL, store)),
        identity=(*_figures(name, copies, IDENTITY), *_set_figures(name, copies, IDENTITY, store)),
        official=official,
        coverage=1 - sum(failures.values()) / max(len(own), 1),
        failures=dict(failures),
        defects=dict(Counter(defect for row in own for defect in row.get("defects", ()))),
        reliability=_reliability(own),
        cap_violations=float(np.mean(violations)) if violations else float("nan"),
        cost_usd=sum(j["cost_usd"] for j in judgements),
        calls=sum(not j["cached"] for j in judgements),
        judge_models=tuple(sorted({j["model"] for j in judgements if j["model"]})),
    )


def _figures(suite: str, rows: Sequence[Row], series: str) -> Iterable[Figure]:
    values = [sample_values(row) for row in rows]
    categories = np.array([row["item"]["category"] for row in rows])
    units = np.array([item_of(row).unit for row in rows])
    failed = np.array([bool(row["failure"]) for row in rows])
    for metric in sorted({name for v in values for name in v}):
        scores = np.array([v.get(metric, np.nan) for v in values], dtype=float)
        # Failed rows count as failed for every metric that other samples of their category have.
        having = {c for c, v in zip(categories, values, strict=True) if metric in v}
        wanted = np.array([c in having for c in categories])
        expected = wanted & (failed | np.array([metric in v for v in values]))
        yield _figure(suite, metric, "", scores[expected], units[expected], None, series)
        if len(having) > 1:
            for category in sorted(having):
                chosen = expected & (categories == category)
                yield _figure(suite, metric, category, scores[chosen], units[chosen], None, series)
            if metric.startswith((SCORES, SHARES)) or metric.endswith("_db"):
                groups = categories[expected]
                yield _figure(suite, f"{metric}_macro", "", scores[expected], units[expected], groups, series)


def _set_figures(suite: str, rows: Sequence[Row], series: str, store: Store | None) -> Iterable[Figure]:
    having = [row for row in rows if row.get("features")]
    if store is None or not having:
        return
    for metric, (value, low, high) in set_distances(store, having, [item_of(row).unit for row in having]).items():
        yield Figure(suite, metric, "", value, low, high, len(having), sum(bool(r["failure"]) for r in rows), series)


def _figure(
    suite: str,
    metric: str,
    category: str,
    scores: np.ndarray,
    units: np.ndarray,
    categories: np.ndarray | None,
    series: str,
) -> Figure:
    e = bootstrap_mean(scores, units, categories)
    return Figure(suite, metric, category, e.value, e.low, e.high, e.num_samples, len(scores) - e.num_samples, series)


def _judged(row: Row) -> Judged:
    parsed = row["judgements"][0]["parsed"] if row["judgements"] else None
    if row["failure"] or parsed is None:
        return Judged(row["item"]["category"], Parsed(None, {}, failure=row["failure"] or "not judged"))
    return Judged(row["item"]["category"], Parsed(**parsed))


def _violates_cap(scores: dict[str, float]) -> bool:
    first, *later = scores.values()
    return any(score > first for score in later)


def _reliability(rows: Sequence[Row]) -> Reliability | None:
    repeats = [[j["parsed"]["sample"] for j in row.get("judgements", ())] for row in rows]
    width = max((len(r) for r in repeats), default=0)
    complete = [r for r in repeats if len(r) == width]
    if width < 2 or len(complete) < 2:
        return None
    answers = [[p["answers"] or p["scores"] for p in _parsed(row)] for row in rows if len(_parsed(row)) == width]
    found = test_retest(np.array(complete, dtype=float))
    return dataclasses.replace(found, answers=item_agreement(answers))


def _parsed(row: Row) -> list[ParsedFields]:
    return [{**j["parsed"], "answers": j["parsed"].get("answers", {})} for j in row.get("judgements", ())]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
