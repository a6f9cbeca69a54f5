"""Finished evaluation runs by reference, and their MLflow runs."""

from pathlib import Path

from mlflow.tracking import MlflowClient

from loomvideo.jobs.evaluation.setup import JOB
from loomvideo.jobs.weights.references import find_run
from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.tracking import default_tracking_uri


def evaluation_run(runs: Path, reference: str) -> RunFolder:
    """The folder of an evaluation run.

    Raises:
        UserError: if there is none.
    """
    return find_run(reference, runs, jobs=(JOB,)).run


def tracked(folder: RunFolder, tracking_uri: str) -> tuple[MlflowClient, str]:
    """A client of the tracking server that a run was logged to, and the id of its run there.

    Raises:
        UserError: if the folder knows of none.
    """
    known = folder.read_json("mlflow.json")
    if known is None:
        raise UserError(f"{folder.path}: no MLflow run is recorded here")
    uri = tracking_uri or known["tracking_uri"] or default_tracking_uri(folder.root)
    return MlflowClient(tracking_uri=uri), known["run_id"]
