"""Dashboards and alerts ask only for metrics that exist: ours by the registry, Ray's by its own dashboards."""

import json
import re
from pathlib import Path

import pytest
import yaml

from loomvideo.platform.cluster import render
from loomvideo.platform.cluster.metrics import FAMILIES, SINGLE, ExportingTracker, exported, registry
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.progress import TrainingProgress

MONITORING = Path(__file__).parents[2] / "infra" / "kubernetes" / "monitoring"
METRIC = re.compile(r"\b(?:ray|autoscaler|loomvideo|mlflow|process|go)_[a-zA-Z0-9_]+\b")
# Labels that look like metrics to the expression above.
LABELS = {"ray_io_cluster", "ray_train_run_name"}


def queries():
    for path in sorted((MONITORING / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.name}: variable {variable['name']}", variable["query"]
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


def metrics_in(query):
    return set(METRIC.findall(query)) - LABELS


@pytest.fixture(scope="module")
def ray_metrics():
    import ray

    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return set(METRIC.findall("\n".join(path.read_text() for path in folder.glob("*_panels.py"))))


def test_every_query_names_metrics_that_exist(ray_metrics):
    known = ray_metrics | registry().keys()
    all_queries = list(queries())
    assert len(all_queries) > 30
    unknown = {where: metrics_in(query) - known for where, query in all_queries}
    assert {where: names for where, names in unknown.items() if names} == {}
    assert all(metrics_in(query) for _, query in all_queries)


def test_every_metric_of_ours_is_shown():
    shown = set().union(*(metrics_in(query) for _, query in queries()))
    assert registry().keys() - shown <= {"ray_loomvideo_samples_per_second"}


def test_labels_in_our_queries_exist():
    ours = registry()
    for where, query in queries():
        for name in metrics_in(query) & ours.keys():
            for labels in re.findall(rf"{name}{{([^}}]*)}}", query):
                used = set(re.findall(r"(\w+)=", labels))
                assert used <= {"job", "run", ours[name].label}, where


class Log:
    def __init__(self):
        self.metrics = {}

    def log_metrics(self, metrics, step=0):
        self.metrics |= metrics


def test_training_emits_exactly_the_registered_names(tmp_path):
    log = Log()
    config = TrainingConfig(peak_tflops=1.0)
    planned = {"step_s": 1.0, "memory_gib": 1.0}
    progress = TrainingProgress(config, RunFolder.open(tmp_path, "pretrain", "a"), log, lambda report: planned)
    names = ("step_s", "data_wait_s", "compute_s", "update_s", "tokens", "flops", "samples", "fill", "imbalance")
    record = dict.fromkeys((*names, "loss", "elements", "grad_norm", "learning_rate"), 1.0)
    ready = {"rank": 0, "step": 0, "world_size": 2, "num_parameters": 1, "num_trainable": 1, "packs_per_step": 1}
    steps = [record | {"step": 1, "updated": True}]
    tags = [("task", "t2v", 1.0, 2.0), ("noise", "3", 1.0, 2.0)]
    state = {"reading": {"requests": 3}, "node": "n", "system": {"cpu_percent": 1.0}, "warnings": ["slow"]}
    progress.add(ready | {"event": "ready"})
    progress.add({"event": "steps", "rank": 0, "memory_bytes": 2**30, "tags": tags, "steps": steps} | state)
    progress.close()
    families = {name.rpartition("/")[0] for name in log.metrics if exported(name) and name not in SINGLE}
    # Ray exports the state of its nodes itself.
    assert {name for name in log.metrics if exported(name) is None} == {"system/n/cpu_percent"}
    assert families == FAMILIES.keys()
    assert SINGLE.keys() <= log.metrics.keys()


def test_figures_reach_tracker_and_exporter(monkeypatch):
    shown = {}

    class Gauge:
        def __init__(self, name, help, tag_keys):
            self.name, self.tag_keys = name, tag_keys

        def set(self, value, tags):
            assert set(tags) == set(self.tag_keys)
            shown[self.name, tuple(sorted(tags.items()))] = value

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    log = Log()
    figures = {"train/loss": 0.5, "loss_by_task/t2v": 0.25, "heldout/psnr": 30.0}
    ExportingTracker(log, "pretrain", "a").log_metrics(figures, step=7)
    assert log.metrics == figures
    run = (("job", "pretrain"), ("run", "a"))
    assert shown["loomvideo_train_loss", run] == 0.5
    assert shown["loomvideo_loss_by_task", (*run, ("task", "t2v"))] == 0.25
    assert shown["loomvideo_train_step", run] == 7
    assert len(shown) == 4


@pytest.mark.skipif(render.find_kubectl() is None, reason="needs kubectl")
def test_monitoring_builds_with_both_dashboards():
    objects = render.build(MONITORING)
    dashboards = next(o for o in objects if o["kind"] == "ConfigMap")
    assert {json.loads(text)["uid"] for text in dashboards["data"].values()} == {
        "loomvideo-training",
        "loomvideo-cluster",
    }
    assert sorted(o["kind"] for o in objects) == ["ConfigMap", "PodMonitor", "PodMonitor", "PrometheusRule"]
