"""CoVEBench: edits of several points at once, each checked by questions with a known answer.

A sample has about sixteen questions: was it done (execution), is it plausible (physical logic), was the rest preserved.
Questions of one form go to the judge in one call. The texts stay in the user's own copy.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loomvideo.pipelines.evaluation.suites.items import EvalItem, SuiteManifest, build_manifest
from loomvideo.pipelines.evaluation.suites.parsers import CHECKLIST_GROUPS, DONE, PLAUSIBLE, PRESERVED, Parsed
from loomvideo.pipelines.evaluation.suites.protocols import Judged
from loomvideo.platform.errors import UserError

NUM_VIDEOS, NUM_INSTRUCTIONS, NUM_QUESTIONS = 416, 626, 9990
FORMS = ("AB-MCQ", "Single-TF", "Dual-TF", "Score-MCQ")
"""Forms of question, in the order in which the official code asks them."""
BOTH_VIDEOS = ("Dual-TF", "Score-MCQ")
"""Forms that need the source beside the result."""
SCORED = "Score-MCQ"
_GROUPS = {"execution accuracy": DONE, "physical logic": PLAUSIBLE, "semantic preservation": PRESERVED}
_OFFICIAL_NAMES = {DONE: "IFS", PLAUSIBLE: "VRS", PRESERVED: "SEM"}
_ENDING = (
    "\n\nCRITICAL: Output STRICTLY as a valid JSON array. "
    "Do NOT include any markdown formatting or explanations outside the JSON."
)


@dataclass(frozen=True)
class CheckQuestion:
    """One question of the checklist.

    Attributes:
        id: Unique in the sample.
        form: One of :data:`FORMS`.
        group: ``done``, ``plausible`` or ``preserved``.
        asked: What the judge is shown: id, question and options.
        expected: The right answer, lower case; unused where a score is asked for.
    """

    id: str
    form: str
    group: str
    asked: dict[str, Any]
    expected: str

    @property
    def name(self) -> str:
        """``group/id``, the name of its answer."""
        return f"{self.group}/{self.id}"


def covebench(root: Path) -> SuiteManifest:
    """CoVEBench: ``checklist.json`` and the source videos it names by ``videoA_path``."""
    path = next((p for p in (root / "checklist.json", root / "data" / "checklist.json") if p.is_file()), None)
    if path is None:
        raise UserError(f"{root}: no checklist.json here; give the folder of the official download")
    items = []
    for index, row in enumerate(json.loads(path.read_text(encoding="utf-8-sig"))):
        lacking = [name for name in ("id", "editing_instruction", "videoA_path") if not row.get(name)]
        if lacking:
            raise UserError(f"{path}: row {index}: field {lacking[0]!r} is missing")
        groups = [group.get("questions", []) for group in row.get("evaluation_groups", [])]
        kinds = sorted({entry.get("Level 1", "") for entry in row.get("category", [])})
        # The last group asks what was preserved; each other one is about an edit.
        category = f"{max(1, len(groups) - 1)} edits"
        extra = {"questions": [question for group in groups for question in group], "kinds": kinds}
        source = row["videoA_path"]
        items.append(
            EvalItem(
                "covebench", str(row["id"]), "video_edit", category, row["editing_instruction"], source,
                cluster=source, extra=extra,
            )
        )  # fmt: skip
    manifest = build_manifest("covebench", path.parent, items, total=NUM_INSTRUCTIONS)
    problems = list(manifest.problems)
    counts = {"questions": sum(len(i.extra["questions"]) for i in items), "videos": len({i.source for i in items})}
    for name, official in (("questions", NUM_QUESTIONS), ("videos", NUM_VIDEOS)):
        if counts[name] != official:
            problems.append(f"{counts[name]} {name}, the official benchmark has {official}")
    return SuiteManifest(manifest.suite, manifest.root, manifest.items, tuple(problems))


def questions_of(item: EvalItem) -> list[CheckQuestion]:
    """The questions of a sample whose form is known."""
    found = []
    for question in item.extra["questions"]:
        if question.get("type") not in FORMS:
            continue
        asked = {"id": question["id"], "question": question["question"]}
        if "options" in question:
            asked["options"] = question["options"]
        group = _GROUPS.get(str(question.get("dimension", "")).strip().lower())
        group = group or (PRESERVED if question["type"] == SCORED else DONE)
        expected = str(question.get("expected_answer", "")).strip().lower()
        found.append(CheckQuestion(str(question["id"]), question["type"], group, asked, expected))
    return found


def question_text(item: EvalItem, questions: Sequence[CheckQuestion]) -> str:
    """What the judge is told after the videos: the instruction, the questions as JSON and the form of the answer."""
    opening = f"\nEditing Instruction:\n{item.text}\n\n" if item.text else "\n"
    listed = json.dumps([q.asked for q in questions], indent=2, ensure_ascii=False)
    return f"{opening}Here are the questions you need to evaluate based on the video(s):\n{listed}{_ENDING}"


def parse_answers(reply: str, questions: Sequence[CheckQuestion]) -> Parsed:
    """The answers of one call; a reply that lacks one, or its reasoning, is none at all, as in the official code.

    A right answer is 1 and a wrong one 0; a score of 1 to 10 is a tenth of itself.
    """
    failed = Parsed(None, {}, failure="unparsable")
    try:
        rows = json.loads(_json_part(reply))
    except json.JSONDecodeError:
        return failed
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "reasoning" in row for row in rows):
        return failed
    given = {str(row.get("id", "")): _answer(row) for row in rows}
    if any(given.get(q.id) is None for q in questions) or "" in given or None in given.values():
        return failed
    answers = {}
    for question in questions:
        value = _score(question, given[question.id])
        if value is not None:
            answers[question.name] = value
    return Parsed(None, {}, answers=answers)


def covebench_official(judged: Sequence[Judged]) -> dict[str, float]:
    """The official figures in percent: IFS, VRS and SEM over all questions, UAS over samples; no answer, no count.

    UAS is the share of samples whose every question of execution and plausibility was answered right.
    """
    pooled: dict[str, list[float]] = {group: [] for group in CHECKLIST_GROUPS}
    unions = []
    for sample in judged:
        groups = {g: [v for n, v in sample.parsed.answers.items() if n.startswith(f"{g}/")] for g in CHECKLIST_GROUPS}
        for group, values in groups.items():
            pooled[group] += values
        if groups[DONE] and groups[PLAUSIBLE]:
            unions.append(float(min(groups[DONE] + groups[PLAUSIBLE]) == 1.0))
    figures = {_OFFICIAL_NAMES[g]: 100 * float(np.mean(values)) for g, values in pooled.items() if values}
    if unions:
        figures["UAS"] = 100 * float(np.mean(unions))
    return figures


def _score(question: CheckQuestion, answer: Any) -> float | None:
    if question.form == SCORED:
        try:
            return float(answer) / 10
        except (TypeError, ValueError):
            return None
    return float(str(answer).strip().lower() == question.expected) if question.expected else None


def _answer(row: dict[str, Any]) -> Any:
    for key in ("final_answer", "final_score", "answer", "score"):
        if row.get(key) is not None:
            return row[key]
    return None


def _json_part(text: str) -> str:
    text = text.split("</think>")[-1].strip()
    for pattern, group in ((r"```(?:json)?(.*?)```", 1), (r"(\[.*\])", 0), (r"(\{.*\})", 0)):
        match = re.search(pattern, text, re.DOTALL | re.IGNORECASE)
        if match:
            return match.group(group).strip()
    return text
