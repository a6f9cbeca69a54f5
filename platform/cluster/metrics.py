"""Figures of a running job as Prometheus metrics, through Ray's own exporter on the driver's node.

The registry below is the one list of what we export; dashboards and alerts are tested against it. Ray prefixes every
name with ``ray_`` and its exporter adds node and cluster labels. Figures of nodes (``system/…``) stay with the tracker:
Ray exports its own.
"""

import time
from dataclasses import dataclass
from typing import Any, Protocol

PREFIX = "loomvideo_"


@dataclass(frozen=True)
class ExportedGauge:
    """One exported gauge.

    Attributes:
        name: Without prefixes.
        help: What Prometheus shows of it.
        label: Name of the label that a family's last part becomes; empty for a single figure.
    """

    name: str
    help: str
    label: str = ""


# The tracker's names and what they are exported as.
SINGLE = {
    "train/loss": ExportedGauge("train_loss", "Mean loss of the steps since the last report"),
    "train/gradient_norm": ExportedGauge("train_gradient_norm", "Largest gradient norm since the last report"),
    "train/learning_rate": ExportedGauge("train_learning_rate", "Learning rate"),
    "train/skipped_steps": ExportedGauge("train_skipped_steps", "Steps without update since the last report"),
    "speed/tokens_per_s": ExportedGauge("tokens_per_second", "Trained tokens a second, all workers"),
    "speed/samples_per_s": ExportedGauge("samples_per_second", "Trained samples a second, all workers"),
    "speed/step_s": ExportedGauge("step_seconds", "Duration of a step"),
    "speed/data_wait_share": ExportedGauge("data_wait_share", "Share of a step spent waiting for data"),
    "speed/read_s": ExportedGauge("read_seconds", "Seconds of loader threads reading a step's samples"),
    "speed/tflops_per_worker": ExportedGauge("tflops_per_worker", "Model TFLOP/s a worker, without recomputation"),
    "speed/mfu": ExportedGauge("mfu", "Model FLOPs utilisation: share of the accelerators' dense bf16 peak"),
    "checkpoint/age_s": ExportedGauge("checkpoint_age_seconds", "Seconds since the newest whole checkpoint"),
    "plan/achieved_over_predicted_speed": ExportedGauge("speed_over_plan", "Speed over what loomvideo plan predicts"),
    "plan/achieved_over_predicted_memory": ExportedGauge(
        "memory_over_plan", "Peak memory over what loomvideo plan predicts"
    ),
    "packs/fill": ExportedGauge("pack_fill", "Used share of the token budget"),
    "packs/imbalance": ExportedGauge("pack_imbalance", "Largest pack over the mean one"),
    "memory/peak_gib": ExportedGauge("memory_peak_gib", "Peak accelerator memory of a worker"),
    "run/starts": ExportedGauge("run_starts", "Times the workers were started in this attempt"),
    "run/restarts": ExportedGauge("run_restarts", "Times the workers were started again in the run's whole life"),
    "run/warnings": ExportedGauge("run_warnings", "Different warnings of the run so far"),
    "run/workers": ExportedGauge("run_workers", "Workers in the process group"),
    "run/worker_hours": ExportedGauge("run_worker_hours", "Hours times workers of this attempt, its start included"),
}
FAMILIES = {
    "loss_by_task": ExportedGauge("loss_by_task", "Mean loss by task", "task"),
    "reading": ExportedGauge("reading", "What all workers asked of object stores since their start", "figure"),
    "plan": ExportedGauge("planned", "What loomvideo plan predicts", "figure"),
    "loss_by_noise": ExportedGauge(
        "loss_by_noise", "Mean loss by quarter of the timesteps, 0 the least noise", "noise"
    ),
}
STEP = ExportedGauge("train_step", "Last reported step")
REPORTED_AT = ExportedGauge("reported_at_seconds", "Unix time of the last report")
RUN_LABELS = ("job", "run")


def registry() -> dict[str, ExportedGauge]:
    """All exported metrics by their Prometheus name."""
    metrics = [*SINGLE.values(), *FAMILIES.values(), STEP, REPORTED_AT]
    return {f"ray_{PREFIX}{metric.name}": metric for metric in metrics}


def exported(name: str) -> tuple[ExportedGauge, dict[str, str]] | None:
    """The exported metric of a tracker's name with its own label, or None when it is not exported."""
    if name in SINGLE:
        return SINGLE[name], {}
    family, _, value = name.rpartition("/")
    if family in FAMILIES:
        return FAMILIES[family], {FAMILIES[family].label: value}
    return None


class MetricsLog(Protocol):
    """What takes a run's figures; ``platform.tracking.Tracker`` is one."""

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log numbers of a step."""
        ...


class ExportingTracker:
    """Passes a run's figures on to its tracker and shows the newest to Prometheus.

    Args:
        tracker: Gets every figure, exported or not.
        job: Value of the label ``job``.
        run: Value of the label ``run``.
    """

    def __init__(self, tracker: MetricsLog, job: str, run: str):
        self.tracker = tracker
        self._labels = {"job": job, "run": run}
        self._gauges: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log numbers of a step."""
        self.tracker.log_metrics(metrics, step)
        for name, value in metrics.items():
            found = exported(name)
            if found:
                self._set(found[0], value, found[1])
        self._set(STEP, step, {})
        self._set(REPORTED_AT, time.time(), {})

    def _set(self, metric: ExportedGauge, value: float, labels: dict[str, str]) -> None:
        from ray.util.metrics import Gauge

        if metric.name not in self._gauges:
            keys = RUN_LABELS + ((metric.label,) if metric.label else ())
            self._gauges[metric.name] = Gauge(PREFIX + metric.name, metric.help, tag_keys=keys)
        self._gauges[metric.name].set(float(value), tags=self._labels | labels)
