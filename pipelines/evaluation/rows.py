"""The row of an evaluation: one sample in one series, to which every stage adds what it found.

Rows are dictionaries, since they travel between actors and lie on disk as JSON. Their types name what is in them.
"""

from typing import Any, NotRequired, TypedDict

from loomvideo.pipelines.evaluation.suites.items import EvalItem

MODEL, IDENTITY = "model", "identity"
"""The series of the model under test, and of sources copied; those of controls are in ``controls``."""


class ItemFields(TypedDict):
    """An :class:`~loomvideo.pipelines.evaluation.suites.items.EvalItem` as JSON."""

    suite: str
    key: str
    task: str
    category: str
    text: str
    source: str | None
    references: list[str]
    target: str | None
    mask: str | None
    cluster: str
    aligned: bool
    extra: dict[str, Any]


class ParsedFields(TypedDict):
    """A :class:`~loomvideo.pipelines.evaluation.suites.parsers.Parsed` as JSON; earlier runs kept no ``answers``."""

    sample: float | None
    scores: dict[str, float]
    minimum: float | None
    failure: str
    reasoning: str
    answers: NotRequired[dict[str, float]]


class JudgementFields(TypedDict):
    """A :class:`~loomvideo.pipelines.evaluation.judges.session.Judgement` as JSON."""

    parsed: ParsedFields
    reply: str
    model: str
    cached: bool
    tokens_in: int
    tokens_out: int
    cost_usd: float
    latency_s: float


class Row(TypedDict):
    """One sample in one series; each stage adds its part, unless the sample has failed before it.

    Attributes:
        suite: Benchmark.
        key: The sample, unique in its suite.
        series: ``model``, ``identity`` or a control.
        item: What is asked for.
        root: Folder that relative media paths start from.
        seed: The seed of the noise.
        failure: Why the sample has no result; empty while it has not failed.
        detail: The error behind a failure.
        inputs: Key of the prepared media in the store.
        result: Key of the generated video in the store; ``identity`` for a copied source.
        generate_s: Seconds of generating.
        pixels: Hash of the generated pixels.
        media: Key of the playable files in the store.
        metrics: Figures by metric; None where a metric has no value for this sample.
        defects: Plain faults of the result.
        features: Key of the features that learned metrics kept; empty without any.
        measured: Key of the measurement in the store.
        judgements: What the judge said, a repeat each.
        judged: The scale on which the sample was to be judged.
    """

    suite: str
    key: str
    series: str
    item: ItemFields
    root: str
    seed: int
    failure: str
    detail: NotRequired[str]
    inputs: NotRequired[str]
    result: NotRequired[str]
    generate_s: NotRequired[float]
    pixels: NotRequired[str]
    media: NotRequired[str]
    metrics: NotRequired[dict[str, float | None]]
    defects: NotRequired[list[str]]
    features: NotRequired[str]
    measured: NotRequired[str]
    judgements: NotRequired[list[JudgementFields]]
    judged: NotRequired[str]


class InputsRecord(TypedDict):
    """What the store records of prepared media.

    Attributes:
        size: ``[width, height]``.
        num_frames: Frames of what is generated.
        fps: Their rate.
        frame_indices: Frames of the file that were taken.
        references: Number of reference pictures.
        has: Which of ``source``, ``target`` and ``mask`` there are.
    """

    size: list[int]
    num_frames: int
    fps: float
    frame_indices: list[int]
    references: int
    has: list[str]


def item_of(row: Row) -> EvalItem:
    """The manifest item of a row."""
    fields: dict[str, Any] = {**row["item"], "references": tuple(row["item"]["references"])}
    return EvalItem(**fields)
