"""Evaluate, compare, gate and agreement as a person runs them, on made-up clips, reporting to a real MLflow store."""

import csv
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from fixtures.batch_server import BatchServer
from fixtures.browser import browser_page, requires_browser
from fixtures.evaluation import without_ray
from fixtures.mixed_folder import everything, reasons_of_files
from mlflow.entities import AssessmentSource
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from loomvideo.jobs.evaluation import compare as compare_job
from loomvideo.jobs.evaluation import gate as gate_job
from loomvideo.jobs.evaluation import job as evaluate_job
from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.jobs.evaluation.judge import judge_builder
from loomvideo.jobs.evaluation.setup import find_checkpoint, load_manifest
from loomvideo.pipelines.evaluation.judges.fake import FakeJudgeServer
from loomvideo.pipelines.evaluation.suites.registry import suite
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.sources.samples import Sample, write_jsonl
from loomvideo.platform.config import load_config
from loomvideo.platform.errors import UserError
from loomvideo.platform.registry import default_uri

NUM_SOURCES = 8


def clip(colour, shift):
    y, x = np.mgrid[0:64, 0:64]
    video = np.stack([np.stack([x * 2, (y * 2 + shift) % 256, (x + y + 4 * i) % 256], -1) for i in range(5)])
    video = video.astype(np.uint8)
    video[:, 16:48, 16:48] = colour
    return video


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for n in range(NUM_SOURCES):
        write_video(folder / f"s{n}.mp4", clip((200, 20 * n, 40), 9 * n), 24)
        kind, colour = ("recolour", (20, 200, 30 + 9 * n)) if n % 2 else ("background", (30, 20 * n, 220))
        write_video(folder / f"t{n}.mp4", clip(colour, 9 * n), 24)
        samples.append(
            Sample(f"edit-{n}", "video_edit", "fashion-world", f"t{n}.mp4", f"s{n}.mp4", instruction=f"edit {n}",
                   group=f"g{n}", split="heldout", extra={"edit": {"kind": kind}})
        )  # fmt: skip
    write_jsonl(samples, folder / "samples.jsonl")
    return folder


@pytest.fixture
def local(monkeypatch):
    """The same stages without a Ray cluster, which has a test of its own."""
    without_ray(monkeypatch)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config(data, runs, name, *overrides):
    base = [f"run={name}", f"runs={runs}", "suites=[fashion]", f"data.fashion={data}", "generator=blend"]
    sizes = ["inputs.bucket_classes=[64]", "inputs.reference_classes=[64]", "inputs.num_frames=5"]
    return load_config(EvaluateConfig, base + sizes + ["judge.num_frames=2", *overrides])


def _refuse(*arguments):
    raise MlflowException("no aliases today")


def test_two_checkpoints_from_figures_to_a_moved_alias(tmp_path, data, local, capsys, monkeypatch):
    runs = tmp_path / "runs"
    fake = ["judge.kind=fake", "judge.repeats=2"]
    weak, strong = ["generation.blend_skill=0.5"], ["generation.blend_skill=0.9"]
    first = evaluate_job.run(config(data, runs, "weak", *weak, *fake))
    evaluate_job.run(config(data, runs, "weak-again", *weak, *fake, "seed=1"))
    second = evaluate_job.run(config(data, runs, "strong", *strong, *fake, "compare_with=weak"))
    assert second["fashion/gain_psnr_db"] > first["fashion/gain_psnr_db"] + 5
    assert second["status"] == "complete"

    client = MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("loomvideo/evaluate")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], max_results=20)}
    parent = found["strong"]
    nested = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    (child,) = client.search_runs([experiment.experiment_id], nested)
    assert child.info.run_name == "strong · fashion"
    names = child.data.metrics.keys()
    for name in ("judge", "judge/ci95_low", "judge/n_failed", "gain_psnr_db/garment_text", "identity/gain_psnr_db"):
        assert f"fashion/{name}" in names
    assert "fashion/retest/icc" in names or "fashion/retest/deviation" in names
    assert parent.data.metrics["fashion/gain_psnr_db"] == pytest.approx(second["fashion/gain_psnr_db"])
    for run in (child, parent):
        assert [found.dataset.name for found in run.inputs.dataset_inputs] == ["fashion"]
    artifacts = {a.path for a in client.list_artifacts(child.info.run_id)}
    assert {"review.html", "rows.jsonl", "media", "charts"} <= artifacts
    assert "samples-fashion.json" in {a.path for a in client.list_artifacts(parent.info.run_id)}
    models = client.search_logged_models([experiment.experiment_id])
    assert len({m.tags["loomvideo.fingerprint"] for m in models}) == 2
    assert str(models[0].status) in ("READY", "LoggedModelStatus.READY")

    page = (runs / "evaluate/strong/suites/fashion/review.html").read_text()
    content = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert content["other"]["label"] == "weak"
    assert {"source", "target", "weak", "result"} == {m["label"] for m in content["rows"][0]["media"]}
    assert content["rows"][0]["media"][-1]["label"] == "result"
    for row in content["rows"]:
        for medium in row["media"]:
            if medium["label"] != "weak":
                assert (runs / "evaluate/strong/suites/fashion" / medium["path"]).is_file()

    capsys.readouterr()
    compare_job.run_compare("weak", "strong", ["gain_psnr_db", "judge"], runs, True, "")
    lines = capsys.readouterr().out.splitlines()
    assert any("fashion/gain_psnr_db " in line and "better" in line for line in lines)
    compare_job.run_compare("weak", "weak-again", ["gain_psnr_db"], runs, True, "")
    lines = [line for line in capsys.readouterr().out.splitlines() if "fashion/gain_psnr_db " in line]
    assert "no difference found" in lines[0]

    compare_job.run_arena(["weak", "weak-again", "strong"], ["judge.kind=fake", f"runs={runs}"], runs)
    lines = capsys.readouterr().out.splitlines()
    assert f"{3 * NUM_SOURCES} pairs" in lines[0]
    ratings = [line.split()[0] for line in lines if line.startswith(("weak", "strong"))]
    assert sorted(ratings) == ["strong", "weak", "weak-again"]
    assert "fashion/arena/rating" in client.get_run(parent.info.run_id).data.metrics

    def gate(baseline, candidate, metric="fashion/gain_psnr_db", **changes):
        rule = gate_job.gate_rule(metric, **({"max_regress": 0.5} | changes))
        return gate_job.run_gate(baseline, candidate, rule, "loom", "champion", runs, "")

    assert not gate("strong", "weak")
    tag = client.get_run(found["weak"].info.run_id).data.tags["gate"]
    assert tag.startswith("failed: ")
    with pytest.raises(Exception, match="loom"):
        client.get_model_version_by_alias("loom", "champion")
    assert gate("weak", "strong", min_gain=0.5)
    version = client.get_model_version_by_alias("loom", "champion")
    assert version.run_id == parent.info.run_id
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.tags["loomvideo.fingerprint"] == parent.data.tags["loomvideo.fingerprint"]
    assert client.get_run(parent.info.run_id).data.tags["gate"] == "passed"
    with pytest.raises(UserError, match="neither high nor low"):
        gate("weak", "strong", metric="fashion/sharpness")
    with pytest.raises(UserError, match="improves by doing nothing"):
        gate("weak", "strong", metric="fashion/flicker")
    assert not gate("weak", "weak-again", margin=1e-4)
    decision = json.loads((runs / "evaluate/weak-again/gate-weak-fashion-gain_psnr_db.json").read_text())["decision"]
    assert decision["verdict"] == "too few samples to tell"
    # A registry that refuses leaves neither an empty model nor a tag that says passed.
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", _refuse)
    with pytest.raises(UserError, match="registry: fresh: no aliases today"):
        gate_job.run_gate("weak", "strong", gate_job.gate_rule("fashion/gain_psnr_db"), "fresh", "champion", runs, "")
    assert not client.search_registered_models("name = 'fresh'")
    assert client.get_run(parent.info.run_id).data.tags["gate"].startswith("failed: the registry refused fresh")

    labels = tmp_path / "labels.csv"
    compare_job.run_agreement("strong", labels, runs, 6, "")
    with labels.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    with pytest.raises(UserError, match="no scores filled in"):
        compare_job.run_agreement("strong", labels, runs, 6, "")
    with labels.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(row | {"score": str(1 + n % 5)} for n, row in enumerate(rows))
    compare_job.run_agreement("strong", labels, runs, 6, "")
    assert client.get_run(parent.info.run_id).data.metrics["fashion/human/num_items"] == 6


def test_a_rerun_asks_the_judge_nothing_new_and_keeps_its_mlflow_run(tmp_path, data, local, monkeypatch):
    with FakeJudgeServer().running() as server:
        judge = ["judge.kind=openai", "judge.model=m", f"judge.base_url={server.base_url}/v1"]
        evaluate_job.run(config(data, tmp_path, "a", *judge))
        # One trial call before anything is generated.
        assert len(server.calls) == 1 + NUM_SOURCES
        run_id = json.loads((tmp_path / "evaluate/a/mlflow.json").read_text())["run_id"]
        evaluate_job.run(config(data, tmp_path, "a", *judge))
        assert len(server.calls) == 1 + NUM_SOURCES
        assert json.loads((tmp_path / "evaluate/a/mlflow.json").read_text())["run_id"] == run_id
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
        table = json.loads(Path(client.download_artifacts(run_id, "samples-fashion.json", str(tmp_path))).read_text())
        assert len(table["data"]) == NUM_SOURCES
        # Every judged sample is one trace with the judge's scores and reasons, and the second run added none.
        child = json.loads((tmp_path / "evaluate/a/suites/fashion/mlflow.json").read_text())["run_id"]
        experiment_id = client.get_run(child).info.experiment_id
        traces = client.search_traces(locations=[experiment_id], run_id=child)
        assert sorted(t.info.tags["loomvideo.sample"] for t in traces) == [f"edit-{n}" for n in range(NUM_SOURCES)]
        said = {a.name: a for a in traces[0].info.assessments}
        assert said["judge"].source.source_type == "LLM_JUDGE"
        assert said["judge"].rationale
        picture = traces[0].data.spans[0].outputs["messages"][0]["content"][0]["image_url"]["url"]
        assert "image%2Fjpeg" in picture  # kept beside the trace
        # What people add there is compared with the judge.
        with pytest.raises(UserError, match="nobody has added an assessment `score`"):
            compare_job.run_agreement("a", None, tmp_path, 6, "")
        with default_uri(client.tracking_uri):
            for number, trace in enumerate(traces):
                person = AssessmentSource("HUMAN", "ann")
                mlflow.log_feedback(trace_id=trace.info.trace_id, name="score", value=1 + number % 5, source=person)
        compare_job.run_agreement("a", None, tmp_path, 6, "")
        assert client.get_run(run_id).data.metrics["fashion/human/num_items"] == NUM_SOURCES
        with default_uri(client.tracking_uri):
            mlflow.log_feedback(trace_id=traces[0].info.trace_id, name="score", value="good", source=person)
        with pytest.raises(UserError, match="ann gave score 'good' in MLflow, not 1 to 5"):
            compare_job.run_agreement("a", None, tmp_path, 6, "")


def test_a_judge_asked_by_batch_costs_half_and_a_rerun_submits_nothing(tmp_path, data, local, capsys):
    def act(batch, number):
        # One is called off, and one answer is unreadable.
        return ("expired", "garbage")[number] if batch == 0 and number < 2 else "ok"

    with BatchServer(act).running() as server:
        judge = ["judge.kind=openai", "judge.model=m", f"judge.base_url={server.root}/v1", "judge.batch=true"]
        judge += ["judge.input_usd=10", "judge.output_usd=20", "judge.budget_usd=9", "judge.batch_poll_s=0.01"]
        result = evaluate_job.run(config(data, tmp_path, "a", *judge))
        assert result["status"] == "complete"
        assert [len(batch) for batch in server.submitted] == [NUM_SOURCES, 2]
        # 1000 tokens in and 50 out a call, at half the price; the unreadable answer was paid for.
        assert result["fashion/cost_usd"] == pytest.approx((NUM_SOURCES + 1) * (0.01 + 0.001) / 2)
        assert "judge: batch batch_0: completed, 7 of 8 answered" in capsys.readouterr().err
        evaluate_job.run(config(data, tmp_path, "a", *judge))
        evaluate_job.run(config(data, tmp_path, "b", *judge))
        assert len(server.submitted) == 2


def test_a_judge_that_cannot_answer_ends_the_run_before_anything_is_generated(tmp_path, data, local):
    with FakeJudgeServer(lambda call: "400").running() as server:
        judge = ["judge.kind=openai", "judge.model=wrong", f"judge.base_url={server.base_url}/v1"]
        with pytest.raises(UserError, match=r"judge\.model=wrong: the trial call failed: bad request: HTTP 400"):
            evaluate_job.run(config(data, tmp_path, "a", *judge))
    assert not (tmp_path / "evaluation-store/results").exists()


@pytest.mark.slow
@requires_browser
def test_the_review_page_fits_a_phone_and_folds_what_is_not_on_top(tmp_path, data, local):
    evaluate_job.run(config(data, tmp_path, "a", "limit=2"))
    file = tmp_path / "evaluate/a/suites/fashion/review.html"
    with browser_page(tmp_path / "profile") as page:
        for width in (390, 1280):
            page.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
            )
            page.open(file.as_uri())
            page.wait_for("document.querySelectorAll('.card').length === 2")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.evaluate("innerWidth") == width
        assert "more figures" in page.evaluate("document.querySelector('.card details').innerText")
        assert "gain_psnr_db" in page.evaluate("document.querySelector('.card .scores').innerText")
        assert page.errors == []


def test_training_probes_are_logged_at_their_step(tmp_path, data, local):
    evaluate_job.run(config(data, tmp_path, "probe", "step=10"))
    evaluate_job.run(config(data, tmp_path, "probe", "step=20", "generation.blend_skill=0.9"))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run_id = json.loads((tmp_path / "evaluate/probe/mlflow.json").read_text())["run_id"]
    history = client.get_metric_history(run_id, "fashion/gain_psnr_db")
    assert [m.step for m in history] == [10, 20]
    folder = tmp_path / "evaluate/probe/suites/fashion"
    rows = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    newest = {row["key"]: row for row in rows if row["series"] == "model"}
    stored = tmp_path / "evaluation-store/media"
    for key, row in newest.items():
        film = stored / row["media"][:2] / row["media"] / "video.mp4"
        assert (folder / "media" / key / "result.mp4").samefile(film)
    child = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert any(a.path == "images" for a in client.list_artifacts(child))


def test_mistakes_are_found_before_anything_runs(tmp_path, data, monkeypatch):
    def message(*overrides):
        with pytest.raises(UserError) as error:
            start(config(data, tmp_path, "x", *overrides))
        return str(error.value)

    def start(c):
        c.check()
        find_checkpoint(c)
        suites = [suite(name) for name in c.suites]
        judge_builder(c, suites, [load_manifest(c, s) for s in suites])

    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    assert "suites: 'nope' is unknown" in message("suites=[nope]")
    assert "set data.openve=FOLDER" in message("suites=[openve]")
    assert "no finished training run" in message("generator=model")
    assert "judge.kind=openai: set judge.model" in message("judge.kind=openai")
    assert "set GEMINI_API_KEY" in message("judge.kind=gemini", "judge.model=g")
    expensive = ["judge.kind=openai", "judge.model=m", "judge.base_url=http://localhost:1/v1", "judge.input_usd=500"]
    assert "judge.budget_usd=0.01" in message(*expensive, "judge.budget_usd=0.01")
    assert "without prices it never binds" in message(*expensive[:3], "judge.budget_usd=5")
    assert "would be spent; allow it with a budget" in message(*expensive)
    assert "only a provider has a batch interface" in message("judge.kind=fake", "judge.batch=true")
    assert "the answers would be the same one" in message(*expensive[:3], "judge.repeats=3", "judge.temperature=0")
    assert "must be 4k+1" in message("inputs.num_frames=8")
    (data / "s0.mp4").rename(data / "hidden.mp4")
    try:
        assert "files are not on disk, first edit-0: s0.mp4" in message()
    finally:
        (data / "hidden.mp4").rename(data / "s0.mp4")


def test_outside_scorers_get_their_layout_and_their_verdicts_come_back(tmp_path, data, local):
    bench = tmp_path / "geneval"
    bench.mkdir()
    rows = [
        {"tag": tag, "include": [{"class": "cup", "count": 1}], "prompt": f"a cup {n}"}
        for n, tag in enumerate(["counting", "colors", "colors"])
    ]
    (bench / "evaluation_metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    verdicts = tmp_path / "results.jsonl"
    verdicts.write_text("".join(json.dumps({"tag": r["tag"], "correct": n != 2}) + "\n" for n, r in enumerate(rows)))
    runs = tmp_path / "runs"
    result = evaluate_job.run(
        config(data, runs, "g", "suites=[geneval]", f"data.geneval={bench}", f"external.geneval={verdicts}",
               "inputs.text_width=64", "inputs.text_height=64")
    )  # fmt: skip
    assert result["geneval/official/overall"] == 0.75
    folder = runs / "evaluate/g/suites/geneval/for-scorer/00002"
    assert json.loads((folder / "metadata.jsonl").read_text())["tag"] == "colors"
    assert (folder / "samples/0000.png").is_file()


@pytest.mark.slow
def test_everything_people_bring_is_measured_or_fails_for_its_reason(tmp_path, local):
    """A benchmark of the mixed folder: every file is the source of an edit."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    wanted = reasons_of_files(everything(folder))
    names = sorted(path.name for path in folder.iterdir())
    samples = []
    for number, name in enumerate(names):
        task = "image_edit" if name.endswith((".png", ".jpg", ".webp", ".heic")) else "video_edit"
        samples.append(
            Sample(f"edit-{number}", task, "fashion-world", name, name, instruction="make it blue", group=f"g{number}",
                   split="heldout", extra={"edit": {"kind": "recolour"}})
        )  # fmt: skip
    write_jsonl(samples, folder / "samples.jsonl")
    result = evaluate_job.run(config(folder, tmp_path / "runs", "mixed"))
    lines = (tmp_path / "runs/evaluate/mixed/suites/fashion/rows.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["series"] == "model"]
    failed = {names[int(row["item"]["key"].removeprefix("edit-"))]: row for row in rows if row["failure"]}
    assert len(rows) == len(names)
    assert set(failed) == {name for name in names if wanted.get(name)}
    assert all(name in row["detail"] and "\n" not in row["detail"] for name, row in failed.items())
    assert result["status"] == "partial"
