"""The accounts of a prepare job: every input sample's fate, the ledger of losses, and when losses are too many."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.inputs import Inputs
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.manifest import QUARANTINE_FILE

QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "dataset", "outcome", "stage", "reason")]
    + [("retriable", pa.bool_())]
    + [(name, pa.string()) for name in ("message", "sample")]
)
# Reasons that another attempt may not meet again: of files, of our own code, and of a model that was asked for texts.
# `judge_error` is what earlier releases wrote for `assess_error`.
RETRIABLE = (
    "missing_file", "timeout", "download_failed", "decoder_crash", "encode_error", "assess_error", "judge_error",
    "unreachable", "server_error", "rate_limited", "empty", "invalid_answer", "mixed_up",
)  # fmt: skip


def is_retriable(outcome: Mapping[str, Any]) -> bool:
    """Whether another attempt may write the sample of an outcome."""
    return outcome["outcome"] == "quarantined" and outcome["reason"] in RETRIABLE


def count_outcomes(inputs: Inputs, outcomes: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """``{dataset: {inputs, written, filtered, duplicates, quarantined}}``."""
    empty = {"inputs": 0, "written": 0, "filtered": 0, "duplicates": 0, "quarantined": 0}
    counts: dict[str, dict[str, int]] = {}
    for entry in [*({"dataset": s.dataset} for s in inputs.samples), *inputs.rejected]:
        counts.setdefault(entry["dataset"], dict(empty))["inputs"] += 1
    for outcome in outcomes:
        count = counts[outcome["dataset"]]
        count[outcome["outcome"]] = count.get(outcome["outcome"], 0) + 1
    return counts


def quarantine_table(losses: Iterable[Mapping[str, Any]], samples: Mapping[str, Sample]) -> pa.Table:
    """The ledger: a row a sample that was not written, with the sample where it is known."""
    rows = [
        {
            **{name: loss[name] for name in ("key", "dataset", "outcome", "stage", "reason", "message")},
            "retriable": is_retriable(loss),
            "sample": loss.get("sample") or (samples[loss["key"]].to_json() if loss["key"] in samples else None),
        }
        for loss in losses
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def check_losses(losses: list[dict[str, Any]], num_inputs: int, config: PrepareConfig) -> None:
    """Fail when one reason quarantines more than ``limits.max_loss`` of the inputs.

    Raises:
        UserError: naming the reason, its count and the first case.
    """
    by_reason = Counter(loss["reason"] for loss in losses if loss["outcome"] == "quarantined")
    for reason, count in by_reason.most_common():
        if count > config.limits.max_loss * num_inputs:
            example = next(loss["message"] for loss in losses if loss["reason"] == reason)
            raise UserError(
                f"{count} of {num_inputs} samples were lost to {reason} (limits.max_loss={config.limits.max_loss:g}); "
                f"first: {example.strip().splitlines()[-1][:200]}; all are in {config.output}/{QUARANTINE_FILE}"
            )
