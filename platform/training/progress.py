"""What a training run shows and records: terminal progress, ``steps.jsonl``, tracker metrics, the result."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from loomvideo.platform.console import bars, console
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.training.checkpoint_folder import checkpoints_of
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.gradients import FIGURE
from loomvideo.platform.training.hardware import peak_tflops
from loomvideo.platform.training.recipe import MODEL
from loomvideo.platform.training.validation import paired_change
from loomvideo.platform.training.writer import OTHER_WRITER

STEPS_FILE = "steps.jsonl"
VALIDATION_FILE = "validation.jsonl"
STARTS_FILE = "starts.json"
WARNINGS_FILE = "warnings.json"
COMPUTES_FILE = "computes_with.json"
DATA_FILE = "data.json"
LINE_INTERVAL_S = 10.0

Predict = Callable[[dict[str, Any]], dict[str, float]]
"""From the workers' ``ready`` report to what was planned: ``step_s`` and ``memory_gib``; empty when unknown."""


class TrainingProgress:
    """Takes the workers' reports, in order.

    A step that was reported before (work redone after a failure or a resume) is neither shown nor tracked again.

    Args:
        config: The configuration of the run.
        folder: The folder of the run; ``steps.jsonl`` is kept there.
        tracker: Gets metrics, or None.
        predict: Gives what was planned, to compare with.
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder, tracker: Any, predict: Predict | None = None):
        self.config, self.folder, self.tracker, self._predict = config, folder, tracker, predict
        self.fatal = ""
        self._console = console(stderr=True)
        self._path = folder.path / STEPS_FILE
        self._last_step = last_recorded_step(self._path)
        # Unbuffered: what a full disk does not take stays in self._unwritten and is written when there is room.
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._full = False
        self._world_size = 0
        self._started = time.monotonic()
        self._first_report_at: float | None = None
        self._ready_s = 0.0
        self._starts_before = self._num_starts = (folder.read_json(STARTS_FILE) or {"starts": 0})["starts"]
        self._peak_flops = 0.0
        self._planned: dict[str, float] = {}
        self._totals: dict[str, float] = defaultdict(float)
        self._finished: dict[str, Any] = {}
        self._latest: list[dict[str, Any]] = []
        self._tags: dict[tuple[str, str], list[float]] = {}
        self._peak_memory_bytes = 0
        # What every rank has read of object stores since its start.
        self._reading: dict[int, dict[str, int]] = {}
        self._checkpoint_age_s = 0.0
        self._failed_checkpoint = -1
        self._computes_with = folder.read_json(COMPUTES_FILE) or {}
        # Losses of the newest validation, triple by triple.
        self._validated: dict[str, list[float]] = {}
        self._last_line_at = 0.0
        self._bar = bars("figures", remaining=False, in_logs=False, on=self._console)
        self._task = self._bar.add_task("training", total=config.steps, figures="starting workers")
        self._bar.start()

    def add(self, report: dict[str, Any]) -> None:
        """Take one report."""
        getattr(self, f"_on_{report['event']}")(report)

    def close(self) -> None:
        """End the display."""
        self._bar.stop()
        self._write("")
        self._file.close()

    def say(self, text: str) -> None:
        """Show a line."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _on_ready(self, report: dict[str, Any]) -> None:
        if report["rank"]:
            return
        self._num_starts += 1
        self.folder.write_json(STARTS_FILE, {"starts": self._num_starts})
        self._world_size = report["world_size"]
        self._ready_s = time.monotonic() - self._started
        how = f"continuing at step {report['step']}" if report["step"] else "starting"
        self.say(
            f"{how}: {report['num_parameters'] / 1e6:.2f} M parameters, "
            f"{report['num_trainable'] / 1e6:.2f} M trained, {report['world_size']} workers, "
            f"{report['packs_per_step']} packs a step (ready after {self._ready_s:.1f} s)"
        )
        self._peak_flops = 1e12 * peak_tflops(report.get("device_name", ""), self.config.peak_tflops)
        self._planned = self._predict(report) if self._predict is not None else {}
        if self._planned:
            figures = ", ".join(f"{name} {value:.3g}" for name, value in self._planned.items())
            self.say(f"planned: {figures} (loomvideo plan)")
        metrics = {
            "run/starts": self._num_starts - self._starts_before,
            "run/restarts": self._num_starts - 1,
            "run/workers": report["world_size"],
        }
        self._track(metrics | {f"plan/{name}": value for name, value in self._planned.items()}, report["step"])

    def _on_steps(self, report: dict[str, Any]) -> None:
        self._peak_memory_bytes = max(self._peak_memory_bytes, report.get("memory_bytes", 0))
        for name, value, loss_sum, elements in report["tags"]:
            entry = self._tags.setdefault((name, value), [0.0, 0.0])
            entry[0] += loss_sum
            entry[1] += elements
        if report.get("reading"):
            self._reading[report["rank"]] = report["reading"]
        if report.get("warnings"):
            self._warn(report["warnings"])
        if report.get("system"):
            # Every node has its own series; the step is the newest one known here.
            figures = {f"system/{report['node']}/{name}": value for name, value in report["system"].items()}
            self._track(figures, max(self._last_step, *(record["step"] for record in report["steps"]), 0))
        if report["rank"] or not report["steps"]:
            return
        self._checkpoint_age_s = report.get("checkpoint_age_s", 0.0)
        self._note_computes(report.get("computes_with", {}))
        for record in report["steps"]:
            for name in ("step_s", "data_wait_s", "compute_s", "update_s", "tokens", "flops", "samples", "fill"):
                self._totals[name] += record[name]
            self._totals["read_s"] += record.get("read_s", 0.0)
            self._totals["steps"] += 1
            self._totals["worker_s"] += record["step_s"] * self._world_size
        self._latest = _of_model(report["steps"])[-1:] or self._latest
        self._record(report["steps"])
        self._show(report["steps"])

    def _on_recorded(self, report: dict[str, Any]) -> None:
        """Steps kept with the checkpoint that a run continues from: its workers may have outlived the driver before."""
        self._record(report["steps"])

    def _record(self, steps: list[dict[str, Any]]) -> None:
        records = [record for record in steps if record["step"] > self._last_step]
        self._write("".join(json.dumps(record) + "\n" for record in records))
        if records:
            self._last_step = records[-1]["step"]
            self._track(self._metrics(records), self._last_step)

    def _note_computes(self, computes_with: dict[str, Any]) -> None:
        """Keep what computes with the run, and say so when it is not what is on record."""
        if computes_with and computes_with != self._computes_with:
            self._computes_with = computes_with
            self.folder.write_json(COMPUTES_FILE, computes_with)
            self.say(f"computes with {json.dumps(computes_with)}")

    def _warn(self, warnings: list[str]) -> None:
        """Keep what ranks warn of with the run, and show each warning once."""
        known = self.folder.read_json(WARNINGS_FILE) or []
        fresh = [warning for warning in dict.fromkeys(warnings) if warning not in known]
        for warning in fresh:
            self.say(f"warning: {warning}")
        if fresh:
            self.folder.write_json(WARNINGS_FILE, known + fresh)
            self._track({"run/warnings": len(known) + len(fresh)}, max(self._last_step, 0))

    def _write(self, lines: str) -> None:
        """Append to the step file; a full disk delays it and does not end the run."""
        self._unwritten += lines.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._full = False
        except OSError as error:
            if not self._full:
                self.say(f"{self._path}: {error.strerror}; steps are kept and written when there is room")
            self._full = True

    def _metrics(self, records: list[dict[str, Any]]) -> dict[str, float]:
        seconds = sum(record["step_s"] for record in records)
        metrics = {
            "train/skipped_steps": sum(not record["updated"] for record in records),
            "speed/tokens_per_s": sum(record["tokens"] for record in records) / seconds,
            "speed/samples_per_s": sum(record["samples"] for record in records) / seconds,
            "speed/step_s": seconds / len(records),
            "speed/data_wait_share": sum(record["data_wait_s"] for record in records) / seconds,
            # Of records of an earlier version too.
            "speed/read_s": sum(record.get("read_s", 0.0) for record in records) / len(records),
            "checkpoint/age_s": self._checkpoint_age_s,
            "packs/fill": sum(record["fill"] for record in records) / len(records),
            "run/worker_hours": self._worker_hours(),
            "packs/imbalance": sum(record["imbalance"] for record in records) / len(records),
        }
        for role in dict.fromkeys(record.get("role", MODEL) for record in records):
            taken = [record for record in records if record.get("role", MODEL) == role]
            metrics |= {f"{_section(role)}/{name}": value for name, value in _learned(taken).items()}
        flops = sum(record["flops"] for record in records)
        if flops:
            metrics["speed/tflops_per_worker"] = flops / seconds / self._world_size / 1e12
            if self._peak_flops:
                metrics["speed/mfu"] = flops / seconds / self._world_size / self._peak_flops
        if "step_s" in self._planned:
            metrics["plan/achieved_over_predicted_speed"] = self._planned["step_s"] * len(records) / seconds
        if self._peak_memory_bytes:
            metrics["memory/peak_gib"] = self._peak_memory_bytes / 2**30
            if "memory_gib" in self._planned:
                used_gib = metrics["memory/peak_gib"]
                metrics["plan/achieved_over_predicted_memory"] = used_gib / self._planned["memory_gib"]
        for (name, value), (loss_sum, number) in self._tags.items():
            metrics[f"train/{value}" if name == FIGURE else f"loss_by_{name}/{value}"] = loss_sum / number
        self._tags = {}
        for name in next(iter(self._reading.values()), {}):
            metrics[f"reading/{name}"] = sum(read[name] for read in self._reading.values())
        return metrics

    def _show(self, records: list[dict[str, Any]]) -> None:
        last, shown = records[-1], _of_model(records) or records
        seconds = sum(record["step_s"] for record in records)
        loss = sum(record["loss"] for record in shown) / len(shown)
        left_s = (self.config.steps - last["step"]) * seconds / len(records)
        figures = (
            f"loss {loss:.4f}  lr {last['learning_rate']:.2e}  "
            f"{sum(record['tokens'] for record in records) / seconds:,.0f} tokens/s  {self._mfu(records, seconds)}"
            f"fill {sum(record['fill'] for record in records) / len(records):.0%}  "
            f"wait {sum(record['data_wait_s'] for record in records) / seconds:.1%}  "
            f"read {sum(record.get('read_s', 0.0) for record in records) / len(records):.2g} s  ETA {_clock(left_s)}"
        )
        self._bar.update(self._task, completed=last["step"], figures=figures)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line_at > LINE_INTERVAL_S or left_s == 0):
            self._last_line_at = now
            self.say(f"step {last['step']}/{self.config.steps}  {figures}")

    def _mfu(self, records: list[dict[str, Any]], seconds: float) -> str:
        if not self._peak_flops:
            return ""
        flops = sum(record["flops"] for record in records)
        return f"MFU {flops / seconds / self._world_size / self._peak_flops:.1%}  "

    def _on_validation(self, report: dict[str, Any]) -> None:
        metrics, figures = {}, []
        for weights, losses in report["losses"].items():
            metrics |= {f"validation_{weights}/{name}": loss for name, loss in losses.items() if name != "each"}
            change = paired_change(self._validated.get(weights, []), losses["each"], self.config.validation.levels)
            if change is not None:
                metrics |= {f"validation_{weights}/change": change[0], f"validation_{weights}/change_error": change[1]}
            self._validated[weights] = losses["each"]
            figures.append(
                f"{weights} {losses['loss']:.4f}" + (f" ({change[0]:+.4f} ± {change[1]:.4f})" if change else "")
            )
        with (self.folder.path / VALIDATION_FILE).open("a") as out:
            out.write(json.dumps({"step": report["step"]} | report["losses"]) + "\n")
        self._track(metrics, report["step"])
        beside = f"{report['seconds']:.1f} s" if "seconds" in report else "beside training"
        self.say(f"step {report['step']}: validation loss {', '.join(figures)} ({beside})")

    def _on_quarantine(self, report: dict[str, Any]) -> None:
        if report["rank"] == 0:
            known = self.folder.read_json("quarantine.json") or {}
            self.folder.write_json("quarantine.json", known | dict.fromkeys(report["keys"], report["step"]))
            self.say(f"step {report['step']}: loss of {', '.join(report['keys'])} is not finite; left out from now on")

    def _on_rollback(self, report: dict[str, Any]) -> None:
        if report["rank"] == 0:
            self.say(f"step {report['step']}: too many bad steps, back to the weights of step {report['to_step']}")

    def _on_checkpoint_failed(self, report: dict[str, Any]) -> None:
        # The worker that failed says why; the others only that it was not they.
        if report["message"] != OTHER_WRITER and report["step"] != self._failed_checkpoint:
            self._failed_checkpoint = report["step"]
            self.say(f"checkpoint of step {report['step']} was not written: {report['message']}; training goes on")

    def _on_checkpoint_postponed(self, report: dict[str, Any]) -> None:
        if report["rank"] == 0:
            self.say(
                f"step {report['step']}: the checkpoint before is still being written; this one follows when "
                "it is whole (a faster checkpoint.url, or a larger checkpoint.every_steps)"
            )

    def _on_checkpoint_abandoned(self, report: dict[str, Any]) -> None:
        if report["rank"] == 0:
            self.say(f"the checkpoint of step {report['step']} was given up for an urgent one")

    def _on_checkpointed(self, report: dict[str, Any]) -> None:
        if report["rank"] == 0:
            self.say(f"step {report['step']}: checkpoint written, as workers are about to change")

    def _on_data(self, report: dict[str, Any]) -> None:
        before, now = report["entries"][-2:]
        self.folder.write_json(DATA_FILE, {"entries": report["entries"]})
        joined = len(set(now["datasets"]) - set(before["datasets"]))
        changes = [f"{joined} datasets joined"] if joined else []
        changes += ["the mixture changed"] if now["mixture"] != before["mixture"] else []
        self.say(f"after step {now['step']}: {' and '.join(changes) or 'datasets changed places'} ({DATA_FILE})")

    def _on_fatal(self, report: dict[str, Any]) -> None:
        self.fatal = self.fatal or report["message"]

    def _on_alive(self, report: dict[str, Any]) -> None:
        """Nothing to show."""

    def _on_finished(self, report: dict[str, Any]) -> None:
        self._finished = report

    def _track(self, metrics: dict[str, float], step: int) -> None:
        if self.tracker is not None:
            self.tracker.log_metrics(metrics, step)

    def result(self) -> dict[str, Any]:
        """Main figures of the run so far, for ``result.json``."""
        seconds, steps = self._totals["step_s"], max(1.0, self._totals["steps"])
        return {
            "steps": self._finished.get("steps", self._last_step),
            "first_step": self._finished.get("first_step", 0),
            "stopped": self._finished.get("stopped", ""),
            "loss": self._latest[0]["loss"] if self._latest else float("nan"),
            "start_s": self._ready_s,
            "train_s": seconds,
            "step_s": seconds / steps,
            "worker_hours": self._worker_hours(),
            "tokens_per_s": self._totals["tokens"] / seconds if seconds else 0.0,
            **self._result_mfu(seconds),
            "data_wait_share": self._totals["data_wait_s"] / seconds if seconds else 0.0,
            "read_s": self._totals["read_s"] / steps,
            "overhead_share": 1.0 - (self._totals["compute_s"] + self._totals["update_s"]) / seconds
            if seconds
            else 0.0,
            "fill": self._totals["fill"] / steps,
            "restarts": self._num_starts - 1,
            "checkpoints": checkpoints_of(self.config.checkpoint, self.folder),
        }

    def _worker_hours(self) -> float:
        """Hours times workers of this attempt, its start included: GPU hours where workers have a GPU each."""
        return (self._totals["worker_s"] + self._ready_s * self._world_size) / 3600

    def _result_mfu(self, seconds: float) -> dict[str, float]:
        if not (self._peak_flops and seconds):
            return {}
        return {"mfu": self._totals["flops"] / seconds / self._world_size / self._peak_flops}


def _of_model(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record.get("role", MODEL) == MODEL]


def _section(role: str) -> str:
    return "train" if role == MODEL else f"train_{role}"


def _learned(records: list[dict[str, Any]]) -> dict[str, float]:
    """What the turns of one role say of its learning."""
    elements = sum(record["elements"] for record in records)
    return {
        "loss": sum(record["loss"] * record["elements"] for record in records) / elements,
        "gradient_norm": max(record["grad_norm"] for record in records),
        "learning_rate": records[-1]["learning_rate"],
    }


def last_recorded_step(path: Any) -> int:
    """The last step in a ``steps.jsonl``; 0 without one. A torn last line is ignored."""
    if not path.is_file():
        return 0
    last = 0
    for line in path.read_text().splitlines():
        try:
            last = max(last, json.loads(line)["step"])
        except ValueError:
            continue
    return last


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
