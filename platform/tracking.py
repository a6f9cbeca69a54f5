"""Experiment tracking in MLflow: one run a job, owned by the driver and resumed by run name.

Metrics are queued and sent by a background thread, so that a slow or absent tracking server never stops training:
what cannot be sent is retried, what the server refuses is kept in the run folder with its reason and holds nothing
else up, and what is still unsent at the end is kept there too. Files are in the run
folder anyway: a server that is away costs their copies, not the job.
"""

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import requests
from mlflow.entities import LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking import MlflowClient
from PIL import Image

from loomvideo.platform.errors import UserError, full_disk_named
from loomvideo.platform.folders import locked
from loomvideo.platform.registry import MODEL_ID, log_dataset, logged_model
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.time_limits import LOCAL_STORE, TRACKING_END

logger = logging.getLogger(__name__)

MAX_PARAM_CHARACTERS = 6000
BATCH_SIZE = 500
RETRY_INTERVAL_S = 5.0
MAX_NAME_CHARACTERS = 250
REFUSED_FILE, UNSENT_FILE = "refused_metrics.jsonl", "unsent_metrics.jsonl"
# Answers that the same request will get again; everything else may pass.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")


def metric_name(name: str) -> str:
    """A name that MLflow takes: itself where it can, else with `_` for what it refuses and a digest to stay unique."""
    parts = [part.strip() for part in re.sub(r"[^\w.\- :/]", "_", name).split("/")]
    cleaned = "/".join("_" if set(part) <= {"."} else part for part in parts)
    if cleaned == name and len(name) <= MAX_NAME_CHARACTERS:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{cleaned[: MAX_NAME_CHARACTERS - len(digest) - 1]}-{digest}"


def default_tracking_uri(runs_root: Path) -> str:
    """``MLFLOW_TRACKING_URI``, else a sqlite store beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(runs_root).absolute()}/mlflow.db"


class Tracker:
    """One MLflow run.

    Args:
        folder: The run folder; its MLflow run id is kept in ``mlflow.json`` so that the same name continues the run.
        uri: Tracking URI; the default is :func:`default_tracking_uri`.
        tags: Tags set on the run.
        parent_run_id: Makes this a child run.
        experiment: Experiment name; the default is ``loomvideo/<job>``.
    """

    def __init__(
        self,
        folder: RunFolder,
        uri: str | None = None,
        tags: dict[str, str] | None = None,
        parent_run_id: str | None = None,
        experiment: str | None = None,
    ):
        self.folder = folder
        self.uri = uri or default_tracking_uri(folder.root)
        known = folder.read_json("mlflow.json")
        try:
            with full_disk_named(self.uri), _alone(self.uri):
                self._client = MlflowClient(tracking_uri=_patient(self.uri))
                self.experiment_id = self._open_experiment(experiment or f"loomvideo/{folder.job}")
            known_id = known["run_id"] if known and known["tracking_uri"] == self.uri else None
            self.run_id = self._open_run(known_id, tags or {}, parent_run_id)
        except (MlflowException, OSError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            fix = f"start the server, or unset it to keep a local store in {folder.root}"
            raise UserError(f"MLFLOW_TRACKING_URI={self.uri}: {reason}; {fix}") from error
        # A run folder that is gone is no mistake in the tracking URI.
        folder.write_json("mlflow.json", {"tracking_uri": self.uri, "run_id": self.run_id})
        self._queue: queue.Queue[list[Metric] | None] = queue.Queue()
        self._warned = False
        self._refused: set[str] = set()
        self._sender = threading.Thread(target=self._send_loop, name="mlflow-sender", daemon=True)
        self._sender.start()

    def _open_experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        # A local store keeps its artifacts beside the runs, whatever the working directory is.
        location = (self.folder.root / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None
        try:
            # MLflow then opens the experiment with run tables and charts instead of traces.
            return self._client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
        except MlflowException:
            experiment = self._client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return experiment.experiment_id

    def _open_run(self, known_id: str | None, tags: dict[str, str], parent_run_id: str | None) -> str:
        if known_id:
            self._client.update_run(known_id, status="RUNNING")
            for key, value in tags.items():
                self._client.set_tag(known_id, key, value)
            return known_id
        tags = tags | {"loomvideo.run_folder": str(self.folder.path)}
        if parent_run_id:
            tags["mlflow.parentRunId"] = parent_run_id
        return self._client.create_run(self.experiment_id, run_name=self.folder.name, tags=tags).info.run_id

    def log_params(self, params: dict[str, Any]) -> None:
        """Log parameters; ones that a resumed run already has keep their first value, changes become tags."""
        present = self._client.get_run(self.run_id).data.params
        values = {metric_name(key): str(value)[:MAX_PARAM_CHARACTERS] for key, value in params.items()}
        fresh = [Param(key, value) for key, value in values.items() if key not in present]
        for start in range(0, len(fresh), 100):
            self._client.log_batch(self.run_id, params=fresh[start : start + 100])
        for key, value in values.items():
            if key in present and present[key] != value:
                self._client.set_tag(self.run_id, f"changed.{key}", value)

    def set_tags(self, tags: dict[str, Any]) -> None:
        """Set tags."""
        self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        """Queue metrics for sending; returns at once. What is no number goes to the refused ones."""
        now_ms = int(time.time() * 1000)
        batch = []
        for key, value in metrics.items():
            try:
                batch.append(Metric(metric_name(key), float(value), now_ms, step))
            except (TypeError, ValueError, OverflowError) as error:
                self._refuse({"key": key, "value": repr(value)[:200], "timestamp": now_ms, "step": step}, error)
        if batch:
            self._queue.put(batch)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload a file, or a folder with everything under it; a warning when the server is away.

        Raises:
            FileNotFoundError: if there is none.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(path)
        with self._while_away(f"{path} is not copied there"):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder)
            else:
                self._client.log_artifact(self.run_id, str(path), folder)

    def log_dataset(self, name: str, digest: str, source: str, context: str, profile: str = "") -> None:
        """Tie a dataset to the run, see :func:`~loomvideo.platform.registry.log_dataset`; a warning when that fails."""
        with self._recording(f"dataset {name} is not recorded there"):
            log_dataset(self._client, self.run_id, name, digest, source, context, profile)

    def log_model(self, name: str, params: dict[str, Any], tags: dict[str, str], step: int) -> None:
        """Record weights kept outside as the run's LoggedModel; a warning when that fails."""
        with self._recording(f"the model {name} is not recorded there"):
            model_id = logged_model(self._client, self.experiment_id, self.run_id, name, params, tags)
            outputs = self._client.get_run(self.run_id).outputs
            if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
                self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])
            self._client.set_tag(self.run_id, MODEL_ID, model_id)

    def log_picture(self, path: str | Path, key: str, step: int) -> None:
        """Upload a picture at a step, which MLflow shows with a slider; a warning when the server is away."""
        with self._while_away(f"{path} is not copied there"), Image.open(path) as picture:
            self._client.log_image(self.run_id, picture.convert("RGB"), key=key, step=step)

    def log_text(self, text: str, name: str) -> None:
        """Upload a text as a file; a warning when the server is away."""
        with self._while_away(f"{name} is not copied there"):
            self._client.log_text(self.run_id, text, name)

    def finish(self, status: str = "FINISHED", timeout_s: float | None = None) -> None:
        """Send what is queued and end the run as ``FINISHED``, ``FAILED`` or ``KILLED``.

        Metrics that cannot be sent within ``timeout_s``, by default the usual time, are written to
        ``unsent_metrics.jsonl`` in the run folder.
        """
        self._queue.put(None)
        self._sender.join(TRACKING_END.here() if timeout_s is None else timeout_s)
        if self._sender.is_alive():
            self._spool()
            return
        with self._while_away(f"the run does not learn that it is {status}"):
            self._client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def _recording(self, consequence: str) -> Iterator[None]:
        """Warn of any failure: a record that a server is too old for must not fail hours of work that are on disk."""
        try:
            yield
        except (MlflowException, OSError) as error:
            logger.warning("tracking server %s: %s; %s", self.uri, error, consequence)

    @contextlib.contextmanager
    def _while_away(self, consequence: str) -> Iterator[None]:
        """Warn of a server that does not answer; one that answers and refuses, or a broken local store, is an error."""
        try:
            yield
        except (RestException, requests.HTTPError):
            raise
        except (MlflowException, OSError) as error:
            if not self.uri.startswith("http"):
                with full_disk_named(self.uri):
                    raise
            logger.warning("tracking server %s: %s; %s", self.uri, error, consequence)

    def _send_loop(self) -> None:
        while (batch := self._queue.get()) is not None:
            finished = False
            while len(batch) < BATCH_SIZE:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    finished = True
                    break
                batch = batch + more
            self._send(batch)
            if finished:
                return

    def _send(self, batch: list[Metric]) -> None:
        self._pending = batch
        for start in range(0, len(batch), BATCH_SIZE):
            self._send_some(batch[start : start + BATCH_SIZE])
        self._pending = []
        if self._warned:
            logger.warning("tracking server %s: reached again, kept metrics were sent", self.uri)
            self._warned = False

    def _send_some(self, metrics: list[Metric]) -> None:
        """Send until they are there; a batch that is refused is halved until what is wrong in it stands alone."""
        refusal = self._attempt(metrics)
        if refusal is None or len(metrics) == 1:
            if refusal is not None:
                self._refuse(_as_dict(metrics[0]), refusal)
            self._settle(metrics)
            return
        middle = len(metrics) // 2
        self._send_some(metrics[:middle])
        self._send_some(metrics[middle:])

    def _attempt(self, metrics: list[Metric]) -> MlflowException | None:
        """Send, again while the server is away; returns its refusal, None when they are there."""
        while True:
            try:
                self._client.log_batch(self.run_id, metrics=metrics)
                return None
            except (MlflowException, OSError) as error:
                if isinstance(error, MlflowException) and error.error_code in _REFUSALS:
                    return error
                if not self._warned:
                    logger.warning("tracking server %s: %s; metrics are kept and retried", self.uri, error)
                    self._warned = True
                time.sleep(RETRY_INTERVAL_S)

    def _settle(self, metrics: list[Metric]) -> None:
        settled = {id(metric) for metric in metrics}
        self._pending = [metric for metric in self._pending if id(metric) not in settled]

    def _refuse(self, metric: dict[str, Any], error: Exception) -> None:
        path = self.folder.path / REFUSED_FILE
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        self._append(path, [metric | {"reason": reason}])
        if metric["key"] not in self._refused:
            self._refused.add(metric["key"])
            logger.warning(
                "tracking server %s refuses metric %s: %s; kept in %s", self.uri, metric["key"], reason, path
            )

    def _spool(self) -> None:
        unsent = list(self._pending)
        while True:
            try:
                batch = self._queue.get_nowait()
            except queue.Empty:
                break
            unsent += batch or []
        path = self.folder.path / UNSENT_FILE
        if self._append(path, map(_as_dict, unsent)):
            logger.warning("tracking server %s: not reached; %d metrics are in %s", self.uri, len(unsent), path)

    def _append(self, path: Path, rows: Iterable[dict[str, Any]]) -> bool:
        """Add lines to a file; a full disk costs them, and neither the sending thread nor a run that is done."""
        try:
            with path.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            logger.warning("%s: %s; metrics are lost", path, error.strerror or error)
            return False
        return True


def _patient(uri: str) -> str:
    """The address of a local store, with more than SQLite's 5 s for others to write."""
    is_file = uri.startswith("sqlite:///") and "?" not in uri
    return f"{uri}?timeout={LOCAL_STORE.here():.0f}" if is_file else uri


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """MLflow makes a local store's tables when it is first opened, and two processes that do so at once both fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), LOCAL_STORE.here()):
        yield


def _as_dict(metric: Metric) -> dict[str, Any]:
    return {"key": metric.key, "value": metric.value, "timestamp": metric.timestamp, "step": metric.step}
