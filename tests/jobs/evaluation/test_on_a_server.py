"""From a training run to a registry alias on an MLflow server with Postgres, as a user who administers nothing."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
import torch
from fixtures.datasets import make_sample, write_dataset
from fixtures.evaluation import without_ray
from fixtures.mlflow_server import own_postgres, running_server
from mlflow.entities import AssessmentSource
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from loomvideo.jobs.evaluation import compare as compare_job
from loomvideo.jobs.evaluation import gate as gate_job
from loomvideo.jobs.evaluation import job as evaluate_job
from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.jobs.training.records import record_datasets, record_model
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.sources.samples import Sample, write_jsonl
from loomvideo.platform.cluster.mlflow_server import PASSWORD_FILE, USER
from loomvideo.platform.config import load_config
from loomvideo.platform.registry import MODEL_ID, default_uri
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.tracking import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
pytest.importorskip("flask_wtf")
pytest.importorskip("psycopg2")

EVALUATION = [
    "checkpoint=pretrain/t", "suites=[sample]", "data.sample=data", "judge.kind=fake", "judge.num_frames=2",
    "generation.model=tiny", "generation.steps=1", "generation.kernels=eager", "inputs.bucket_classes=[64]",
    "inputs.num_frames=5",
]  # fmt: skip
REVIEWER, REVIEWERS_PASSWORD = "ann", "a-long-enough-password"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with own_postgres() as database, pytest.MonkeyPatch.context() as patch:
        if database is None:
            pytest.skip("no Postgres is installed")
        patch.setenv("MLFLOW_BACKEND_STORE_URI", database)
        with running_server(tmp_path_factory.mktemp("mlflow")) as running:
            yield running


def train(folder):
    """What the driver of a training job writes down, around weights that nobody trained; and held-out clips."""
    samples = [make_sample(f"edit-{n}") for n in range(4)]
    dataset = write_dataset(folder / "shards", samples)
    run = RunFolder.open(folder / "runs", "pretrain", "t")
    tracker = Tracker(run)
    tracker.log_params({"model": "tiny"})
    tracker.log_metrics({"train/loss": 1.0}, 1)
    record_datasets(tracker, [str(folder / "shards")], [dataset])
    torch.manual_seed(0)
    config = model_size("tiny").dit
    save_dit(LoomVideoDiT(config), config, run.path / "weights")
    result = {"weights": str(run.path / "weights"), "steps": 1}
    record_model(tracker, run, "tiny", result, {"loomvideo.dataset.0": dataset.digest})
    tracker.finish("FINISHED")
    run.finish(result)
    rng = np.random.default_rng(0)
    clips = []
    for n in range(6):
        for side in ("s", "t"):
            write_video(folder / f"data/{side}{n}.mp4", rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8), 24)
        clips.append(
            Sample(f"edit-{n}", "video_edit", "made-up", f"t{n}.mp4", f"s{n}.mp4", instruction=f"edit {n}",
                   group=f"g{n}", split="heldout")
        )  # fmt: skip
    write_jsonl(clips, folder / "data/samples.jsonl")


def test_from_training_to_a_registered_model_and_what_people_say_of_it(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", (server.folder / PASSWORD_FILE).read_text())
    train(tmp_path)
    without_ray(monkeypatch)
    for name, seed in (("first", 0), ("second", 1)):
        evaluate_job.run(load_config(EvaluateConfig, [f"run={name}", f"seed={seed}", *EVALUATION]))
    capsys.readouterr()

    client = MlflowClient(tracking_uri=server.url)

    def run_of(job, name, *parts):
        return client.get_run(
            json.loads((tmp_path / "runs" / job / name).joinpath(*parts, "mlflow.json").read_text())["run_id"]
        )

    training, second = run_of("pretrain", "t"), run_of("evaluate", "second")
    # One model, of the training experiment: figures of evaluations belong to it.
    model_id = training.data.tags[MODEL_ID]
    assert second.data.tags[MODEL_ID] == model_id
    model = client.get_logged_model(model_id)
    assert model.experiment_id == training.info.experiment_id
    assert {m.key for m in model.metrics} >= {"sample/judge", "sample/gain_psnr_db"}
    (data,) = training.inputs.dataset_inputs
    assert json.loads(data.dataset.profile)["licences"]
    # Artifacts went through the server, which keeps them.
    suite = run_of("evaluate", "second", "suites", "sample")
    assert suite.info.artifact_uri.startswith("mlflow-artifacts:")
    assert "review.html" in {a.path for a in client.list_artifacts(suite.info.run_id)}
    assert list((server.folder / "artifacts").rglob("review.html"))

    def gate(registered_model, **limits):
        rule = gate_job.gate_rule("sample/gain_psnr_db", **limits)
        return gate_job.run_gate("first", "second", rule, registered_model, "champion", Path("runs"), "")

    # A margin that nobody would set, for the model is an untrained one.
    assert gate("loomvideo", margin=60.0)
    assert "registry: loomvideo@champion is now version 1" in capsys.readouterr().out
    version = client.get_model_version_by_alias("loomvideo", "champion")
    assert version.source == f"models:/{model_id}"
    assert version.status == "READY"
    assert run_of("evaluate", "second").data.tags["gate"] == "passed"
    assert not gate("other", min_gain=60.0)
    assert not client.search_registered_models("name = 'other'")

    traces = client.search_traces(locations=[suite.info.experiment_id], run_id=suite.info.run_id)
    judged = client.get_metric_history(second.info.run_id, "sample/judge")
    assert judged
    assert traces
    said = {a.name: a for a in traces[0].info.assessments}
    assert said["judge"].source.source_type == "LLM_JUDGE"
    assert traces[0].data.spans[0].outputs["messages"][0]["content"]

    # A person may look at once, and review after the owner of the experiment allows it.
    login = ("admin", server.users["MLFLOW_ADMIN_PASSWORD"])
    api = f"{server.url}/api/2.0/mlflow"
    made = requests.post(
        f"{api}/users/create", json={"username": REVIEWER, "password": REVIEWERS_PASSWORD}, auth=login, timeout=60
    )
    assert made.status_code == 200
    with default_uri(server.url):
        with monkeypatch.context() as as_reviewer:
            as_reviewer.setenv("MLFLOW_TRACKING_USERNAME", REVIEWER)
            as_reviewer.setenv("MLFLOW_TRACKING_PASSWORD", REVIEWERS_PASSWORD)
            assert client.get_trace(traces[0].info.trace_id)
            with pytest.raises(MlflowException, match=r"[Pp]ermission"):
                _say(traces[0], 3)
        granted = {
            "username": REVIEWER, "resource_type": "experiment", "resource_id": suite.info.experiment_id,
            "permission": "EDIT",
        }  # fmt: skip
        owner = (USER, (server.folder / PASSWORD_FILE).read_text())
        address = f"{server.url}/api/3.0/mlflow/users/permissions/grant"
        allowed = requests.post(address, json=granted, auth=owner, timeout=60)
        assert allowed.status_code == 200, allowed.text
        with monkeypatch.context() as as_reviewer:
            as_reviewer.setenv("MLFLOW_TRACKING_USERNAME", REVIEWER)
            as_reviewer.setenv("MLFLOW_TRACKING_PASSWORD", REVIEWERS_PASSWORD)
            for number, trace in enumerate(traces):
                _say(trace, 1 + number % 5)
    compare_job.run_agreement("second", None, Path("runs"), 40, "")
    assert "judge against people" in capsys.readouterr().out
    assert run_of("evaluate", "second").data.metrics["sample/human/num_items"] == len(traces)


def _say(trace, score):
    person = AssessmentSource("HUMAN", REVIEWER)
    mlflow.log_feedback(trace_id=trace.info.trace_id, name="score", value=score, source=person)
