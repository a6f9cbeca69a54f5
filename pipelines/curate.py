"""Judging samples before they are encoded: shots, quality, text overlay, pairs, duplicates.

Samples are dealt into chunks the way they are dealt into shards, and a chunk's judgements are committed as one file, so
this part resumes and stays up to date like the rest. Only scores and decisions leave a worker, never pixels.
"""

import dataclasses
import json
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq

from loomvideo.pipelines.decode import DecodeError
from loomvideo.pipelines.decode_process import IsolatedDecoder
from loomvideo.pipelines.media_files import base_folder, content_hash, local_copies, media_stamp, resolve
from loomvideo.pipelines.prepare_config import PrepareConfig
from loomvideo.pipelines.samples import EDIT_TASKS, Sample, parse_sample
from loomvideo.pipelines.stages.assess import Assessor, Clip, drops, reasons_of
from loomvideo.pipelines.stages.duplicates import exact_duplicates, near_duplicates
from loomvideo.pipelines.stages.shots import build_detector, shot_samples, shot_thumbnails, shots
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.plan import PlanItem, PlannedShard, digest, plan_shards
from loomvideo.platform.shards.storage import Storage

# Raise when the same frames and options give other judgements.
JUDGEMENT_VERSION = 1
CURATION_FOLDER = "work/curation"
CURATION_PLAN = "work/curation.parquet"
CHUNK_SAMPLES = 64
# Frames of a clip that are looked at; of longer ones every second, third ...
MAX_FRAMES = 240
LONGER_SIDE = 320
# Pairs would fall out of step, and references belong to the whole clip.
TASKS_CUT_INTO_SHOTS = ("t2v",)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What is known of one sample, or of one shot of it.

    Attributes:
        sample: JSON of the sample.
        outcome: ``kept``, ``filtered`` or ``quarantined``.
        stage: Where it was decided.
        reason: Its code, empty for kept ones.
        message: One line for a person.
        reasons: All reason codes, also those that did not drop it.
        scores: For the index.
        identity: Hash of files and text.
        signature: Perceptual hashes of key frames, as integers.
    """

    sample: str
    outcome: str
    stage: str = ""
    reason: str = ""
    message: str = ""
    reasons: tuple[str, ...] = ()
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    identity: str = ""
    signature: tuple[int, ...] = ()


class SampleJudge:
    """Judges the samples of a chunk; one a Ray actor.

    Args:
        config: Of the job.
    """

    def __init__(self, config: PrepareConfig):
        cv2.setNumThreads(1)
        self.options = config.stages
        self.storage = Storage(config.output)
        self.base = base_folder(config.input)
        self.decoder = IsolatedDecoder(config.workers.decode_timeout_s, config.decoder)
        self.assessor = Assessor(config.stages)
        self.detector = None if config.stages.shots.detector == "off" else build_detector(config.stages.shots)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Judge the chunk that a row names and commit the result."""
        samples = read_chunk(self.storage, row["chunk"])
        judgements, media = [], {}
        for sample in samples:
            media |= {path: media_stamp(resolve(path, self.base)) for path in media_paths(sample)}
            judgements += self.judge(sample)
        record = {
            "recipe": row["recipe"],
            "media": media,
            "judgements": [dataclasses.asdict(judgement) for judgement in judgements],
        }
        self.storage.write_bytes(chunk_path(row["chunk"]), json.dumps(record, sort_keys=True).encode())
        return {"chunk": row["chunk"], "judged": len(judgements)}

    def judge(self, sample: Sample) -> list[Judgement]:
        """The judgements of a sample: one, or one a shot."""
        try:
            parts = self._shots(sample)
        except DecodeError as error:
            return [Judgement(sample.to_json(), "quarantined", "probe", error.reason, str(error))]
        if not parts:
            return [Judgement(sample.to_json(), "filtered", "shots", "no_shot", "no shot is long enough")]
        return [self._judge_part(part) for part in parts]

    def _judge_part(self, sample: Sample) -> Judgement:
        text = sample.to_json()
        try:
            with local_copies([resolve(path, self.base) for path in media_paths(sample)]) as copies:
                local = {path: copies[resolve(path, self.base)] for path in media_paths(sample)}
                fps = float(sample.extra.get("fps", 24.0))
                target = self._clip(local[sample.target], fps)
                source = self._clip(local[sample.source], fps) if sample.source else None
                hashes = [content_hash(name) for name in local.values()]
            scores = self.assessor.score(sample.task, target, source, str(sample.extra.get("use", "")))
        except DecodeError as error:
            return Judgement(text, "quarantined", "probe", error.reason, str(error))
        except Exception:
            return Judgement(text, "quarantined", "judge", "judge_error", traceback.format_exc(limit=-4))
        reasons = reasons_of(scores.values, self.options)
        dropping = [reason for reason in reasons if drops([reason], self.options)]
        return Judgement(
            sample=text,
            outcome="filtered" if dropping else "kept",
            stage="judge" if dropping else "",
            reason=dropping[0] if dropping else "",
            message=", ".join(reasons),
            reasons=tuple(reasons),
            scores=scores.values,
            identity=digest(sample.task, sample.text, *hashes),
            signature=tuple(int(value) for value in scores.signature),
        )

    def _shots(self, sample: Sample) -> list[Sample]:
        if self.detector is None or sample.task not in TASKS_CUT_INTO_SHOTS or sample.source:
            return [sample]
        with local_copies([resolve(sample.target, self.base)]) as copies:
            (path,) = copies.values()
            info = self.decoder.probe(path)
            thumbnails = shot_thumbnails(self.decoder.read(path, range(info.num_frames)))
        kept = shots(self.detector.boundaries(thumbnails, info.fps), info.num_frames, info.fps, self.options.shots)
        return shot_samples(sample, kept, info.num_frames)

    def _clip(self, path: str, fps: float) -> Clip:
        info = self.decoder.probe(path, fps)
        stride = math.ceil(info.num_frames / MAX_FRAMES)
        scale = min(LONGER_SIDE / max(info.width, info.height), 1.0)
        size = (max(round(info.width * scale), 2), max(round(info.height * scale), 2))
        chunks = self.decoder.read(path, range(0, info.num_frames, stride), fps)
        frames = [cv2.resize(f, size, interpolation=cv2.INTER_AREA) for chunk in chunks for f in chunk]
        return Clip(np.stack(frames), (info.fps or fps) / stride, info.width, info.height)


def media_paths(sample: Sample) -> list[str]:
    """Media paths of a sample as it names them."""
    return [path for path in (sample.target, sample.source, *sample.references) if path]


def chunk_path(chunk: str) -> str:
    """Where the judgements of a chunk lie."""
    return f"{CURATION_FOLDER}/{chunk}.json"


def read_chunk(storage: Storage, chunk: str) -> list[Sample]:
    """The samples of a chunk."""
    with storage.fs.open(storage.full_path(CURATION_PLAN), "rb") as opened:
        table = pq.read_table(opened, filters=[("shard", "=", chunk)])
    return [parse_sample(row["sample"], f"{CURATION_PLAN}:{row['key']}") for row in table.to_pylist()]


def plan_chunks(samples: list[Sample]) -> list[PlannedShard]:
    """Deal samples into chunks."""
    return plan_shards((PlanItem(s.key, "chunk", 1) for s in samples), 2**62, CHUNK_SAMPLES, seed=0)


def chunk_rows(chunks: list[PlannedShard], by_key: dict[str, Sample], config: PrepareConfig) -> list[dict[str, Any]]:
    """The work: a row a chunk, with the recipe of its judgements."""
    options = json.dumps(dataclasses.asdict(config.stages), sort_keys=True)
    return [
        {
            "chunk": chunk.name,
            "recipe": digest(JUDGEMENT_VERSION, options, *(by_key[key].to_json() for key in chunk.keys)),
        }
        for chunk in chunks
    ]


def stale_chunks(
    storage: Storage, rows: list[dict[str, Any]], same_media: Callable[[dict[str, list | None]], bool]
) -> list[dict[str, Any]]:
    """Rows without judgements that still hold."""
    stale = []
    for row in rows:
        if not storage.exists(chunk_path(row["chunk"])):
            stale.append(row)
            continue
        record = json.loads(storage.read_bytes(chunk_path(row["chunk"])))
        if record["recipe"] != row["recipe"] or not same_media(record["media"]):
            stale.append(row)
    return stale


def judgements(storage: Storage, chunks: list[PlannedShard]) -> Iterator[Judgement]:
    """All judgements."""
    for chunk in chunks:
        record = json.loads(storage.read_bytes(chunk_path(chunk.name)))
        for values in record["judgements"]:
            yield Judgement(**{**values, "reasons": tuple(values["reasons"]), "signature": tuple(values["signature"])})


def decide(
    found: list[Judgement], config: PrepareConfig
) -> tuple[list[tuple[Sample, Judgement]], list[dict[str, Any]]]:
    """Who is kept, after duplicates over the whole input are out.

    Returns:
        Kept samples with their judgements in key order, and outcomes of the others.
    """
    parsed = sorted(((parse_sample(j.sample, "judgement"), j) for j in found), key=lambda pair: pair[0].key)
    outcomes = [
        _outcome(sample, j.outcome, j.stage, j.reason, j.message) for sample, j in parsed if j.outcome != "kept"
    ]
    kept = [pair for pair in parsed if pair[1].outcome == "kept"]
    limits = config.stages.duplicates
    repeats: dict[int, tuple[str, int]] = {}
    if limits.exact:
        repeats = {
            p: ("exact_duplicate", first) for p, first in exact_duplicates([j.identity for _, j in kept]).items()
        }
    if limits.perceptual:
        labels = [(s.text, s.source) if s.task in EDIT_TASKS else (s.task, s.text) for s, _ in kept]
        signatures = [np.array(j.signature, np.uint64) for _, j in kept]
        near = near_duplicates(signatures, labels, limits)
        repeats = {p: ("near_duplicate", first) for p, first in near.items()} | repeats
    final = []
    for position, (sample, judgement) in enumerate(kept):
        reason, first = repeats.get(position, ("", 0))
        if reason and not config.stages.score_only and reason not in config.stages.keep_reasons:
            outcomes.append(_outcome(sample, "duplicates", "duplicates", reason, f"repeats {kept[first][0].key}"))
        else:
            reasons = (*judgement.reasons, reason) if reason else judgement.reasons
            final.append((sample, dataclasses.replace(judgement, reasons=reasons)))
    keys = [sample.key for sample, _ in final]
    if len(set(keys)) != len(keys):
        raise UserError("two shots have the same key; give the samples keys that differ before -shot")
    return final, outcomes


def _outcome(sample: Sample, outcome: str, stage: str, reason: str, message: str) -> dict[str, Any]:
    return {
        "key": sample.key,
        "dataset": sample.dataset,
        "outcome": outcome,
        "stage": stage,
        "reason": reason,
        "message": message,
        "sample": sample.to_json(),
    }
