"""Judge answers to scores: our strict form and the official forms, each by its own rules.

The official parsers are reproduced with their weaknesses, because published numbers were made with them; the strict
one is what our own rubrics ask for. A parser returns a :class:`Parsed`, never an exception.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

DONE, PLAUSIBLE, PRESERVED = "done", "plausible", "preserved"
CHECKLIST_GROUPS = (DONE, PLAUSIBLE, PRESERVED)
"""What the questions of a checklist are about: whether the edit was done, looks possible, and left the rest alone."""
UNION = "union"
"""1 where every question of the first two groups was answered right."""


@dataclass(frozen=True)
class Parsed:
    """What a reply says.

    Attributes:
        sample: The sample's score, or None when the reply gives none by these rules.
        scores: The axis scores found, by axis name where the form names them.
        minimum: The lowest axis score, for forms that report it.
        failure: Why there is no score; empty otherwise.
        reasoning: The judge's words, where the form has a place for them.
        answers: How right each answer of a checklist is (0 to 1), by ``group/question``.
    """

    sample: float | None
    scores: dict[str, float]
    minimum: float | None = None
    failure: str = ""
    reasoning: str = ""
    answers: dict[str, float] = field(default_factory=dict)


Parser = Callable[[str, Sequence[str]], Parsed]
_UNPARSABLE = Parsed(None, {}, failure="unparsable")


def strict_json(reply: str, axes: Sequence[str]) -> Parsed:
    """Our form: one JSON object with an integer 1..5 for every axis and nothing missing; the sample is their mean."""
    answer = _json_object(reply)
    if answer is None:
        return _UNPARSABLE
    scores = {}
    for axis in axes:
        value = answer.get(axis)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 5:
            return _UNPARSABLE
        scores[axis] = float(value)
    return Parsed(_mean(scores), scores, min(scores.values()), reasoning=str(answer.get("reasoning", "")))


def checklist_json(reply: str, axes: Sequence[str]) -> Parsed:
    """Our checklist: one JSON object with ``yes`` or ``no`` for every question ``group/name`` and nothing missing."""
    answer = _json_object(reply)
    if answer is None:
        return _UNPARSABLE
    told = {axis: str(answer.get(axis, "")).strip().lower() for axis in axes}
    if not set(told.values()) <= {"yes", "no"}:
        return _UNPARSABLE
    answers = {axis: float(word == "yes") for axis, word in told.items()}
    return Parsed(None, {}, reasoning=str(answer.get("reasoning", "")), answers=answers)


def checked(calls: Sequence[Parsed]) -> Parsed:
    """The checklist of a sample from the answers of all its calls: shares by group, and their union.

    With a call unanswered the sample has no score, but keeps the answers there are.
    """
    answers = {name: value for call in calls for name, value in call.answers.items()}
    failure = next((call.failure for call in calls if call.failure), "")
    groups = {g: [v for name, v in answers.items() if name.startswith(f"{g}/")] for g in CHECKLIST_GROUPS}
    scores = {group: sum(values) / len(values) for group, values in groups.items() if values}
    must = groups[DONE] + groups[PLAUSIBLE]
    if must:
        scores[UNION] = float(min(must) == 1.0)
    sample = _mean(answers) if answers and not failure else None
    words = "\n".join(call.reasoning for call in calls if call.reasoning)
    return Parsed(sample, scores if sample is not None else {}, None, failure, words, answers)


def _json_object(reply: str) -> dict | None:
    text = reply.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        answer = json.loads(fenced.group(1) if fenced else text)
    except json.JSONDecodeError:
        return None
    return answer if isinstance(answer, dict) else None


def imgedit_lines(reply: str, axes: Sequence[str]) -> Parsed:
    """ImgEdit: every line of the form ``name: digits`` counts; the sample is their mean, to two digits.

    Bold names pass, but ``4/5``, ``4.0`` and ``4**`` lose their line, and one or two lines are enough.
    """
    found = {}
    for number, line in enumerate(reply.splitlines()):
        parts = line.strip().split(": ")
        if len(parts) == 2 and parts[1].isdigit():
            found[f"{number}:{parts[0]}"] = float(parts[1])
    return Parsed(round(_mean(found), 2), found) if found else _UNPARSABLE


def openve_numbers(reply: str, axes: Sequence[str]) -> Parsed:
    """OpenVE-Bench: every number after a colon counts, also in the reasoning; mean to two digits."""
    numbers = re.findall(r":\s*(\d+\.?\d*)", reply)
    found = {str(i): float(number) for i, number in enumerate(numbers)}
    return Parsed(round(_mean(found), 2), found) if found else _UNPARSABLE


def refvie_lines(reply: str, axes: Sequence[str]) -> Parsed:
    """RefVIE-Bench (official): lines starting with ``axis:``; a bad number rejects the reply, a missing axis does not.

    The axes of both edit types are accepted, as in the official check.
    """
    found = {}
    for line in reply.splitlines():
        axis = next((axis for axis in REFVIE_AXES if line.startswith(f"{axis}:")), None)
        if axis is None:
            continue
        try:
            score = int(float(line.split(":")[-1].strip()))
        except ValueError:
            return _UNPARSABLE
        if not 1 <= score <= 5:
            return Parsed(None, {}, failure="out of range")
        found[axis] = float(score)
    return Parsed(_mean(found), found) if found else _UNPARSABLE


def axis_regex(reply: str, axes: Sequence[str]) -> Parsed:
    """LoomVideo's form for RefVIE-Bench: ``axis:`` and a number in 1..5 for all axes or nothing; mean to two digits."""
    found = {}
    for axis in axes:
        match = re.search(re.escape(axis) + r":\s*(\d+\.?\d*)", reply)
        if match is None:
            return _UNPARSABLE
        found[axis] = float(match.group(1))
        if not 1 <= found[axis] <= 5:
            return Parsed(None, {}, failure="out of range")
    return Parsed(round(_mean(found), 2), found)


def ivbench_json(reply: str, axes: Sequence[str]) -> Parsed:
    """IntelligentVBench: JSON, or the outermost braces, with every axis clamped to 1..5; mean to two digits."""
    answer = None
    braces = re.search(r"\{.*\}", reply, re.DOTALL)
    for candidate in (reply, braces.group(0) if braces else ""):
        try:
            answer = json.loads(candidate)
            break
        except json.JSONDecodeError:
            continue
    if not isinstance(answer, dict) or any(axis not in answer for axis in axes):
        return _UNPARSABLE
    try:
        found = {axis: max(1.0, min(5.0, float(answer[axis]))) for axis in axes}
    except (TypeError, ValueError):
        return _UNPARSABLE
    return Parsed(round(_mean(found), 2), found, min(found.values()))


REFVIE_SUBJECT_AXES = (
    "Identity Consistency & Compliance",
    "Temporal Consistency & Texture Fidelity",
    "Physical Integration & Tracking",
)
REFVIE_BACKGROUND_AXES = (
    "Reference Fidelity & Preservation",
    "Matting Quality & Temporal Stability",
    "Visual Harmony & Perspective",
)
REFVIE_AXES = REFVIE_SUBJECT_AXES + REFVIE_BACKGROUND_AXES

PARSERS: dict[str, Parser] = {
    "strict": strict_json,
    "imgedit-official": imgedit_lines,
    "openve-official": openve_numbers,
    "refvie-official": refvie_lines,
    "refvie-loomvideo": axis_regex,
    "ivbench-official": ivbench_json,
    "checklist": checklist_json,
}
"""Named answer forms."""


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)
