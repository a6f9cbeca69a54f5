"""GenEval's scoring rules on object detections, and its summary.

The rules need detections (class, box, confidence) and a colour of each box. They come from GenEval's own detector in
its environment, or from ``learned_metrics``; here is only what is decided from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS = 0.3, 0.9, 16
POSITION_THRESHOLD = 0.1
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Detection:
    """One detected object: COCO class name, box ``(x0, y0, x1, y1)``, confidence and its zero-shot colour."""

    name: str
    box: tuple[float, float, float, float]
    confidence: float
    color: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt asks for, and why not."""

    correct: bool
    reason: str = ""


def judge_picture(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> Verdict:
    """Apply GenEval's rules to one picture.

    Args:
        metadata: The prompt's row: ``tag``, ``include`` and perhaps ``exclude``.
        detections: Every detection of the picture.
    """
    threshold = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.confidence):
        if detection.confidence > threshold and len(objects.setdefault(detection.name, [])) < MAX_OBJECTS:
            objects[detection.name].append(detection)
    reasons, groups = [], []
    for wanted in metadata.get("include", []):
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, [])[:count]
        correct = len(found) == count
        if not correct:
            reasons.append(f"expected {name}>={count}, found {len(objects.get(name, []))}")
        else:
            if "color" in wanted:
                right = sum(d.color == wanted["color"] for d in found)
                if right < count:
                    correct = False
                    reasons.append(f"expected {wanted['color']} {name}>={count}, found {right}")
            if "position" in wanted and correct:
                relation, index = wanted["position"]
                correct = _check_position(found, relation, groups[index], name, reasons)
        groups.append(found if correct else None)
    for unwanted in metadata.get("exclude", []):
        name, count = unwanted["class"], unwanted["count"]
        if len(objects.get(name, [])) >= count:
            reasons.append(f"expected {name}<{count}, found {len(objects[name])}")
    return Verdict(not reasons, "; ".join(reasons))


def relative_position(a: Detection, b: Detection) -> set[str]:
    """Where ``a`` is seen from ``b``: any of left of, right of, above, below.

    The offset of centres is shrunk by a tenth of both boxes' sizes, then compared by direction.
    """
    boxes = np.array([a.box, b.box]).reshape(2, 2, 2)
    centres, sizes = boxes.mean(axis=1), np.abs(np.diff(boxes, axis=1))[:, 0]
    offset = centres[0] - centres[1]
    shrunk = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes.sum(0), 0) * np.sign(offset)
    if not np.any(np.abs(shrunk) > 1e-3):
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)
    relations = {("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5)}
    return {name for name, holds in relations if holds}


def summarise(results: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Official summary from ``(tag, correct)`` of every picture: overall is the unweighted mean of the tags."""
    accuracies = {}
    for tag in dict.fromkeys(tag for tag, _ in results):
        verdicts = [correct for name, correct in results if name == tag]
        accuracies[tag] = sum(verdicts) / len(verdicts)
    correct_share = sum(correct for _, correct in results) / len(results)
    return {"overall": float(np.mean(list(accuracies.values()))), "correct_images": correct_share, **accuracies}


def _check_position(
    found: Sequence[Detection], relation: str, others: Sequence[Detection] | None, name: str, reasons: list[str]
) -> bool:
    if others is None:
        reasons.append(f"no target for {name} to be {relation}")
        return False
    for detection in found:
        for other in others:
            if relation not in relative_position(detection, other):
                reasons.append(f"expected {name} {relation} target")
                return False
    return True
