"""The rows of the gallery: every sample that was written, in the order of the index, then every one that was not.

Written samples come from the index and their texts from the plan, shard by shard: both are in the same order, so no
more than a shard's part of the plan is held. Left-out samples come from the ledger.
"""

import json
from collections.abc import Iterator
from typing import Any, TypedDict

from loomvideo.pipelines.prepare.curate import assessments
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.pipelines.prepare.quarantine import ledger
from loomvideo.pipelines.prepare.stages import ASSESS, ENCODE
from loomvideo.pipelines.prepare.units import PlannedUnits, planned_files
from loomvideo.platform.shards.commits import commits, read_all
from loomvideo.platform.shards.index import SCORE_PREFIX
from loomvideo.platform.shards.manifest import QUARANTINE_FILE
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.storage import Storage

WRITTEN = "written"
# Long prompts are cut: what a card and the view of one sample can show.
_TEXT_CHARACTERS = 2000
_MESSAGE_CHARACTERS = 400
_FIELDS = (
    "key", "dataset", "task", "split", "group", "licence", "width", "height", "num_frames", "fps",
    "media_target", "media_source", "media_references",
)  # fmt: skip


class GalleryRow(TypedDict):
    """A sample as the gallery shows it.

    Attributes:
        key: The key of the sample, or where in the input the line stands that is none.
        dataset: The dataset that it counts for.
        task: The task; empty where the row was no sample.
        split: Train or heldout; empty for what was not written.
        outcome: ``written``, or what became of it.
        reason: The reason code of what was not written.
        message: Its explanation, or what curation noted of a written sample.
        text: Instruction or caption.
        group: What a split must not separate.
        licence: The licence.
        size: Width and height of the clips in pixels; None where unknown.
        frames: Frames of a clip.
        fps: Their rate.
        target: The media path as the input names it.
        source: The same of an edit's source.
        references: The same of references.
        scores: Scores of curation.
    """

    key: str
    dataset: str
    task: str
    split: str
    outcome: str
    reason: str
    message: str
    text: str
    group: str
    licence: str
    size: list[int] | None
    frames: int | None
    fps: float | None
    target: str | None
    source: str | None
    references: list[str]
    scores: dict[str, float]


def gallery_rows(dataset: ShardDataset) -> Iterator[GalleryRow]:
    """All rows, one after another."""
    yield from _written(dataset)
    yield from _left_out(dataset.storage)


def has_plan(storage: Storage) -> bool:
    """Whether texts can be read without opening shards."""
    return bool(planned_files(storage, ENCODE.name))


def _written(dataset: ShardDataset) -> Iterator[GalleryRow]:
    index = dataset.whole_index()
    scores = [name for name in index.column_names if name.startswith(SCORE_PREFIX)]
    columns = index.select([*_FIELDS, *scores])
    start = 0
    plan = PlannedUnits(dataset.storage, ENCODE.name, ["key", "sample", "assessed"])
    for shard in dataset.manifest.shards:
        rows = columns.slice(start, shard.num_samples).to_pylist()
        start += shard.num_samples
        planned = {row["key"]: row for row in plan.rows(shard.name)}
        for row in rows:
            known = planned.get(row["key"], {})
            sample = json.loads(known.get("sample", "{}"))
            noted = ", ".join(json.loads(known.get("assessed") or "{}").get("reasons", ()))
            if row["media_target"] is not None:
                media = {"target": row["media_target"], "source": row["media_source"]}
                sample |= media | {"references": row["media_references"]}
            yield GalleryRow(
                key=row["key"],
                dataset=row["dataset"],
                task=row["task"],
                split=row["split"],
                outcome=WRITTEN,
                reason="",
                message=noted,
                group=row["group"] or "",
                licence=row["licence"] or "",
                size=[row["width"], row["height"]],
                frames=row["num_frames"],
                fps=row["fps"],
                scores={name.removeprefix(SCORE_PREFIX): row[name] for name in scores if row[name] is not None},
                **_told(sample),
            )


def _told(sample: dict[str, Any]) -> dict[str, Any]:
    """What a stored sample says that no index has."""
    return {
        "text": (sample.get("instruction") or sample.get("caption") or "")[:_TEXT_CHARACTERS],
        "target": sample.get("target"),
        "source": sample.get("source"),
        "references": sample.get("references", []),
    }


def _left_out(storage: Storage) -> Iterator[GalleryRow]:
    losses = ledger(storage.url) if storage.exists(QUARANTINE_FILE) else []
    scores = _scores_of(storage, losses)
    for loss in losses:
        sample = json.loads(loss.sample) if loss.sample else {}
        yield GalleryRow(
            key=loss.key,
            dataset=loss.dataset,
            task=sample.get("task", ""),
            split="",
            outcome=loss.outcome,
            reason=loss.reason,
            message=_last_line(loss.message),
            group=sample.get("group", ""),
            licence=sample.get("licence", ""),
            size=None,
            frames=None,
            fps=None,
            scores=scores.get(loss.key, {}),
            **_told(sample),
        )


def _last_line(message: str | None) -> str:
    return (message or "").strip().rpartition("\n")[2][:_MESSAGE_CHARACTERS]


def _scores_of(storage: Storage, losses: list[Outcome]) -> dict[str, dict[str, float]]:
    """What curation measured of the samples that it left out: to see where a limit lies."""
    wanted = {loss.key for loss in losses if loss.stage != "read"}
    found: dict[str, dict[str, float]] = {}
    if not wanted:
        return found
    files = [commit.file for some in commits(storage, ASSESS.folder).values() for commit in some]
    for assessment in assessments(read_all(storage, ASSESS.folder, files)):
        key = json.loads(assessment.sample)["key"]
        if key in wanted:
            found[key] = dict(assessment.scores)
    return found
