"""Assessing samples before they are encoded: shots, quality, text overlay, pairs, duplicates.

An assessment has two parts: what the frames say (scores, hashes), which takes decoding, and what the limits say of
that, which does not. The first is kept in the unit's result: after a new caption or another limit nothing is decoded.
Only scores and decisions leave a worker, never pixels.
"""

import dataclasses
import json
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import cv2
import numpy as np

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.files import base_folder, content_hash, local_copies, media_stamp, resolve
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.curation.assess import Assessor, Clip, drops, reasons_of
from loomvideo.pipelines.prepare.curation.duplicates import exact_duplicates, near_duplicates
from loomvideo.pipelines.prepare.curation.options import StageOptions
from loomvideo.pipelines.prepare.curation.pair_audit import in_step_paths
from loomvideo.pipelines.prepare.curation.shots import PIECE_FRAMES, ShotCutter, build_detector, shot_samples, thumbnail
from loomvideo.pipelines.prepare.outcomes import RETRIABLE, Outcome
from loomvideo.pipelines.prepare.unit_rows import UnitReport, WorkRow
from loomvideo.pipelines.prepare.units import commit_result, earlier_result, read_planned
from loomvideo.pipelines.sources.samples import Sample, media_paths, stored_sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.plan import digest
from loomvideo.platform.shards.storage import Storage

# Raise when the same frames and options give other assessments.
ASSESSMENT_VERSION = 5
CURATION_FOLDER = "work/curation"
# Frames of a clip that are looked at; of longer ones every second, third ...
MAX_FRAMES = 240
LONGER_SIDE = 320
# Frames a second that rounding may make of one rate.
_ONE_RATE = 0.05
# Pairs would fall out of step, and references belong to the whole clip.
TASKS_CUT_INTO_SHOTS = ("t2v",)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the frames of a sample, or of one shot of it, say.

    Attributes:
        key: The key of the sample or the shot.
        target: Media path of the same.
        group: The group of the same.
        scores: The scores that the index gets.
        signature: Perceptual hashes of key frames, as integers.
        colours: Mean colours of the target's parts, see :func:`~.curation.duplicates.colours`.
        content: Hash of the files.
        fps: The frame rate of the target's file.
        stride: 1 when every frame was looked at.
    """

    key: str
    target: str
    group: str
    scores: dict[str, float]
    signature: tuple[int, ...]
    colours: str
    content: str
    fps: float
    stride: int


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What is decided of one sample, or of one shot of it.

    Attributes:
        sample: JSON of the sample.
        outcome: ``kept``, ``filtered`` or ``quarantined``.
        stage: The stage that decided it.
        reason: Its code, empty for kept ones.
        message: One line for a person.
        reasons: All reason codes, also those that did not drop it.
        scores: The scores that the index gets.
        identity: Hash of files and text.
        signature: Perceptual hashes of key frames, as integers.
        colours: Mean colours of the target's parts.
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
    colours: str = ""


class SampleAssessor:
    """Assesses the samples of a unit; one a Ray actor.

    Args:
        config: The configuration of the job.
    """

    def __init__(self, config: PrepareConfig):
        cv2.setNumThreads(1)
        self.options = config.stages
        self.storage = Storage(config.output)
        self.base = base_folder(config.input)
        self.decoder = IsolatedDecoder(config.workers.decode_timeout_s, config.decoder)
        self.assessor = Assessor(config.stages)
        self.detector = None if config.stages.shots.detector == "off" else build_detector(config.stages.shots)
        self._scoring = digest(ASSESSMENT_VERSION, config.decoder, json.dumps(scoring_options(config.stages)))

    def __call__(self, row: WorkRow) -> UnitReport:
        """Assess the unit that a row names and commit the result."""
        before = earlier_result(self.storage, CURATION_FOLDER, row).get("measured", {})
        decoded = 0
        assessments, measured = [], {}
        for planned in read_planned(self.storage, row):
            sample = stored_sample(planned["sample"])
            stamps = {path: media_stamp(resolve(path, self.base)) for path in media_paths(sample)}
            basis = self._basis(sample, stamps)
            known = before.get(sample.key, {})
            if known.get("basis") == basis:
                parts = [Measured(**{**part, "signature": tuple(part["signature"])}) for part in known["parts"]]
            else:
                parts = self.measure(sample)
                decoded += 1
            assessments += assessments_of(sample, parts, self.options)
            if all(isinstance(part, Measured) for part in parts):
                measured[sample.key] = {"basis": basis, "parts": [dataclasses.asdict(part) for part in parts]}
        result = {"measured": measured, "assessments": [dataclasses.asdict(assessment) for assessment in assessments]}
        commit_result(self.storage, CURATION_FOLDER, row, result)
        return {"stage": "assess", "unit": row["unit"], "assessed": len(assessments), "decoded": decoded}

    def close(self) -> None:
        """End the decoder process."""
        self.decoder.close()

    def measure(self, sample: Sample) -> list[Measured | Assessment]:
        """What the frames say: one part, or one a shot; an assessment where they cannot be had."""
        try:
            parts = self._shots(sample)
        except DecodeError as error:
            return [Assessment(sample.to_json(), "quarantined", "probe", error.reason, str(error))]
        return [self._measure_part(part) for part in parts]

    def _measure_part(self, sample: Sample) -> Measured | Assessment:
        try:
            with local_copies([resolve(path, self.base) for path in media_paths(sample)]) as copies:
                local = {path: copies[resolve(path, self.base)] for path in media_paths(sample)}
                fps = float(sample.extra.get("fps", 24.0))
                target = self._clip(local[sample.target], fps)
                source = self._clip(local[sample.source], fps) if sample.source else None
                hashes = [content_hash(name) for name in local.values()]
        except DecodeError as error:
            return Assessment(sample.to_json(), "quarantined", "probe", error.reason, str(error))
        try:
            scores = self.assessor.score(sample.task, target, source, str(sample.extra.get("use", "")))
        except Exception:
            # Arithmetic on frames of any size and content, and detectors of other libraries: one sample must not end
            # the run; a fault of all samples ends it through limits.max_loss.
            message = traceback.format_exc(limit=-4)
            return Assessment(sample.to_json(), "quarantined", "assess", "assess_error", message)
        stride = max(clip.stride for clip in (target, source) if clip is not None)
        return Measured(
            key=sample.key,
            target=sample.target,
            group=sample.group,
            scores=scores.values,
            signature=tuple(int(value) for value in scores.signature),
            colours=scores.colours,
            content=digest(*hashes),
            fps=target.fps * target.stride,
            stride=stride,
        )

    def _basis(self, sample: Sample, stamps: Mapping[str, list | None]) -> str:
        """Names all that a sample's scores depend on."""
        known = (sample.task, sample.target, sample.source, sample.references, sample.key, sample.group)
        return digest(self._scoring, known, sample.extra.get("fps"), sample.extra.get("use"), sorted(stamps.items()))

    def _shots(self, sample: Sample) -> list[Sample]:
        if self.detector is None or sample.task not in TASKS_CUT_INTO_SHOTS or sample.source:
            return [sample]
        with local_copies([resolve(sample.target, self.base)]) as copies:
            (path,) = copies.values()
            fps = float(sample.extra.get("fps", 24.0))
            info = self.decoder.probe(path, fps)
            cutter, kept = ShotCutter(self.detector, info.fps, self.options.shots), []
            # Each piece is a read with a time limit of its own: hours of film are no reason for `timeout`.
            for start in range(0, info.num_frames, PIECE_FRAMES):
                chunks = self.decoder.read(path, range(start, min(start + PIECE_FRAMES, info.num_frames)), fps)
                kept += cutter.add([thumbnail(frame) for chunk in chunks for frame in chunk])
            kept += cutter.finish()
        return shot_samples(sample, kept, info.num_frames)

    def _clip(self, path: str, fps: float) -> Clip:
        info = self.decoder.probe(path, fps)
        stride = math.ceil(info.num_frames / MAX_FRAMES)
        scale = min(LONGER_SIDE / max(info.width, info.height), 1.0)
        size = (max(round(info.width * scale), 2), max(round(info.height * scale), 2))
        indices = range(0, info.num_frames, stride)
        chosen = set(self.assessor.full_positions(len(indices)))
        frames, full = [], []
        for chunk in self.decoder.read(path, indices, fps):
            for frame in chunk:
                if len(frames) in chosen:
                    full.append(frame.copy())
                frames.append(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
        rate = (info.fps or fps) / stride
        return Clip(
            np.stack(frames), rate, info.width, info.height, full_frames=full, stride=stride, num_frames=info.num_frames
        )


def scoring_options(options: StageOptions) -> dict[str, Any]:
    """The options that scores depend on; the others are limits on them."""
    return {
        "quality": options.quality.enabled,
        "text": [getattr(options.text, name) for name in ("enabled", "num_frames", "side", "min_confidence")],
        "faces": [getattr(options.faces, name) for name in ("enabled", "min_confidence", "side")],
        "nsfw": options.nsfw.enabled,
        "camera": options.camera.enabled,
        "pairs": options.pairs.enabled,
        "shots": dataclasses.asdict(options.shots),
    }


def assessments_of(sample: Sample, parts: list[Measured | Assessment], options: StageOptions) -> list[Assessment]:
    """What the limits say of a sample's parts."""
    if not parts:
        return [Assessment(sample.to_json(), "filtered", "shots", "no_shot", "no shot is long enough")]
    return [part if isinstance(part, Assessment) else _assessment(sample, part, options) for part in parts]


def _assessment(sample: Sample, measured: Measured, options: StageOptions) -> Assessment:
    part = dataclasses.replace(sample, key=measured.key, target=measured.target, group=measured.group)
    reasons = reasons_of(measured.scores, options)
    dropping = [reason for reason in reasons if drops([reason], options)]
    # A shift is known to the frame only when every frame was looked at, and frames of both mean the same.
    if (
        "temporal_offset" in dropping
        and options.pairs.realign
        and measured.stride == 1
        and _counts_alike(part, measured)
    ):
        source, target = in_step_paths(part.source, part.target, measured.scores, measured.fps)
        part = dataclasses.replace(part, source=source, target=target)
        dropping.remove("temporal_offset")
    return Assessment(
        sample=part.to_json(),
        outcome="filtered" if dropping else "kept",
        stage="assess" if dropping else "",
        reason=dropping[0] if dropping else "",
        message=", ".join(reasons),
        reasons=tuple(reasons),
        scores=measured.scores,
        identity=digest(sample.task, sample.text, measured.content),
        signature=measured.signature,
        colours=measured.colours,
    )


def _counts_alike(part: Sample, measured: Measured) -> bool:
    if measured.scores.get("pair_by_frame"):
        return "#t=" not in part.target + str(part.source)
    return measured.scores.get("pair_fps_difference", 0.0) < _ONE_RATE


def assess_recipe(config: PrepareConfig) -> tuple[object, ...]:
    """What a unit's assessments depend on besides its samples."""
    return ASSESSMENT_VERSION, json.dumps(dataclasses.asdict(config.stages), sort_keys=True)


def assessments(results: Iterable[bytes]) -> Iterator[Assessment]:
    """All assessments of committed results."""
    for result in results:
        for values in json.loads(result)["assessments"]:
            yield Assessment(**{**values, "reasons": tuple(values["reasons"]), "signature": tuple(values["signature"])})


def lost_by_curation(result: bytes) -> set[str]:
    """Keys of a committed result that another attempt may assess."""
    found = assessments([result])
    return {stored_sample(j.sample).key for j in found if j.outcome == "quarantined" and j.reason in RETRIABLE}


def _label(sample: Sample) -> tuple:
    """What two samples must share besides their looks: an edit is its source and instruction too, not its caption."""
    told = (sample.text, sample.source) if TASKS[sample.task].needs_source else ()
    return (TASKS[sample.task].is_image, *told, *sample.references)


def decide(found: list[Assessment], config: PrepareConfig) -> tuple[list[tuple[Sample, Assessment]], list[Outcome]]:
    """Who is kept, after duplicates over the whole input are out.

    Returns:
        Kept samples with their assessments in key order, and outcomes of the others.
    """
    parsed = sorted(((stored_sample(j.sample), j) for j in found), key=lambda pair: pair[0].key)
    outcomes = [
        Outcome.of(sample, j.outcome, j.stage, j.reason, j.message) for sample, j in parsed if j.outcome != "kept"
    ]
    kept = [pair for pair in parsed if pair[1].outcome == "kept"]
    limits = config.stages.duplicates
    repeats: dict[int, tuple[str, int]] = {}
    if limits.exact:
        repeats = {
            p: ("exact_duplicate", first) for p, first in exact_duplicates([j.identity for _, j in kept]).items()
        }
    if limits.perceptual:
        signatures = [np.array(j.signature, np.uint64) for _, j in kept]
        near = near_duplicates(signatures, [_label(s) for s, _ in kept], limits, [j.colours for _, j in kept])
        repeats = {p: ("near_duplicate", first) for p, first in near.items()} | repeats
    final = []
    for position, (sample, assessment) in enumerate(kept):
        reason, first = repeats.get(position, ("", 0))
        if reason and not config.stages.score_only and reason not in config.stages.keep_reasons:
            outcomes.append(Outcome.of(sample, "duplicates", "duplicates", reason, f"repeats {kept[first][0].key}"))
        else:
            reasons = (*assessment.reasons, reason) if reason else assessment.reasons
            final.append((sample, dataclasses.replace(assessment, reasons=reasons)))
    keys = [sample.key for sample, _ in final]
    if len(set(keys)) != len(keys):
        raise UserError("two shots have the same key; give the samples keys that differ before -shot")
    return final, outcomes
