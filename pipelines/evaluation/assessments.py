"""Judge answers where people review them: MLflow traces with assessments.

A trace is one judged sample. Its input is the instruction, its output the filmstrip of the result; every score of the
judge is an assessment with the judge's reasons. What a person adds there under :data:`HUMAN_SCORE` is read back and
compared with the judge.
"""

import base64
import io
import logging
from collections.abc import Sequence
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import AssessmentSource, AssessmentSourceType, NoOpSpan
from mlflow.tracking import MlflowClient
from PIL import Image

from loomvideo.pipelines.evaluation.aggregate import sample_values
from loomvideo.pipelines.evaluation.stages import MODEL, STRIP, Row
from loomvideo.pipelines.evaluation.store import Store, content_key
from loomvideo.platform.errors import UserError
from loomvideo.platform.registry import default_uri

logger = logging.getLogger(__name__)

HUMAN_SCORE = "score"
"""The assessment that a person adds: 1 to 5, as in the labelled sheet."""

MAX_STRIP_WIDTH = 960
_SAMPLE, _CONTENT = "loomvideo.sample", "loomvideo.judgement"


def log_judgements(
    client: MlflowClient, experiment_id: str, run_id: str, store: Store, rows: Sequence[Row], judge: str
) -> int:
    """Log each judged row as a trace of the run; one that is there with the same answers is left alone.

    Args:
        client: The client of the tracking server.
        experiment_id: The experiment of the run.
        run_id: The run of the suite.
        store: Where filmstrips are.
        rows: Finished rows of one suite.
        judge: Which judge answered, shown as the source.

    Returns:
        How many traces were added.

    Raises:
        MlflowException: if the server refuses.
    """
    judged = [row for row in rows if row["series"] == MODEL and not row["failure"] and row.get("judgements")]
    known = {trace.info.tags.get(_CONTENT) for trace in _traces(client, experiment_id, run_id)} if judged else set()
    source = AssessmentSource(AssessmentSourceType.LLM_JUDGE, judge or "judge")
    added: list[tuple[str, Row]] = []
    # Spans go to the default server, whatever a client was made for.
    with default_uri(client.tracking_uri):
        for row in judged:
            content = content_key([row["key"], row["media"], [j["parsed"] for j in row["judgements"]]])[:16]
            if content in known:
                continue
            span = client.start_trace(
                row["key"],
                inputs={"messages": [_message("user", row["item"]["text"])]},
                tags={_SAMPLE: row["key"], _CONTENT: content, "category": row["item"]["category"]},
                experiment_id=experiment_id,
                run_id=run_id,
            )
            if isinstance(span, NoOpSpan):
                logger.warning("%s: MLflow's tracing is off, judge answers are in rows.jsonl alone", row["suite"])
                return 0
            client.end_trace(span.trace_id, outputs={"messages": [_message("assistant", "", _strip(store, row))]})
            added.append((span.trace_id, row))
        mlflow.flush_trace_async_logging()
        for trace_id, row in added:
            reasons = "\n\n".join(j["parsed"]["reasoning"] for j in row["judgements"] if j["parsed"]["reasoning"])
            failures = sorted({j["parsed"]["failure"] for j in row["judgements"] if j["parsed"]["failure"]})
            if failures:
                mlflow.log_feedback(trace_id=trace_id, name="judge_failure", value=", ".join(failures), source=source)
            for name, value in sample_values(row).items():
                if name.split("/")[0] in (row["judged"], f"{row['judged']}_min") and not np.isnan(value):
                    mlflow.log_feedback(trace_id=trace_id, name=name, value=value, source=source, rationale=reasons)
    return len(added)


def human_scores(client: MlflowClient, experiment_id: str, run_id: str) -> dict[str, float]:
    """Scores that people gave to samples of a run in MLflow, averaged over people; the newest of each counts.

    Raises:
        UserError: for a score that is no number from 1 to 5.
    """
    found: dict[str, dict[str, float]] = {}
    for trace in _traces(client, experiment_id, run_id):
        key = trace.info.tags.get(_SAMPLE)
        people = [a for a in trace.info.assessments if a.name == HUMAN_SCORE and a.source.source_type == "HUMAN"]
        for given in sorted(people, key=lambda a: a.last_update_time_ms):
            if key is None or not given.valid:
                continue
            try:
                score = float(given.feedback.value)
            except (TypeError, ValueError):
                score = float("nan")
            if not 1 <= score <= 5:
                raise UserError(
                    f"{key}: {given.source.source_id} gave {HUMAN_SCORE} {given.feedback.value!r} in MLflow, not 1 to 5"
                )
            found.setdefault(key, {})[given.source.source_id] = score
    return {key: float(np.mean(list(scores.values()))) for key, scores in found.items()}


def _traces(client: MlflowClient, experiment_id: str, run_id: str) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_traces(
            locations=[experiment_id], run_id=run_id, include_spans=False, max_results=500, page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _message(role: str, text: str, picture: str = "") -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    if picture:
        parts.append({"type": "image_url", "image_url": {"url": picture}})
    return {"role": role, "content": parts}


def _strip(store: Store, row: Row) -> str:
    """The filmstrip as a data URL: MLflow shows it inside the trace."""
    strip = Image.open(store.entry("media", row["media"]) / STRIP).convert("RGB")
    strip.thumbnail((MAX_STRIP_WIDTH, MAX_STRIP_WIDTH))
    content = io.BytesIO()
    strip.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
