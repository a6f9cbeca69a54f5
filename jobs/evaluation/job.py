"""``loomvideo evaluate``: a checkpoint through suites, to figures in MLflow."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModelInput
from mlflow.tracking import MlflowClient

from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.jobs.evaluation.judge import (
    SPENDING_FILE,
    BuildJudge,
    answers_folder,
    judge_builder,
    judge_client,
    preflight,
)
from loomvideo.jobs.evaluation.setup import (
    JOB,
    EvaluatedModel,
    evaluation_run,
    find_checkpoint,
    load_manifest,
    model_grid,
    store_folder,
)
from loomvideo.model.fingerprints import weights_fingerprint
from loomvideo.pipelines.evaluation import mlflow_report, review
from loomvideo.pipelines.evaluation.aggregate import SuiteResult, aggregate_suite
from loomvideo.pipelines.evaluation.assessments import log_judgements
from loomvideo.pipelines.evaluation.charts import save_bars, save_radar
from loomvideo.pipelines.evaluation.controls import CONTROLS, merge_controls
from loomvideo.pipelines.evaluation.generators import sample_seed
from loomvideo.pipelines.evaluation.graph import Resources, run_graph
from loomvideo.pipelines.evaluation.inputs import InputOptions
from loomvideo.pipelines.evaluation.judge_stage import judge_in_batches
from loomvideo.pipelines.evaluation.judges.rubrics import (
    CHECKLISTS_FILE,
    OWN_FILE,
    official_rubrics,
    own_checklists,
    own_rubrics,
)
from loomvideo.pipelines.evaluation.learned import LearnedMetric, learned_metrics
from loomvideo.pipelines.evaluation.results import load_suites, save_suite, suite_folder
from loomvideo.pipelines.evaluation.review import OtherRun
from loomvideo.pipelines.evaluation.rows import IDENTITY, MODEL, Row
from loomvideo.pipelines.evaluation.stages import (
    GenerateStage,
    MeasureStage,
    NormaliseStage,
    PrepareStage,
    check_rows,
    initial_rows,
)
from loomvideo.pipelines.evaluation.store import Store, content_key
from loomvideo.pipelines.evaluation.suites.external import export_results, import_scores
from loomvideo.pipelines.evaluation.suites.items import SuiteManifest
from loomvideo.pipelines.evaluation.suites.registry import CHECKLIST, Suite
from loomvideo.pipelines.evaluation.suites.registry import suite as find_suite
from loomvideo.pipelines.evaluation.suites.runners import run_scorer
from loomvideo.pipelines.evaluation.table import headline_metrics, ranking_metrics
from loomvideo.platform.config import flatten, to_yaml
from loomvideo.platform.console import bars, console, table
from loomvideo.platform.machine import usable_cpus
from loomvideo.platform.ray_session import ray_session
from loomvideo.platform.registry import MODEL_ID, log_dataset, logged_model, trained_model
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.tracking import Tracker


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, log and print; returns what goes to ``result.json``.

    Raises:
        UserError: for missing data, checkpoints or keys, before anything is generated.
    """
    config.check()
    checkpoint = find_checkpoint(config)
    suites = [find_suite(name) for name in config.suites]
    manifests = [load_manifest(config, suite) for suite in suites]
    learned = learned_metrics(config.learned, config.learned_weights, config.inputs.num_frames)
    judge = judge_builder(config, suites, manifests)
    other = (
        load_suites(evaluation_run(config.runs, config.compare_with, "compare_with").path)
        if config.compare_with
        else None
    )
    folder = RunFolder.open(config.runs, JOB, config.run or None)
    folder.write_text("config.yaml", to_yaml(config))
    tracker = Tracker(folder, config.tracking_uri or None, tags=_tags(config, checkpoint, manifests))
    status = "FAILED"
    try:
        tracker.log_params(flatten(config))
        spending = folder.path / SPENDING_FILE
        if judge is not None:
            preflight(config.judge, answers_folder(config), spending, config.judge.mode)
        client = MlflowClient(tracking_uri=tracker.uri)
        tags = {"loomvideo.fingerprint": checkpoint.fingerprint, "loomvideo.weights": checkpoint.weights}
        # MLflow's names take none of / : . % and quotes.
        name = re.sub(r"[^0-9A-Za-z_-]+", "-", checkpoint.name)
        params = {"checkpoint": checkpoint.name, "model": checkpoint.model, **flatten(config.generation)}
        # Figures belong to the model of the training experiment, where the training was logged to this server.
        model_id = checkpoint.training_run and trained_model(
            client, checkpoint.training_run, weights_fingerprint(checkpoint.weights)
        )
        model_id = model_id or logged_model(client, tracker.experiment_id, tracker.run_id, name, params, tags)
        client.log_inputs(tracker.run_id, models=[LoggedModelInput(model_id)])
        tracker.set_tags({MODEL_ID: model_id})
        rows = _generate_and_measure(config, checkpoint, manifests, learned, judge, spending)
        result: dict[str, Any] = {"checkpoint": checkpoint.name, "fingerprint": checkpoint.fingerprint}
        results = []
        for suite, manifest in zip(suites, manifests, strict=True):
            own = [row for row in rows if row["suite"] == manifest.suite]
            found = _finish_suite(config, suite, manifest, own, folder, tracker, model_id, checkpoint, other)
            result |= _headline(found)
            results.append(found)
        tracker.set_tags({mlflow_report.NOTE: mlflow_report.headline_note(results, checkpoint.name)[:8000]})
        complete = all(result[f"{m.suite}/status"] == "complete" for m in manifests)
        result["status"] = "complete" if complete else "partial"
        tracker.set_tags({"status": result["status"]})
        status = "FINISHED"
        folder.finish(result)
        tracker.log_artifact(folder.path / "result.json")
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def _generate_and_measure(
    config: EvaluateConfig,
    checkpoint: EvaluatedModel,
    manifests: list[SuiteManifest],
    learned: list[LearnedMetric],
    judge: BuildJudge | None,
    spending: Path,
) -> list[Row]:
    store = Store(store_folder(config))
    i = config.inputs
    grid = model_grid(checkpoint.model or config.generation.model)
    options = InputOptions(
        tuple(i.bucket_classes), tuple(i.reference_classes), grid, i.num_frames, i.fps, (i.text_width, i.text_height)
    )
    identity = (IDENTITY,) if config.identity and config.generator != "identity" else ()
    series = (MODEL, *identity, *(CONTROLS if config.controls else ()))
    rows = []
    for manifest in manifests:
        rows += initial_rows(manifest, series, lambda suite, key: sample_seed(config.seed, suite, key))
    g = config.generation
    j = config.judge
    local = (j.actors, j.gpus, j.cpus) if j.kind == "transformers" else (1, 0.0, 0.0)
    measurers = (config.learned_actors if learned else 0, config.learned_gpus, config.learned_cpus)
    resources = Resources(g.actors, g.gpus, g.cpus, *measurers, j.threads, *local)
    # The generator actor holds its CPUs for the whole run; a local cluster needs one more for the other stages.
    cpus = max(usable_cpus(), int(resources.held_cpus()) + 1)
    finished = []
    with ray_session(num_cpus=cpus), bars() as progress:
        bar = progress.add_task("samples", total=len(rows))
        for row in run_graph(
            rows,
            PrepareStage(store, options),
            lambda: GenerateStage(store, checkpoint.build, checkpoint.fingerprint),
            NormaliseStage(store),
            MeasureStage(store, learned),
            None if judge is None or j.batch else lambda: judge(spending),
            resources,
        ):
            finished.append(row)
            progress.advance(bar)
    check_rows(finished)
    if judge is not None and j.batch:
        finished = judge_in_batches(judge(spending), finished)
    return merge_controls(finished)


def _finish_suite(
    config: EvaluateConfig,
    suite: Suite,
    manifest: SuiteManifest,
    rows: list[Row],
    folder: RunFolder,
    parent: Tracker,
    model_id: str,
    checkpoint: EvaluatedModel,
    other: dict[str, Any] | None,
) -> SuiteResult:
    judged = config.judge.kind != "none" and suite.judged
    store = Store(store_folder(config))
    result = aggregate_suite(suite.name, rows, config.judge.mode, judged, store)
    if suite.scorer:
        result = dataclasses.replace(result, official=_outside_scores(config, suite, manifest, rows, folder, store))
    header = _header(config, manifest, suite, judged)
    place = save_suite(folder.path, result, rows, header)
    review.publish_media(store, rows, place)
    _draw_charts(result, place)
    child_folder = RunFolder(folder.path, "suites", suite.name)
    tags = {"suite": suite.name, "status": result.status, **header}
    child = Tracker(child_folder, parent.uri, tags, parent.run_id, experiment=f"loomvideo/{JOB}")
    status = "FAILED"
    try:
        other_run = None
        if other and suite.name in other:
            compared = evaluation_run(config.runs, config.compare_with, "compare_with")
            note = RunFolder(compared.path, "suites", suite.name).read_json("mlflow.json") or {}
            other_run = OtherRun(compared.name, note.get("run_id", ""), other[suite.name])
        subtitle = f"{checkpoint.name} · judge {header['judge']} · rubrics {header['prompt_set']} · seed {config.seed}"
        review.write_review_page(place, store, result, rows, folder.name, child.run_id, subtitle, other_run)
        source = {"name": suite.name, "digest": manifest.digest, "source": str(manifest.root)}
        mlflow_report.log_suite(child, place, store, result, rows, source, model_id, config.step, config.max_films)
        if judged:
            shown = mlflow_report.films_to_upload(rows, config.max_films)
            client = MlflowClient(tracking_uri=parent.uri)
            log_judgements(client, child.experiment_id, child.run_id, store, shown, header["judge"])
        status = "FINISHED"
    finally:
        child.finish(status)
    client = MlflowClient(tracking_uri=parent.uri)
    client.set_tag(child.run_id, "mlflow.runName", f"{folder.name} · {suite.name}")
    mlflow_report.log_tables(client, parent.run_id, suite.name, store, rows, config.step)
    values = mlflow_report.headline(result.figures)
    values |= {f"{suite.name}/official/{k}": v for k, v in result.official.items() if v == v}
    mlflow_report.log_metrics(client, parent.run_id, values, config.step, model_id, source)
    # The list of runs shows the datasets of each.
    log_dataset(client, parent.run_id, suite.name, manifest.digest, str(manifest.root), "evaluation")
    _print_suite(result)
    return result


def _outside_scores(
    config: EvaluateConfig, suite: Suite, manifest: SuiteManifest, rows: list[Row], folder: RunFolder, store: Store
) -> dict[str, float]:
    """Write the results for the suite's scorer, run it where its command is given, and read its verdicts."""
    place = suite_folder(folder.path, suite.name)
    results = place / "for-scorer"
    num_files = export_results(suite.scorer, rows, store, results)
    file = config.external.get(suite.name, "")
    if suite.name in config.scorers and num_files:
        dimensions = list(dict.fromkeys(d for i in manifest.items for d in i.extra.get("dimensions", ())))
        command = config.scorers[suite.name]
        file = run_scorer(
            suite.scorer, command, results, place / "scored", manifest.root, dimensions, config.scorer_gpus
        )
    return import_scores(suite.scorer, Path(file), num_files) if file else {}


def _draw_charts(result: SuiteResult, place: Path) -> None:
    spec = review.radar_spec(result)
    if spec:
        save_radar(spec, place / "charts" / "radar.png")
    identity = {f.metric: [g for g in result.identity if g.metric == f.metric] for f in result.figures}
    for metric in [m.name for m in ranking_metrics()]:
        chosen = [f for f in result.figures if f.metric == metric]
        if chosen:
            save_bars(chosen, identity[metric], f"{result.suite}: {metric}", place / "charts" / f"{metric}.png")


def _header(config: EvaluateConfig, manifest: SuiteManifest, suite: Suite, judged: bool) -> dict[str, str]:
    j = config.judge
    prompt_set = "none"
    sampling = f"{j.num_frames} frames, {j.max_side} px, {'film' if j.as_video else 'pictures'}"
    if judged:
        protocol = suite.protocol_or_strict(j.mode)
        if protocol.rubric_names is not None:
            prompt_set = official_rubrics(Path(j.official_rubrics[suite.name])).digest
            sampling = "whole files"
        elif protocol is CHECKLIST:
            prompt_set = own_checklists(Path(j.checklists) if j.checklists else CHECKLISTS_FILE).digest
        else:
            prompt_set = own_rubrics(Path(j.rubrics) if j.rubrics else OWN_FILE).digest
    identity = json.dumps(judge_client(j).identity(), sort_keys=True) if judged else "none"
    return {
        "manifest": manifest.digest,
        "judge": f"{j.kind} {j.model}".strip() if judged else "none",
        "judge_identity": identity,
        "prompt_set": prompt_set,
        "mode": j.mode if judged else "none",
        "sampling": sampling if judged else "none",
        "inputs": content_key(dataclasses.asdict(config.inputs))[:12],
    }


def _tags(config: EvaluateConfig, checkpoint: EvaluatedModel, manifests: list[SuiteManifest]) -> dict[str, str]:
    settings = [checkpoint.fingerprint, config.seed, [m.digest for m in manifests], dataclasses.asdict(config.judge)]
    tags = {
        "checkpoint": checkpoint.name,
        "loomvideo.fingerprint": checkpoint.fingerprint,
        "loomvideo.weights": checkpoint.weights,
        "eval_key": content_key(settings, dataclasses.asdict(config.inputs))[:16],
        "judge": f"{config.judge.kind} {config.judge.model}".strip(),
        "status": "running",
    }
    if checkpoint.training_run:
        tags["training_run"] = checkpoint.training_run
    return tags | {f"manifest.{m.suite}": m.digest for m in manifests}


def _headline(result: SuiteResult) -> dict[str, Any]:
    values: dict[str, Any] = {f"{result.suite}/status": result.status, f"{result.suite}/coverage": result.coverage}
    for f in result.figures:
        if not f.category and f.metric in [m.name for m in headline_metrics()]:
            values |= {f.name: f.value, f"{f.name}/ci95": [f.low, f.high]}
    values |= {f"{result.suite}/official/{name}": value for name, value in result.official.items()}
    if result.cost_usd:
        values[f"{result.suite}/cost_usd"] = result.cost_usd
    return values


def _print_suite(result: SuiteResult) -> None:
    identity = {f.metric: f.value for f in result.identity if not f.category}
    title = f"{result.suite}: {result.status}, coverage {result.coverage:.0%}"
    shown = table("metric", "value", "95 % interval", "source copied", "valid", "failed", title=title, figures=True)
    by_metric = {f.metric: f for f in result.figures if not f.category}
    for metric in [m.name for m in headline_metrics() if m.name in by_metric]:
        f = by_metric[metric]
        interval = f"{f.low:.3f} … {f.high:.3f}" if f.low == f.low else "–"
        copied = f"{identity[metric]:.3f}" if metric in identity else "–"
        shown.add_row(metric, f"{f.value:.3f}", interval, copied, str(f.num_valid), str(f.num_failed))
    out = console()
    out.print(shown)
    for reason, count in {**result.failures, **result.defects}.items():
        out.print(f"  {count} × {reason}", highlight=False)
