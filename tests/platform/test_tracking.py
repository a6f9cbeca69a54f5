import json
import logging
import socket

import pytest
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking import MlflowClient

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.tracking import Tracker


@pytest.fixture
def folder(tmp_path):
    return RunFolder.open(tmp_path / "runs", "pretrain", "a")


def test_a_run_is_continued_by_name_and_keeps_its_metrics(folder, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(folder, tags={"kind": "test"})
    tracker.log_params({"lr": 0.1})
    tracker.log_metrics({"loss": 2.0}, step=1)
    tracker.finish()
    again = Tracker(folder)
    assert again.run_id == tracker.run_id
    again.log_params({"lr": 0.2, "seed": 1})
    again.log_metrics({"loss": 1.0}, step=2)
    again.log_text("hello", "note.txt")
    again.finish()
    run = again._client.get_run(again.run_id)
    assert run.data.params == {"lr": "0.1", "seed": "1"}
    assert run.data.tags["changed.lr"] == "0.2"
    assert [m.value for m in again._client.get_metric_history(again.run_id, "loss")] == [2.0, 1.0]
    assert [a.path for a in again._client.list_artifacts(again.run_id)] == ["note.txt"]


def test_metrics_survive_an_absent_server(folder, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(folder)

    def fail(*args, **kwargs):
        raise OSError("connection refused")

    monkeypatch.setattr(tracker._client, "log_batch", fail)
    tracker.log_metrics({"loss": 2.0}, step=7)
    tracker.finish(timeout_s=0.5)
    lines = (folder.path / "unsent_metrics.jsonl").read_text().splitlines()
    assert [(json.loads(line)["key"], json.loads(line)["step"]) for line in lines] == [("loss", 7)]


def test_an_absent_server_costs_copies_of_files_and_not_the_job(folder, monkeypatch, caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(folder)
    path = folder.write_json("note.json", {})
    tracker.uri, tracker._client = nobody, MlflowClient(tracking_uri=nobody)
    with caplog.at_level(logging.WARNING):
        tracker.log_artifact(path)
        tracker.finish()
    assert f"{path} is not copied there" in caplog.text
    assert "does not learn that it is FINISHED" in caplog.text
    with pytest.raises(FileNotFoundError):
        tracker.log_artifact(folder.path / "missing")


@pytest.mark.parametrize(
    ("uri", "error"),
    [("http://h", RestException({"error_code": "PERMISSION_DENIED"})), ("sqlite:///x", MlflowException("broken"))],
)
def test_a_refusal_and_a_broken_local_store_are_errors(folder, monkeypatch, uri, error):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(folder)

    def fail(*args):
        raise error

    monkeypatch.setattr(tracker._client, "log_text", fail)
    tracker.uri = uri
    with pytest.raises(type(error)):
        tracker.log_text("text", "name")


def test_run_names_are_checked_and_the_newest_finished_run_is_found(tmp_path):
    with pytest.raises(UserError, match="run='a/b'"):
        RunFolder.open(tmp_path, "pretrain", "a/b")
    assert RunFolder.newest(tmp_path, "pretrain") is None
    RunFolder.open(tmp_path, "pretrain", "unfinished")
    RunFolder.open(tmp_path, "pretrain", "done").finish({"loss": 1.0})
    assert RunFolder.newest(tmp_path, "pretrain").name == "done"
