"""How judged samples become a benchmark's published figures, by the official rules and by LoomVideo's.

These reproduce numbers that are comparable with a paper's; our own figures (means with intervals, both ways of counting
failures) are made in ``aggregate`` for every suite alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loomvideo.pipelines.evaluation.suites.parsers import (
    CHECKLIST_GROUPS,
    REFVIE_BACKGROUND_AXES,
    REFVIE_SUBJECT_AXES,
    Parsed,
)

OPENVE_SUBSETS = {
    "macro5": ("global_style", "background_change", "local_change", "local_remove", "local_add"),
    "macro6": ("global_style", "background_change", "local_change", "local_remove", "local_add", "subtitle_edit"),
    "macro8": (
        "global_style",
        "background_change",
        "local_change",
        "local_remove",
        "local_add",
        "subtitle_edit",
        "creative_edit",
        "camera_edit",
    ),
}
MISSING_SCORE = 1.0
TIV2V_AXES = ("Instruction Following", "Detail Preserving", "Overall Visual Quality")


@dataclass(frozen=True)
class Judged:
    """One sample and what its judge's reply parsed to."""

    category: str
    parsed: Parsed


Aggregator = Callable[[Sequence[Judged]], dict[str, float]]


def mi2v_axes(subjects: int, with_background: bool) -> tuple[str, ...]:
    """The axes of IntelligentVBench MI2V, which depend on the references."""
    consistency = "Multi-Subject" if subjects > 1 else "Subject"
    background = " and Background" if with_background else ""
    return ("Prompt Following", f"{consistency}{background} Consistency", "Overall Visual Quality")


def imgedit_official(judged: Sequence[Judged]) -> dict[str, float]:
    """Mean of each edit type to two digits, failures dropped; the official scripts give no overall figure."""
    return {category: round(_mean(scores), 2) for category, scores in _by_category(judged).items()}


def typed_sample_mean(judged: Sequence[Judged]) -> dict[str, float]:
    """OpenVE-Bench (both modes) and LoomVideo's ImgEdit: scores in 1..5, overall and a type, failures dropped."""
    kept = {name: [s for s in scores if 1 <= s <= 5] for name, scores in _by_category(judged).items()}
    figures = {name: round(_mean(scores), 2) for name, scores in kept.items() if scores}
    everything = [score for scores in kept.values() for score in scores]
    if everything:
        figures["overall_average"] = round(_mean(everything), 2)
    return figures


def openve(judged: Sequence[Judged]) -> dict[str, float]:
    """OpenVE-Bench: the official sample mean, and the means over 5, 6 or 8 types that papers quote."""
    figures = typed_sample_mean(judged)
    for name, types in OPENVE_SUBSETS.items():
        if all(category in figures for category in types):
            figures[name] = round(_mean([figures[category] for category in types]), 2)
    return figures


def refvie_official(judged: Sequence[Judged]) -> dict[str, float]:
    """RefVIE-Bench: the mean of *all axis scores*, failures dropped.

    Axis means are taken by position, so a reply with a missing axis shifts its later scores, as in the official script.
    """
    figures = {}
    for name, axes in (("subject", REFVIE_SUBJECT_AXES), ("background", REFVIE_BACKGROUND_AXES), ("overall", ())):
        rows = [
            list(j.parsed.scores.values())
            for j in judged
            if j.parsed.sample is not None and name in (j.category, "overall")
        ]
        if not rows:
            continue
        for position, axis in enumerate(axes):
            figures[f"{name}/{axis}"] = sum(row[position] for row in rows if position < len(row)) / len(rows)
        figures[name] = _mean([score for row in rows for score in row])
    return figures


def refvie_loomvideo(judged: Sequence[Judged]) -> dict[str, float]:
    """LoomVideo's RefVIE-Bench: mean of sample means to four digits, failures dropped."""
    figures = {category: round(_mean(scores), 4) for category, scores in _by_category(judged).items()}
    everything = [j.parsed.sample for j in judged if j.parsed.sample is not None]
    if everything:
        figures["overall_average"] = round(_mean(everything), 4)
    return figures


def ivbench_official(judged: Sequence[Judged]) -> dict[str, float]:
    """IntelligentVBench: AVG and MIN over *all* samples, a missing or failed one counting as 1.0."""
    figures = {}
    for name in (*dict.fromkeys(j.category for j in judged), "overall"):
        rows = [j.parsed for j in judged if name in (j.category, "overall")]
        figures[f"{name}/avg"] = _mean([p.sample if p.sample is not None else MISSING_SCORE for p in rows])
        figures[f"{name}/min"] = _mean([p.minimum if p.minimum is not None else MISSING_SCORE for p in rows])
    return figures


def ivbench_loomvideo(judged: Sequence[Judged]) -> dict[str, float]:
    """LoomVideo's IntelligentVBench: sample means without MIN, failures dropped."""
    figures = {category: _mean(scores) for category, scores in _by_category(judged).items()}
    everything = [j.parsed.sample for j in judged if j.parsed.sample is not None]
    if everything:
        figures["overall_average"] = _mean(everything)
    return figures


def strict(judged: Sequence[Judged]) -> dict[str, float]:
    """Our own form: unrounded means a category and overall, failures dropped (aggregate gives the other way too)."""
    return ivbench_loomvideo(judged)


def checklist(judged: Sequence[Judged]) -> dict[str, float]:
    """Our checklist: the share of good answers over all questions, by what they ask and in all."""
    figures = {}
    for group in ("", *CHECKLIST_GROUPS):
        answers = [v for j in judged for name, v in j.parsed.answers.items() if name.startswith(group)]
        if answers:
            figures[group or "all"] = _mean(answers)
    return figures


def _by_category(judged: Sequence[Judged]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for j in judged:
        if j.parsed.sample is not None:
            groups.setdefault(j.category, []).append(j.parsed.sample)
    return groups


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
