"""create-secrets.sh: every declared secret with its keys, fresh values, none of them on a command line."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "infra" / "kubernetes"

# Keeps what it is given as files, answers "not found" to every get but those named in HAVE, and records its arguments.
KUBECTL = """#!/bin/sh
echo "$*" >> "$RECORD/arguments"
case "$*" in
  *" get secret "*) for name in $HAVE; do case "$*" in *"$name"*) echo "secret/$name"; exit 0 ;; esac; done; exit 1 ;;
  "get namespace"*) exit 1 ;;
  *"create secret generic"*)
    for argument in "$@"; do case "$argument" in
      --from-file=*) cp -r "${argument#--from-file=}" "$RECORD/" ;;
    esac; done ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "kubectl").write_text(KUBECTL)
    (tools / "kubectl").chmod(0o755)

    def call(record, have="", **variables):
        (tmp_path / record).mkdir()
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "RECORD": str(tmp_path / record), "HAVE": have}
        command = ["bash", str(KUBERNETES / "create-secrets.sh"), "loomvideo"]
        result = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
        return result, tmp_path / record

    return call


CREDENTIALS = {
    f"{store}_AWS_{key}": f"{store}-{key}-value"
    for store in ("DATA", "ARTIFACTS")
    for key in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
}


def test_every_declared_secret_is_made_and_no_value_is_an_argument(run):
    result, record = run("one", **CREDENTIALS)
    assert result.returncode == 0, result.stderr
    arguments = (record / "arguments").read_text()
    values = {}
    for secret in yaml.safe_load((KUBERNETES / "given.yaml").read_text())["secrets"]:
        if secret["name"] == "loomvideo-serve-tls":
            continue  # a certificate is no random value
        for key in secret["keys"]:
            values[secret["name"], key] = (record / secret["name"] / key).read_text()
    assert all(values.values())
    names = {"admin", "loomvideo-jobs"}
    assert [v for v in values.values() if v in arguments and v not in names] == []
    assert values["loomvideo-postgres", "password"] in values["loomvideo-mlflow-server", "backend-store-uri"]
    settings = values["loomvideo-mlflow-server", "basic_auth.ini"]
    assert f"admin_password = {values['loomvideo-mlflow-server', 'admin-password']}\n" in settings
    assert values["loomvideo-mlflow-client", "MLFLOW_TRACKING_PASSWORD"] not in settings
    assert values["loomvideo-object-store", "AWS_ACCESS_KEY_ID"] == CREDENTIALS["DATA_AWS_ACCESS_KEY_ID"]
    assert values["loomvideo-artifact-store", "AWS_ACCESS_KEY_ID"] == CREDENTIALS["ARTIFACTS_AWS_ACCESS_KEY_ID"]
    _, other = run("two", **CREDENTIALS)
    token = ("loomvideo-ray-token", "auth_token")
    assert (other / token[0] / token[1]).read_text() != values[token]
    assert len(values[token]) >= 32


def test_existing_secrets_are_kept(run):
    result, record = run("kept", have="loomvideo-postgres loomvideo-ray-token loomvideo-serve", **CREDENTIALS)
    assert result.returncode == 0
    made = {path.name for path in record.iterdir() if path.is_dir()}
    assert made == {"loomvideo-object-store", "loomvideo-artifact-store"}


def test_without_keys_no_object_store_secret_is_made(run):
    result, record = run("identity")
    assert result.returncode == 0
    assert "left out loomvideo-object-store (DATA_AWS_ACCESS_KEY_ID and" in result.stdout
    assert not (record / "loomvideo-artifact-store").exists()


def test_half_a_key_pair_is_named(run):
    result, _ = run("half", DATA_AWS_ACCESS_KEY_ID="id-value")
    assert result.returncode != 0
    assert "set both DATA_AWS_ACCESS_KEY_ID and DATA_AWS_SECRET_ACCESS_KEY" in result.stderr
