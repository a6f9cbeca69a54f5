"""The MLflow server: users, host check, proxied artifacts, secrets kept out of the command line."""

import os
import socket
import stat
import subprocess
import time

import pytest
import requests

from loomvideo.platform.cluster.mlflow_server import PASSWORD_FILE, SECRET_FILE, SETTINGS_FILE, USER, prepare_server

pytest.importorskip("flask_wtf")


def test_secrets_are_private_stable_and_not_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql+psycopg2://mlflow:pw-in-uri@db/mlflow")
    server = prepare_server(tmp_path / "s")
    for name in (PASSWORD_FILE, SETTINGS_FILE, SECRET_FILE):
        assert stat.S_IMODE((tmp_path / "s" / name).stat().st_mode) == 0o600
    password = (tmp_path / "s" / PASSWORD_FILE).read_text()
    printed = " ".join(server.command) + server.how_to_log_in()
    assert password not in printed
    assert "pw-in-uri" not in printed
    assert server.environment["MLFLOW_BACKEND_STORE_URI"].endswith("@db/mlflow")
    again = prepare_server(tmp_path / "s")
    assert (tmp_path / "s" / PASSWORD_FILE).read_text() == password
    assert again.environment == server.environment


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = prepare_server(tmp_path_factory.mktemp("mlflow"), port=port)
    log = (server.folder / "log").open("wb")
    process = subprocess.Popen(
        server.command, env=os.environ | server.environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if requests.get(f"{server.url}/health", timeout=5).status_code == 200:
                    break
            except requests.RequestException:
                time.sleep(0.5)
        else:
            raise TimeoutError((server.folder / "log").read_text()[-2000:])
        yield server
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
        log.close()


@pytest.mark.slow
def test_server_refuses_strangers_and_keeps_artifacts(running, tmp_path, monkeypatch):
    import mlflow

    search = f"{running.url}/api/2.0/mlflow/experiments/search?max_results=1"
    assert requests.get(search, timeout=30).status_code == 401
    assert requests.get(search, auth=(USER, "wrong"), timeout=30).status_code == 401
    password = (running.folder / PASSWORD_FILE).read_text()
    assert requests.get(search, auth=(USER, password), timeout=30).status_code == 200
    rebound = requests.get(search, auth=(USER, password), headers={"Host": "evil.example:80"}, timeout=30)
    assert rebound.status_code == 403
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    client = mlflow.MlflowClient(tracking_uri=running.url)
    run = client.create_run(client.create_experiment("e"))
    (tmp_path / "note.txt").write_text("kept")
    client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert [path.read_text() for path in running.folder.rglob("note.txt")] == ["kept"]
    assert password not in (running.folder / "log").read_text()
