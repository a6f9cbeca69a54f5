"""Evaluations in MLflow: a parent run a checkpoint, a child a suite, figures, tables with pictures, review pages.

Only the driver logs. Per-sample values are table rows, never metrics.
"""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from PIL import Image

from loomvideo.pipelines.evaluation.aggregate import Figure, SuiteResult, sample_values
from loomvideo.pipelines.evaluation.published import published_scores
from loomvideo.pipelines.evaluation.rows import MODEL, Row
from loomvideo.pipelines.evaluation.stages import STRIP
from loomvideo.pipelines.evaluation.store import Store, content_key
from loomvideo.pipelines.evaluation.table import headline_metrics, ranking_metrics
from loomvideo.platform.registry import log_dataset
from loomvideo.platform.tracking import Tracker, metric_name

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as a run's description."""

TABLE_ROWS = 60
"""Rows a table with pictures holds; larger ones freeze the browser, so suites are split by category."""

_FILE_UNSAFE = re.compile(r"[^\w.-]")


def metric_values(result: SuiteResult) -> dict[str, float]:
    """Every figure of a suite under its stable name, with interval and counts for whole-suite figures."""
    values: dict[str, float] = {}
    for f in result.figures:
        _put(values, f.name, f.value)
        if not f.category:
            for suffix, value in (("ci95_low", f.low), ("ci95_high", f.high)):
                _put(values, f"{f.name}/{suffix}", value)
            values[f"{f.name}/n_valid"] = f.num_valid
            values[f"{f.name}/n_failed"] = f.num_failed
    for f in result.identity:
        if not f.category:
            _put(values, f"{result.suite}/identity/{f.metric}", f.value)
    for name, value in result.official.items():
        _put(values, f"{result.suite}/official/{metric_name(name)}", value)
    values[f"{result.suite}/coverage"] = result.coverage
    for reason, count in result.failures.items():
        values[f"{result.suite}/failures/{metric_name(reason)}"] = count
    for fault, count in result.defects.items():
        values[f"{result.suite}/defects/{metric_name(fault)}"] = count
    if result.reliability is not None:
        for name in ("icc", "icc_mean", "changed", "answers", "deviation"):
            _put(values, f"{result.suite}/retest/{name}", getattr(result.reliability, name))
    _put(values, f"{result.suite}/cap_violations", result.cap_violations)
    values["cost/usd"] = result.cost_usd
    values["cost/judge_calls"] = result.calls
    return values


def log_suite(
    tracker: Tracker,
    folder: Path,
    store: Store,
    result: SuiteResult,
    rows: Sequence[Row],
    manifest: Mapping[str, str],
    model_id: str | None,
    step: int,
    max_films: int,
) -> None:
    """Log one suite into its child run.

    Args:
        tracker: The child run.
        folder: The suite's folder with review page, charts and ``media/``.
        store: Where filmstrips are.
        result: The suite's figures.
        rows: Finished rows.
        manifest: Name, digest and source of the benchmark's manifest.
        model_id: The LoggedModel the metrics belong to.
        step: Training step of a probe, else 0.
        max_films: Samples whose films are uploaded.
    """
    client = MlflowClient(tracking_uri=tracker.uri)
    log_metrics(client, tracker.run_id, metric_values(result), step, model_id, manifest)
    log_dataset(client, tracker.run_id, manifest["name"], manifest["digest"], manifest["source"], "evaluation",
                manifest.get("profile", ""))  # fmt: skip
    for name in ("review.html", "figures.json", "rows.jsonl", "published.json"):
        if (folder / name).is_file():
            client.log_artifact(tracker.run_id, str(folder / name))
    if (folder / "charts").is_dir():
        client.log_artifacts(tracker.run_id, str(folder / "charts"), "charts")
    for row in films_to_upload(rows, max_films):
        client.log_artifacts(tracker.run_id, str(folder / "media" / row["key"]), f"media/{row['key']}")
    published = published_scores(result.suite)
    if published:
        columns = ("model", "metric", "value", "source", "caveat")
        table = {name: [p.as_dict()[name] for p in published] for name in columns}
        _log_table_once(client, tracker.run_id, table, "published", [str(p) for p in published])
    if step:
        log_probe_pictures(client, tracker.run_id, store, rows, step)


def log_metrics(
    client: MlflowClient,
    run_id: str,
    values: Mapping[str, float],
    step: int = 0,
    model_id: str | None = None,
    dataset: Mapping[str, str] | None = None,
) -> None:
    """Log values in batches, tied to a LoggedModel and a dataset where given."""
    now_ms = int(time.time() * 1000)
    names = {"dataset_name": dataset["name"], "dataset_digest": dataset["digest"]} if dataset else {}
    batch = [Metric(k, float(v), now_ms, step, model_id=model_id, run_id=run_id, **names) for k, v in values.items()]
    for start in range(0, len(batch), 500):
        client.log_batch(run_id, metrics=batch[start : start + 500])


def log_probe_pictures(client: MlflowClient, run_id: str, store: Store, rows: Sequence[Row], step: int) -> None:
    """Log filmstrips under ``sample/<key>`` with the training step, for MLflow's step slider."""
    for row in rows:
        if row["series"] == MODEL and not row["failure"]:
            picture = Image.open(store.entry("media", row["media"]) / STRIP)
            client.log_image(run_id, np.asarray(picture.convert("RGB")), key=f"sample/{row['key']}", step=step)


def films_to_upload(rows: Sequence[Row], limit: int) -> list[Row]:
    """The samples whose films go to MLflow: of every category in turn the worst, then the best, then the rest."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["series"] == MODEL and not row["failure"]:
            groups.setdefault(row["item"]["category"], []).append(row)
    turns = []
    for members in groups.values():
        ranked = sorted(members, key=_worth)
        alternating = [ranked[i // 2] if i % 2 == 0 else ranked[-1 - i // 2] for i in range(len(ranked))]
        turns += list(enumerate(alternating))
    return [row for _, row in sorted(turns, key=lambda turn: turn[0])][: limit or None]


def log_tables(client: MlflowClient, run_id: str, suite: str, store: Store, rows: Sequence[Row], step: int) -> None:
    """Log tables with filmstrip cells into the parent run, where the artifact view lines checkpoints up."""
    own = sorted((r for r in rows if r["series"] == MODEL and not r["failure"]), key=lambda r: r["key"])
    groups = {f"samples-{suite}": own}
    if len(own) > TABLE_ROWS:
        groups = {}
        for row in own:
            name = _FILE_UNSAFE.sub("_", f"samples-{suite}-{row['item']['category']}".replace("/", "-"))[:120]
            groups.setdefault(name, []).append(row)
    for name, members in groups.items():
        members = members[:TABLE_ROWS]
        if not members:
            continue
        values = [sample_values(row) for row in members]
        strips = [Image.open(store.entry("media", row["media"]) / STRIP).convert("RGB") for row in members]
        columns: dict[str, list[Any]] = {
            "sample_id": [row["key"] for row in members],
            # The second column is what MLflow's artifact view compares unless told otherwise.
            "edited": [mlflow.Image(strip) for strip in strips],
            "category": [row["item"]["category"] for row in members],
            "text": [row["item"]["text"] for row in members],
        }
        for metric in headline_metrics():
            scores = [v.get(metric.name, float("nan")) for v in values]
            if not np.isnan(scores).all() and metric.floor is None:
                columns[metric.name] = [None if np.isnan(score) else round(score, 3) for score in scores]
        name = f"{name}-step{step}" if step else name
        _log_table_once(client, run_id, columns, name, [row["media"] for row in members] + values)


def _log_table_once(client: MlflowClient, run_id: str, columns: Mapping[str, Any], name: str, content: Any) -> None:
    """Log a table; MLflow appends to one that exists, so a rerun logs nothing new and changed content a new name."""
    digest = content_key(content)[:8]
    tags = client.get_run(run_id).data.tags
    known = tags.get(f"table.{name}")
    if known is None:
        client.log_table(run_id, dict(columns), f"{name}.json")
        client.set_tag(run_id, f"table.{name}", digest)
    elif known != digest:
        _log_table_once(client, run_id, columns, f"{name}-{digest}", content)


def headline(figures: Sequence[Figure]) -> dict[str, float]:
    """The figures shown in the parent run: whole-suite means with their intervals."""
    values: dict[str, float] = {}
    for f in figures:
        if not f.category:
            _put(values, f.name, f.value)
            _put(values, f"{f.name}/ci95_low", f.low)
            _put(values, f"{f.name}/ci95_high", f.high)
    return values


def headline_note(results: Sequence[SuiteResult], checkpoint: str) -> str:
    """What a reviewer reads first, as Markdown for the run's description: status, figures and intervals a suite."""
    lines = [f"### {checkpoint}"]
    for result in results:
        by_metric = {f.metric: f for f in result.figures if not f.category}
        copied = {f.metric: f.value for f in result.identity if not f.category}
        lines += ["", f"**{result.suite}**: {result.status}, coverage {result.coverage:.0%}"]
        lines += [f"- {count} × {reason}" for reason, count in {**result.failures, **result.defects}.items()]
        lines += ["", "| metric | value | 95 % interval | source copied |", "|---|--:|--:|--:|"]
        for known in headline_metrics():
            if (f := by_metric.get(known.name)) is not None:
                interval = f"{f.low:.3f} … {f.high:.3f}" if f.low == f.low else "–"
                source = f"{copied[f.metric]:.3f}" if f.metric in copied else "–"
                unit = f" ({known.unit})" if known.unit else ""
                # MLflow sets columns without a gap.
                cells = (f"{known.name}{unit}", f"{f.value:.3f}", interval, source)
                lines.append("| " + " | ".join(f"{cell}&nbsp;&nbsp;" for cell in cells) + " |")
        if result.official:
            lines += ["", "By the benchmark's own rules: " + official_text(result.official)]
    return "\n".join(lines)


def official_text(official: Mapping[str, float]) -> str:
    """A benchmark's own figures in one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in official.items())


def prepend_note(client: MlflowClient, run_id: str, text: str) -> None:
    """Put a paragraph on top of a run's description; one that begins alike is replaced."""
    before = client.get_run(run_id).data.tags.get(NOTE, "")
    start = text.split(":", 1)[0]
    kept = [part for part in before.split("\n\n") if part and not part.startswith(start)]
    client.set_tag(run_id, NOTE, "\n\n".join([text, *kept])[:8000])


def _worth(row: Row) -> float:
    values = sample_values(row)
    for metric in ranking_metrics():
        value = values.get(metric.name, np.nan)
        if not np.isnan(value):
            return value if metric.higher_is_better else -value
    return 0.0


def _put(values: dict[str, float], name: str, value: float) -> None:
    if not np.isnan(value):
        values[metric_name(name)] = value
