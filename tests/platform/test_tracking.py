import json
import logging
import shutil
import socket

import pytest
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking import MlflowClient

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.tracking import Tracker, metric_name


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


def test_a_full_disk_costs_the_copies_of_metrics_and_neither_the_sender_nor_the_runs_end(folder, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(folder)
    for name in ("refused_metrics.jsonl", "unsent_metrics.jsonl"):
        (folder.path / name).symlink_to("/dev/full")
    tracker._refuse({"key": "loss", "value": 1.0}, MlflowException("no"))

    def away(*arguments, **options):
        raise OSError("connection refused")

    monkeypatch.setattr(tracker._client, "log_batch", away)
    tracker.log_metrics({"loss": 2.0}, step=7)
    tracker.finish(timeout_s=0.1)
    lost = [record.getMessage() for record in caplog.records if "metrics are lost" in record.getMessage()]
    assert [line.partition(": ")[0] for line in lost] == [
        f"{folder.path}/refused_metrics.jsonl", f"{folder.path}/unsent_metrics.jsonl",
    ]  # fmt: skip


def refused(folder):
    path = folder.path / "refused_metrics.jsonl"
    return [json.loads(line)["key"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_odd_numbers_and_names_hold_nothing_else_up(folder, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(folder)
    names = ["tops #1", "tops @1", "a/", "/a", "..", "a/../b", "", "x" * 60, "x" * 300, "été", "a\nb", "half \ud83d"]
    tracker.log_metrics(dict.fromkeys(names, 1.0))
    tracker.log_metrics({"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "none": None, "word": "x"})
    tracker.log_metrics({"loss": 2.0}, step=7)
    tracker.log_params({"data.my suite #1": "x", "..": 1})
    tracker.finish()
    run = tracker._client.get_run(tracker.run_id)
    assert {metric_name(name) for name in names} <= set(run.data.metrics)
    assert len({metric_name(name) for name in names}) == len(names)
    assert run.data.metrics["loss"] == 2.0
    assert run.data.params[metric_name("data.my suite #1")] == "x"
    assert run.info.status == "FINISHED"
    assert {"none", "word"} <= set(refused(folder)) <= {"none", "word", "nan", "inf", "-inf"}


def test_what_a_server_refuses_is_kept_with_its_reason_and_the_rest_is_sent(folder, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(folder)
    sent, send, failures = [], tracker._client.log_batch, [OSError("away"), MlflowException("away")]

    def strict(run_id, metrics=(), **rest):
        if failures:
            raise failures.pop()
        if any(metric.key == "bad" for metric in metrics):
            raise RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no bad"})
        sent.extend(metric.key for metric in metrics)
        send(run_id, metrics=metrics, **rest)

    monkeypatch.setattr("loomvideo.platform.tracking.RETRY_INTERVAL_S", 0.01)
    monkeypatch.setattr(tracker._client, "log_batch", strict)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log_metrics(
                {f"a{n}": 1.0 for n in range(5)} | {"bad": 1.0} | {f"b{n}": 1.0 for n in range(5)}, step
            )
        tracker.finish()
    assert sorted(sent) == sorted([f"{letter}{n}" for letter in "ab" for n in range(5)] * 3)
    assert refused(folder) == ["bad"] * 3
    assert caplog.text.count("refuses metric bad") == 1
    assert not (folder.path / "unsent_metrics.jsonl").exists()


def test_a_server_that_is_away_at_the_start_is_one_line(folder, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="start the server, or unset it") as caught:
        Tracker(folder, nobody)
    assert "\n" not in str(caught.value)


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


def test_a_run_folder_that_is_gone_is_no_mistake_of_the_tracking_uri(folder):
    shutil.rmtree(folder.path)
    with pytest.raises(FileNotFoundError, match=str(folder.path)):
        Tracker(folder)


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
