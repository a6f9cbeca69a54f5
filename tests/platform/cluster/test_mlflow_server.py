"""The MLflow server: users, host check, proxied artifacts, secrets kept out of the command line."""

import stat

import pytest
import requests
from fixtures.mlflow_server import running_server

from loomvideo.platform.cluster.mlflow_server import (
    ADMINISTRATOR,
    ADMINISTRATOR_FILE,
    PASSWORD_FILE,
    SECRET_FILE,
    SETTINGS_FILE,
    USER,
    prepare_server,
)
from loomvideo.platform.cluster.mlflow_user import ensure_user

pytest.importorskip("flask_wtf")


def test_secrets_are_private_stable_and_not_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql+psycopg2://mlflow:pw-in-uri@db/mlflow")
    server = prepare_server(tmp_path / "s")
    for name in (PASSWORD_FILE, ADMINISTRATOR_FILE, SETTINGS_FILE, SECRET_FILE):
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
    with running_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


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


@pytest.mark.slow
def test_the_jobs_user_is_no_administrator_and_owns_only_what_it_makes(running):
    import mlflow

    def administers(name):
        login = (ADMINISTRATOR, running.users["MLFLOW_ADMIN_PASSWORD"])
        answer = requests.get(f"{running.url}/api/2.0/mlflow/users/get?username={name}", auth=login, timeout=30)
        return answer.json()["user"]["is_admin"]

    login = (USER, running.users["MLFLOW_TRACKING_PASSWORD"])
    api = f"{running.url}/api/2.0/mlflow"
    assert not administers(USER)
    body = {"username": "intruder", "password": "long-enough-password"}
    assert requests.post(f"{api}/users/create", json=body, auth=login, timeout=30).status_code == 403
    administrator = mlflow.MlflowClient(tracking_uri=running.url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", ADMINISTRATOR)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", running.users["MLFLOW_ADMIN_PASSWORD"])
        other = administrator.create_experiment("of somebody else")
    read = requests.get(f"{api}/experiments/get?experiment_id={other}", auth=login, timeout=30)
    assert read.status_code == 200
    answer = requests.post(f"{api}/runs/create", json={"experiment_id": other}, auth=login, timeout=30)
    assert answer.status_code == 403
    admin_login = (ADMINISTRATOR, running.users["MLFLOW_ADMIN_PASSWORD"])
    promoted = {"username": USER, "is_admin": True}
    assert requests.patch(f"{api}/users/update-admin", json=promoted, auth=admin_login, timeout=30).status_code == 200
    assert ensure_user(running.url, admin_login, login) == "kept"
    assert not administers(USER)
    with pytest.raises(PermissionError, match="refuses the administrator"):
        ensure_user(running.url, login, ("third", "long-enough-password"))
    with pytest.raises(ConnectionError, match="no MLflow server answers there"):
        ensure_user("http://127.0.0.1:9", admin_login, login, wait_s=0)
