"""Datasets and models in MLflow: what a run was trained on, the model it made, and versions that people rely on.

Weights stay where they are: a LoggedModel is a record of them with its parameters, metrics and lineage, so that a
registered version leads back to checkpoint, run, shards and sources. Works the same on a server with proxied artifacts
and on a local store.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

FINGERPRINT = "loomvideo.fingerprint"
WEIGHTS_FINGERPRINT = "loomvideo.weights_fingerprint"
MODEL_ID = "loomvideo.model_id"
"""Tag of a run that made or measured a LoggedModel."""
MAX_PARAMETER_CHARACTERS = 250


def log_dataset(
    client: MlflowClient, run_id: str, name: str, digest: str, source: str, context: str, profile: str = ""
) -> None:
    """Tie a dataset to a run.

    Args:
        client: A client of the tracking server.
        run_id: The run.
        name: Shown in the runs list.
        digest: The digest of the content; MLflow takes 36 characters.
        source: Folder or URL.
        context: ``training`` or ``evaluation``.
        profile: JSON text of counts and the like, shown with the dataset.
    """
    dataset = Dataset(name[:500], digest[:36], "local", source, profile=profile or None)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def logged_model(
    client: MlflowClient, experiment_id: str, run_id: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    """The LoggedModel of weights kept outside MLflow; found again by the fingerprint among ``tags``."""
    found = find_model(client, experiment_id, tags[FINGERPRINT])
    if found is not None:
        return found
    values = {key: str(value)[:MAX_PARAMETER_CHARACTERS] for key, value in params.items()}
    model = client.create_logged_model(experiment_id, name, run_id, dict(tags), values, "loomvideo")
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model.model_id


def trained_model(client: MlflowClient, training_run: str, weights_fingerprint: str) -> str | None:
    """The LoggedModel that a training run made, if it is of these weights; None when the server knows of none."""
    try:
        model_id = client.get_run(training_run).data.tags.get(MODEL_ID, "")
        tags = client.get_logged_model(model_id).tags if model_id else {}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        # The training was logged to another server.
        return None
    return model_id if tags.get(WEIGHTS_FINGERPRINT) == weights_fingerprint else None


def find_model(client: MlflowClient, experiment_id: str, fingerprint: str) -> str | None:
    """The LoggedModel of an experiment whose weights have this fingerprint."""
    chosen = f"tags.`{FINGERPRINT}` = '{fingerprint}'"
    found = client.search_logged_models([experiment_id], filter_string=chosen, max_results=1)
    return found[0].model_id if found else None


def register_version(
    client: MlflowClient, name: str, alias: str, model_id: str, run_id: str, tags: Mapping[str, str]
) -> str:
    """Make a LoggedModel a version of a registered model and point the alias at it; returns the version.

    The version's source is the LoggedModel: servers refuse paths of files, which they cannot read. A registered model
    that was made for a version which is refused is taken away again.

    Raises:
        MlflowException: if the registry refuses.
    """
    fresh = False
    try:
        client.create_registered_model(name)
        fresh = True
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    try:
        for known in client.search_model_versions(f"name = '{name}'"):
            if known.source == f"models:/{model_id}":
                version = known.version
                break
        else:
            source = f"models:/{model_id}"
            with default_uri(client.tracking_uri):
                version = client.create_model_version(name, source, run_id, dict(tags), model_id=model_id).version
        client.set_registered_model_alias(name, alias, version)
    except MlflowException:
        if fresh:
            # What the registry says of the version is the error to show, not that its model is still there.
            with contextlib.suppress(MlflowException):
                client.delete_registered_model(name)
        raise
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    return version


@contextlib.contextmanager
def default_uri(uri: str) -> Iterator[None]:
    """Make a server MLflow's default for a while: local registries and traces ask it, not their client's."""
    # None takes away the environment variable too, which MLflow sets and later runs would take their server from.
    before = mlflow.get_tracking_uri() if mlflow.tracking.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
