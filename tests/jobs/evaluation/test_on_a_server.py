"""From a training run to a registry alias on an MLflow server with Postgres, as a user who administers nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import requests
from fixtures.evaluation import without_ray
from fixtures.mlflow_server import own_postgres, running_server
from mlflow.entities import AssessmentSource
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from loomvideo.jobs.evaluation import compare as compare_job
from loomvideo.jobs.evaluation import gate as gate_job
from loomvideo.jobs.evaluation import job as evaluate_job
from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.platform.cluster.mlflow_server import PASSWORD_FILE, USER
from loomvideo.platform.config import load_config
from loomvideo.platform.registry import MODEL_ID, default_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
pytest.importorskip("flask_wtf")
pytest.importorskip("psycopg2")

TRAINING = [
    "data.shards=[data/shards]", "training.steps=2", "training.pack.tokens=288", "training.log_every=1",
    "training.optimizer.warmup_steps=1", "evaluation.samples=data/sample/samples.jsonl", "evaluation.num_edits=2",
    "evaluation.num_generated=0", "evaluation.num_films=1", "evaluation.steps=1",
]  # fmt: skip
EVALUATION = [
    "checkpoint=pretrain/t", "judge.kind=fake", "generation.steps=1", "judge.num_frames=2",
]  # fmt: skip
REVIEWER, REVIEWERS_PASSWORD = "ann", "a-long-enough-password"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("walk")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with own_postgres() as database, pytest.MonkeyPatch.context() as patch:
        if database is None:
            pytest.skip("no Postgres is installed")
        patch.setenv("MLFLOW_BACKEND_STORE_URI", database)
        with running_server(tmp_path_factory.mktemp("mlflow")) as running:
            yield running


@pytest.fixture
def loomvideo(server, folder):
    """Runs a command as somebody with a terminal would, who logs in as the jobs' user."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": server.url,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": (server.folder / PASSWORD_FILE).read_text(),
    }
    environment.pop("MLFLOW_BACKEND_STORE_URI", None)

    def run(*arguments):
        command = [sys.executable, "-m", "loomvideo.jobs.cli", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture
def local(monkeypatch):
    """The same stages without a Ray cluster, which has a test of its own."""
    without_ray(monkeypatch)


def test_from_training_to_a_registered_model_and_what_people_say_of_it(
    server, folder, loomvideo, local, monkeypatch, capsys
):
    small = ("num_train=12", "num_heldout=6", "width=64", "height=64", "real=false", "workers=1")
    loomvideo("data", "sample", *small)
    loomvideo("data", "prepare", "input=data/sample/samples.jsonl", "output=data/shards")
    loomvideo("pretrain", "run=t", *TRAINING)
    # The rest runs here, without Ray, which has tests of its own.
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", (server.folder / PASSWORD_FILE).read_text())
    for name, seed in (("first", 0), ("second", 1)):
        evaluate_job.run(load_config(EvaluateConfig, [f"run={name}", f"seed={seed}", *EVALUATION]))
    capsys.readouterr()

    client = MlflowClient(tracking_uri=server.url)

    def run_of(job, name, *parts):
        return client.get_run(
            json.loads((folder / "runs" / job / name).joinpath(*parts, "mlflow.json").read_text())["run_id"]
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
        body = {"experiment_id": suite.info.experiment_id, "username": REVIEWER, "permission": "EDIT"}
        allowed = requests.post(
            f"{api}/experiments/permissions/create", json=body, timeout=60,
            auth=(USER, os.environ["MLFLOW_TRACKING_PASSWORD"]),
        )  # fmt: skip
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
