"""``loomvideo compare``, ``arena`` and ``agreement``."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
from mlflow.tracking import MlflowClient

from loomvideo.jobs.command import job_config
from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.jobs.evaluation.judge import answers_folder, judge_client, judge_session
from loomvideo.jobs.evaluation.setup import JOB, evaluation_run, store_folder, tracked
from loomvideo.pipelines.evaluation import mlflow_report
from loomvideo.pipelines.evaluation.arena import bradley_terry, position_bias
from loomvideo.pipelines.evaluation.assessments import HUMAN_SCORE, human_scores
from loomvideo.pipelines.evaluation.compare import compare_runs, differing_headers
from loomvideo.pipelines.evaluation.judges.pairwise import judge_pairs
from loomvideo.pipelines.evaluation.results import SavedSuite, clean, load_suites
from loomvideo.pipelines.evaluation.rows import MODEL
from loomvideo.pipelines.evaluation.statistics import Agreement
from loomvideo.pipelines.evaluation.statistics import agreement as judge_agreement
from loomvideo.pipelines.evaluation.store import Store
from loomvideo.pipelines.vlm.requests import FrameSampling
from loomvideo.platform.console import coloured, console, table
from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder

NOTHING_FOUND = ("no difference found", "too few samples to tell")


def run_compare(a: str, b: str, metrics: list[str], runs: Path, everything: bool, tracking_uri: str) -> None:
    """Print and log the comparison of two runs."""
    baseline, folder = evaluation_run(runs, a), evaluation_run(runs, b)
    left, right, a, b = load_suites(baseline.path), load_suites(folder.path), baseline.name, folder.name
    out = console()
    for line in differing_headers(left, right):
        out.print(f"not comparable: {line}", style="yellow", highlight=False)
    found = compare_runs(left, right, metrics)
    headers = ("metric", "difference", "95 % interval", "adjusted p", "n", "sources", "detectable", "")
    shown = table(*headers, title=f"{b} minus {a}", figures=True)
    for c in found:
        if not everything and (c.category or c.metric.startswith("judge/")) and c.verdict in NOTHING_FOUND:
            continue
        t = c.test
        name = "/".join(x for x in (c.suite, c.metric, c.category) if x)
        verdict = coloured(c.verdict, {"better": "green", "worse": "red"}.get(c.verdict, ""))
        cells = [f"{t.difference:+.3f}", f"{t.low:+.3f} … {t.high:+.3f}", f"{c.adjusted_p:.4f}"]
        shown.add_row(name, *cells, str(t.num_samples), str(t.num_clusters), f"{c.detectable:.3f}", verdict)
    out.print(shown)
    content = clean([dataclasses.asdict(c) for c in found])
    folder.write_text(f"compare-{a}.json", json.dumps(content, indent=1))
    client, run_id = tracked(folder, tracking_uri)
    client.log_artifact(run_id, str(folder.path / f"compare-{a}.json"), "compare")
    overall = [c for c in found if not c.category and not np.isnan(c.test.difference)]
    values = {f"compare/{a}/{c.suite}/{c.metric}": c.test.difference for c in overall}
    values |= {f"compare/{a}/{c.suite}/{c.metric}/p": c.adjusted_p for c in overall}
    mlflow_report.log_metrics(client, run_id, values)


def run_agreement(run: str, labels: Path | None, runs: Path, items: int, tracking_uri: str) -> None:
    """Log how far the judge agrees with people, who wrote into a sheet or into MLflow; a sheet is made first."""
    folder = evaluation_run(runs, run)
    suites = {name: saved for name, saved in load_suites(folder.path).items() if saved.header["judge"] != "none"}
    if not suites:
        raise UserError(f"{run}: no judged suite in this run; evaluate with judge.kind set")
    out = console()
    if labels is not None and not labels.exists():
        count = _write_sheet(suites, labels, items)
        out.print(f"{labels}: {count} samples to label; fill in score (1 to 5) and run again", highlight=False)
        return
    client, run_id = tracked(folder, tracking_uri)
    human = _read_labels(labels, suites) if labels is not None else _reviewed(client, folder, suites)
    headers = ("suite", "items", "equal", "within one", "weighted kappa", "rank correlation", "judge minus people")
    agreements = table(*headers, title="judge against people", figures=True)
    for name, scores in human.items():
        values = suites[name].values()
        judge = np.array([values[key].get("judge", np.nan) for key in scores])
        found: Agreement = judge_agreement(judge, np.array(list(scores.values())))
        cells = [found.exact, found.within_one, found.weighted_kappa, found.spearman, found.bias]
        agreements.add_row(name, str(found.num_items), *(f"{value:.2f}" for value in cells))
        logged = {f"{name}/human/{k}": v for k, v in dataclasses.asdict(found).items() if not np.isnan(v)}
        mlflow_report.log_metrics(client, run_id, logged)
    if labels is not None:
        client.log_artifact(run_id, str(labels), "human")
    out.print(agreements)


def run_arena(names: list[str], overrides: list[str], runs: Path) -> None:
    """Judge every pair of runs on their shared samples; print and log the ratings."""
    if len(set(names)) < 2:
        raise UserError("arena: name two or more different evaluation runs")
    config = job_config(EvaluateConfig, JOB, overrides)
    config.judge.check()
    if config.judge.kind == "none":
        raise UserError("arena: set a judge, such as --set judge.kind=openai")
    if config.judge.batch:
        raise UserError("arena: judge.batch=true is for evaluate; pairs are asked one by one")
    folders = {folder.name: folder for folder in (evaluation_run(runs, name) for name in names)}
    loaded = {name: load_suites(folder.path) for name, folder in folders.items()}
    shared = sorted(set.intersection(*(set(suites) for suites in loaded.values())))
    if not shared:
        raise UserError(f"arena: the runs {', '.join(names)} share no suite")
    j = config.judge
    session = judge_session(j, judge_client(j), answers_folder(config))
    sampling = FrameSampling(j.num_frames, j.max_side, as_video=j.as_video)
    out = console()
    for suite in shared:
        rows = {
            name: {row["key"]: row for row in suites[suite].rows if row["series"] == MODEL}
            for name, suites in loaded.items()
        }
        found = judge_pairs(rows, Store(store_folder(config)), session, sampling, j.threads)
        if not found.matches:
            reasons = ", ".join(sorted(set(found.failures))) or "no sample is in both"
            raise UserError(f"arena: no pair of suite {suite} could be judged ({reasons})")
        strengths = bradley_terry(found.matches)
        bias = position_bias(found.orders)
        title = f"{suite}: {len(found.matches)} pairs, {bias:.0%} change with the order"
        ratings = table("run", "rating", "95 % interval", "pairs", title=title, figures=True)
        for s in strengths:
            ratings.add_row(s.model, f"{s.rating:.0f}", f"{s.low:.0f} … {s.high:.0f}", str(s.num_matches))
        out.print(ratings)
        if found.failures:
            out.print(f"  {len(found.failures)} pairs failed: {', '.join(sorted(set(found.failures)))}")
        content = {"ratings": [dataclasses.asdict(s) for s in strengths], "order_changes": bias, "judge": j.kind}
        for s in strengths:
            folder = folders[s.model]
            path = folder.write_text(f"arena-{suite}.json", json.dumps(clean(content), indent=1))
            client, run_id = tracked(folder, config.tracking_uri)
            client.log_artifact(run_id, str(path), "arena")
            values = {f"{suite}/arena/rating": s.rating, f"{suite}/arena/rating/ci95_low": s.low}
            values |= {f"{suite}/arena/rating/ci95_high": s.high, f"{suite}/arena/order_changes": bias}
            mlflow_report.log_metrics(client, run_id, values)


def _write_sheet(suites: dict[str, SavedSuite], path: Path, items: int) -> int:
    rows = []
    share = max(1, items // len(suites))
    for name, saved in suites.items():
        values = saved.values()
        judged = sorted((v["judge"], key) for key, v in values.items() if not np.isnan(v.get("judge", np.nan)))
        # Spread over the judge's scores: agreement on one level only would say nothing.
        chosen = [judged[i * len(judged) // share][1] for i in range(min(share, len(judged)))]
        texts = {row["key"]: row["item"]["text"] for row in saved.rows}
        rows += [(name, key, "", texts[key], f"suites/{name}/media/{key}") for key in dict.fromkeys(chosen)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("suite", "key", "score", "text", "media"), *sorted(rows)])
    return len(rows)


def _reviewed(client: MlflowClient, folder: RunFolder, suites: dict[str, SavedSuite]) -> dict[str, dict[str, float]]:
    found = {}
    for name, saved in suites.items():
        note = RunFolder(folder.path, "suites", name).read_json("mlflow.json") or {}
        if "run_id" in note:
            experiment_id = client.get_run(note["run_id"]).info.experiment_id
            scores = human_scores(client, experiment_id, note["run_id"])
            found[name] = {key: score for key, score in scores.items() if key in saved.values()}
    if not any(found.values()):
        raise UserError(
            f"{folder.name}: nobody has added an assessment `{HUMAN_SCORE}` (1 to 5) to its traces in MLflow yet; "
            "or fill in a sheet: --labels FILE.csv"
        )
    return {name: scores for name, scores in found.items() if scores}


def _read_labels(path: Path, suites: dict[str, SavedSuite]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            if not (row.get("score") or "").strip():
                continue
            suite, key = row["suite"], row["key"]
            if suite not in suites or key not in suites[suite].values():
                raise UserError(f"{path}:{number}: {suite}/{key} is not a judged sample of this run")
            try:
                score = float(row["score"])
            except ValueError:
                score = float("nan")
            if not 1 <= score <= 5:
                raise UserError(f"{path}:{number}: score {row['score']!r} is not between 1 and 5")
            found.setdefault(suite, {})[key] = score
    if not found:
        raise UserError(f"{path}: no scores filled in yet")
    return found
