"""What travels between the driver and workers of a stage: a unit's work, its samples, and what came of it."""

from typing import NotRequired, TypedDict


class WorkRow(TypedDict):
    """What a worker is told: its unit, where its samples are listed, and what lies there from before.

    Attributes:
        unit: Name.
        split: The split of a shard.
        recipe: The recipe of the result.
        part: File of the plan.
        group: Row group in it.
        before: File names of earlier results of the unit, newest recipe unknown.
        moved: JSON ``{unit: file name}`` of results that hold samples which lie elsewhere now.
        run: The run of the prepare, so that what an earlier one left is told apart.
    """

    unit: str
    split: str
    recipe: str
    part: str
    group: int
    before: list[str]
    moved: str
    run: str


class PlannedRow(TypedDict):
    """A sample of a unit, as a plan lists it.

    Attributes:
        unit: Name of the unit.
        slot: The sample's place in it.
        was: The unit that holds it from before, where that is another one.
        key: The sample's key.
        dataset: The dataset that it counts for.
        split: Its split.
        num_bytes: Its estimated size.
        sample: JSON of the sample.
        media: JSON of what is known of its files.
        assessed: JSON of what curation found.
    """

    unit: str
    slot: int
    was: str | None
    key: str
    dataset: str
    split: str
    num_bytes: int
    sample: str
    media: str
    assessed: str


class UnitReport(TypedDict):
    """What a worker says of a unit that it has worked through, for progress and for what ends a run early.

    Attributes:
        stage: Name of the stage.
        unit: Name of the unit.
        assessed: Samples that were assessed.
        decoded: How many of them had their files decoded.
        captioned: Samples that have an answer.
        judged: Samples that a model scored.
        asked: How many of either a model answered.
        written: Samples in the shard.
        lost: Planned samples that are not in it.
        num_bytes: Size of the shard.
        wait_s: Seconds in which the encoders waited for decoded samples.
        encode_s: Seconds spent encoding.
        hold_s: Seconds in which the encoders waited for the writer.
        load_s: Seconds that decoders took for the shard's samples.
        decoders: Decoders that the builder had at the end.
        wall_s: Seconds of the whole unit.
        feature_error: The largest relative error of a layer's stored states.
        members: How many members were made and kept, as ``made.NAME`` and ``kept.NAME``; Ray fills what another
            unit has with None.
        lost_by_reason: Quarantined samples by reason, likewise.
        fault: The error of a device that failed; empty for a unit that is done.
        handed_back: Whether it failed in another unit, and this one was not tried.
        where: Node and device of the worker.
    """

    stage: str
    unit: str
    assessed: NotRequired[int]
    decoded: NotRequired[int]
    captioned: NotRequired[int]
    judged: NotRequired[int]
    asked: NotRequired[int]
    written: NotRequired[int]
    lost: NotRequired[int]
    num_bytes: NotRequired[int]
    wait_s: NotRequired[float]
    encode_s: NotRequired[float]
    hold_s: NotRequired[float]
    load_s: NotRequired[float]
    decoders: NotRequired[int]
    wall_s: NotRequired[float]
    feature_error: NotRequired[float]
    members: NotRequired[dict[str, int | None]]
    lost_by_reason: NotRequired[dict[str, int | None]]
    fault: NotRequired[str]
    handed_back: NotRequired[bool]
    where: NotRequired[str]
