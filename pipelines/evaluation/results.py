"""A finished evaluation on disk: ``suites/<suite>/rows.jsonl`` and ``figures.json`` of a run folder."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loomvideo.pipelines.evaluation.aggregate import Figure, SuiteResult, sample_values
from loomvideo.pipelines.evaluation.rows import MODEL, Row, item_of
from loomvideo.platform.errors import UserError, full_disk_named


@dataclass(frozen=True)
class SavedSuite:
    """One suite of a finished run.

    Attributes:
        suite: Benchmark.
        header: Manifest digest, judge, prompt set, status and the like.
        rows: Finished rows of both series.
        figures: The model's means.
    """

    suite: str
    header: dict[str, Any]
    rows: list[Row]
    figures: list[Figure]

    def values(self) -> dict[str, dict[str, float]]:
        """Values of each of the model's samples, by key."""
        return {row["key"]: sample_values(row) for row in self.rows if row["series"] == MODEL}

    def units(self) -> dict[str, str]:
        """The unit of resampling of each sample."""
        return {row["key"]: item_of(row).unit for row in self.rows if row["series"] == MODEL}

    def categories(self) -> dict[str, str]:
        """The category of each sample."""
        return {row["key"]: row["item"]["category"] for row in self.rows if row["series"] == MODEL}


def suite_folder(run: Path, suite: str) -> Path:
    """Where a run keeps a suite."""
    return run / "suites" / suite


def save_suite(run: Path, result: SuiteResult, rows: list[Row], header: dict[str, Any]) -> Path:
    """Write a suite's rows and figures, each through a temporary name; returns its folder."""
    folder = suite_folder(run, result.suite)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: (row["series"] != MODEL, row["key"]))
    _write(folder / "rows.jsonl", "".join(json.dumps(clean(row), ensure_ascii=False) + "\n" for row in ordered))
    header = header | {"suite": result.suite, "status": result.status}
    content = {"header": header, "result": dataclasses.asdict(result)}
    _write(folder / "figures.json", json.dumps(clean(content), indent=1, ensure_ascii=False))
    return folder


def load_suites(run: Path) -> dict[str, SavedSuite]:
    """Every suite of a run folder.

    Raises:
        UserError: if it is not a finished evaluation.
    """
    found = {}
    for path in sorted(run.glob("suites/*/figures.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        with (path.parent / "rows.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        figures = [Figure(**{k: _nan(v) for k, v in figure.items()}) for figure in content["result"]["figures"]]
        found[path.parent.name] = SavedSuite(path.parent.name, content["header"], rows, figures)
    if not found:
        raise UserError(f"{run}: not a finished evaluation (no suites/*/figures.json)")
    return found


def clean(value: Any) -> Any:
    """The value with NaN and infinities as null, which JSON has."""
    if isinstance(value, dict):
        return {key: clean(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def _nan(value: Any) -> Any:
    return float("nan") if value is None else value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    with full_disk_named(path, partial):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
