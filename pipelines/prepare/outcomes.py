"""What came of a sample: the one form in which every stage says it, and which of it another attempt may change."""

import dataclasses
from typing import Any

from loomvideo.pipelines.sources.samples import Sample

# Reasons that another attempt may not meet again: of files, of our own code, and of a model that was asked for texts.
# `judge_error` is what earlier releases wrote for `assess_error`.
RETRIABLE = (
    "missing_file", "timeout", "download_failed", "decoder_crash", "encode_error", "assess_error", "judge_error",
    "growing", "repeated_crash", "unreachable", "server_error", "rate_limited", "empty", "invalid_answer", "mixed_up",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The fate of one sample that is not written.

    Attributes:
        key: The key of the sample, or where in the input the line stands that is none.
        dataset: The dataset that it counts for.
        outcome: ``filtered``, ``duplicates``, ``quarantined`` or ``removed``.
        stage: The stage that decided it.
        reason: Its code.
        message: One line for a person, or the trace of an error.
        sample: JSON of the sample where it is known and not in the plan any more.
        where: Node and device of the worker, where a worker decided.
    """

    key: str
    dataset: str
    outcome: str
    stage: str
    reason: str
    message: str
    sample: str | None = None
    where: str = ""

    @staticmethod
    def of(sample: Sample, outcome: str, stage: str, reason: str, message: str) -> "Outcome":
        """What came of a sample, which is kept with it."""
        return Outcome(sample.key, sample.dataset, outcome, stage, reason, message, sample.to_json())

    @property
    def retriable(self) -> bool:
        """Whether another attempt may write the sample."""
        return self.outcome == "quarantined" and self.reason in RETRIABLE

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)
