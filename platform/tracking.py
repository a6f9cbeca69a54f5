"""Experiment tracking in MLflow: one run a job, owned by the driver and resumed by run name.

Metrics are queued and sent by a background thread, so that a slow or absent tracking server never stops training:
what cannot be sent is retried, and what is still unsent at the end is kept in the run folder. Files are in the run
folder anyway: a server that is away costs their copies, not the job.
"""

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking import MlflowClient

from loomvideo.platform.runs import RunFolder

logger = logging.getLogger(__name__)

MAX_PARAM_CHARACTERS = 6000
BATCH_SIZE = 500
RETRY_INTERVAL_S = 5.0


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
        self._client = MlflowClient(tracking_uri=self.uri)
        self.experiment_id = self._open_experiment(experiment or f"loomvideo/{folder.job}")
        self.run_id = self._open_run(tags or {}, parent_run_id)
        self._queue: queue.Queue[list[Metric] | None] = queue.Queue()
        self._warned = False
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

    def _open_run(self, tags: dict[str, str], parent_run_id: str | None) -> str:
        known = self.folder.read_json("mlflow.json")
        if known and known["tracking_uri"] == self.uri:
            self._client.update_run(known["run_id"], status="RUNNING")
            for key, value in tags.items():
                self._client.set_tag(known["run_id"], key, value)
            return known["run_id"]
        tags = tags | {"loomvideo.run_folder": str(self.folder.path)}
        if parent_run_id:
            tags["mlflow.parentRunId"] = parent_run_id
        run = self._client.create_run(self.experiment_id, run_name=self.folder.name, tags=tags)
        self.folder.write_json("mlflow.json", {"tracking_uri": self.uri, "run_id": run.info.run_id})
        return run.info.run_id

    def log_params(self, params: dict[str, Any]) -> None:
        """Log parameters; ones that a resumed run already has keep their first value, changes become tags."""
        present = self._client.get_run(self.run_id).data.params
        values = {key: str(value)[:MAX_PARAM_CHARACTERS] for key, value in params.items()}
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
        """Queue metrics for sending; returns at once."""
        now_ms = int(time.time() * 1000)
        batch = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
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

    def log_text(self, text: str, name: str) -> None:
        """Upload a text as a file; a warning when the server is away."""
        with self._while_away(f"{name} is not copied there"):
            self._client.log_text(self.run_id, text, name)

    def finish(self, status: str = "FINISHED", timeout_s: float = 30.0) -> None:
        """Send what is queued and end the run as ``FINISHED``, ``FAILED`` or ``KILLED``.

        Metrics that cannot be sent within ``timeout_s`` are written to ``unsent_metrics.jsonl`` in the run folder.
        """
        self._queue.put(None)
        self._sender.join(timeout_s)
        if self._sender.is_alive():
            self._spool()
            return
        with self._while_away(f"the run does not learn that it is {status}"):
            self._client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def _while_away(self, consequence: str) -> Iterator[None]:
        """Warn of a server that does not answer; one that answers and refuses, or a broken local store, is an error."""
        try:
            yield
        except (RestException, requests.HTTPError):
            raise
        except (MlflowException, OSError) as error:
            if not self.uri.startswith("http"):
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
        while True:
            try:
                for start in range(0, len(batch), BATCH_SIZE):
                    self._client.log_batch(self.run_id, metrics=batch[start : start + BATCH_SIZE])
                break
            except (MlflowException, OSError) as error:
                if not self._warned:
                    logger.warning("tracking server %s: %s; metrics are kept and retried", self.uri, error)
                    self._warned = True
                time.sleep(RETRY_INTERVAL_S)
        self._pending = []
        if self._warned:
            logger.warning("tracking server %s: reached again, kept metrics were sent", self.uri)
            self._warned = False

    def _spool(self) -> None:
        unsent = list(self._pending)
        while True:
            try:
                batch = self._queue.get_nowait()
            except queue.Empty:
                break
            unsent += batch or []
        path = self.folder.path / "unsent_metrics.jsonl"
        with path.open("a") as out:
            out.writelines(
                json.dumps({"key": m.key, "value": m.value, "timestamp": m.timestamp, "step": m.step}) + "\n"
                for m in unsent
            )
        logger.warning("tracking server %s: not reached; %d metrics are in %s", self.uri, len(unsent), path)
