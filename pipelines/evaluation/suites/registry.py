"""Every suite by name: its converter, and how it is judged in each mode."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loomvideo.pipelines.evaluation.suites import covebench, official, own, protocols
from loomvideo.pipelines.evaluation.suites.items import EvalItem, SuiteManifest
from loomvideo.pipelines.evaluation.suites.parsers import REFVIE_BACKGROUND_AXES, REFVIE_SUBJECT_AXES
from loomvideo.pipelines.evaluation.suites.protocols import Aggregator
from loomvideo.platform.errors import UserError

SCORES, SHARES = "judge", "checklist"
"""Scales of a judge's answers, as their metrics are named: scores of 1 to 5, shares of questions answered well."""


@dataclass(frozen=True)
class Protocol:
    """One way of judging a suite.

    Attributes:
        parser: Answer form, by name.
        aggregate: Samples to the benchmark's own figures.
        axes: Axis names of an item's official rubric; None when the form finds its own.
        rubric_names: Names under which an item's rubric may stand in the official file; None for our own rubrics.
        scale: :data:`SCORES` or :data:`SHARES`.
        choices: What a field of our own answer form may be.
    """

    parser: str
    aggregate: Aggregator
    axes: Callable[[EvalItem], tuple[str, ...]] | None = None
    rubric_names: Callable[[EvalItem], tuple[str, ...]] | None = None
    scale: str = SCORES
    choices: tuple[int, ...] | tuple[str, ...] = (1, 2, 3, 4, 5)


STRICT = Protocol("strict", protocols.strict)
CHECKLIST = Protocol("checklist", protocols.checklist, scale=SHARES, choices=("yes", "no"))


OWN = {"strict": STRICT, "checklist": CHECKLIST}


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        name: The name in metric names.
        convert: Reads the folder of its download into a manifest.
        judged: Whether a judge scores it; others have rules on detections or networks.
        protocols: ``strict`` (our rubrics), ``checklist`` (our questions) and, where there are any, ``official`` and
            ``loomvideo``.
        scorer: The outside tool that scores it, for suites without a judge.
        samples_of: Samples that the official protocol makes of an item's prompt.
    """

    name: str
    convert: Callable[[Path], SuiteManifest]
    judged: bool = True
    protocols: dict[str, Protocol] = field(default_factory=lambda: dict(OWN))
    scorer: str = ""
    samples_of: Callable[[EvalItem], int] = lambda item: 1

    def protocol(self, mode: str) -> Protocol:
        """The protocol of a mode.

        Raises:
            UserError: naming the modes there are.
        """
        if mode not in self.protocols:
            raise UserError(f"judge.mode={mode}: suite {self.name} has {', '.join(self.protocols)}")
        return self.protocols[mode]

    def protocol_or_strict(self, mode: str) -> Protocol:
        """The protocol of a mode, or our rubrics where the suite has none of its own."""
        return self.protocols.get(mode, STRICT)


def _geneval_samples(item: EvalItem) -> int:
    return 4


def _vbench_samples(item: EvalItem) -> int:
    return 25 if "temporal_flickering" in item.extra["dimensions"] else 5


def _category(item: EvalItem) -> tuple[str, ...]:
    return (item.category, "alter") if item.category == "adjust" else (item.category,)


def _no_axes(item: EvalItem) -> tuple[str, ...]:
    return ()


def _refvie_axes(item: EvalItem) -> tuple[str, ...]:
    return REFVIE_SUBJECT_AXES if item.category == "subject" else REFVIE_BACKGROUND_AXES


def _refvie_names(item: EvalItem) -> tuple[str, ...]:
    return (f"{item.category}_reference", item.category)


def _tiv2v_axes(item: EvalItem) -> tuple[str, ...]:
    return protocols.TIV2V_AXES


def _tiv2v_names(item: EvalItem) -> tuple[str, ...]:
    kind = "background_change" if item.category == "back_change" else item.category
    return (f"tiv2v_{kind}", item.category)


def _mi2v_axes(item: EvalItem) -> tuple[str, ...]:
    return protocols.mi2v_axes(item.extra["subjects"], item.extra["with_background"])


def _mi2v_names(item: EvalItem) -> tuple[str, ...]:
    subjects = "multi_subjects" if item.extra["subjects"] > 1 else "1subject"
    return (f"compositional_mi2v_{subjects}{'_with_background' if item.extra['with_background'] else ''}",)


_IMGEDIT = {
    **OWN,
    "official": Protocol("imgedit-official", protocols.imgedit_official, _no_axes, _category),
    "loomvideo": Protocol("imgedit-official", protocols.typed_sample_mean, _no_axes, _category),
}
_OPENVE = {
    **OWN,
    "official": Protocol("openve-official", protocols.openve, _no_axes, _category),
    "loomvideo": Protocol("openve-official", protocols.openve, _no_axes, _category),
}
_REFVIE = {
    **OWN,
    "official": Protocol("refvie-official", protocols.refvie_official, _refvie_axes, _refvie_names),
    "loomvideo": Protocol("refvie-loomvideo", protocols.refvie_loomvideo, _refvie_axes, _refvie_names),
}
_TIV2V = {
    **OWN,
    "official": Protocol("ivbench-official", protocols.ivbench_official, _tiv2v_axes, _tiv2v_names),
    "loomvideo": Protocol("ivbench-official", protocols.ivbench_loomvideo, _tiv2v_axes, _tiv2v_names),
}
_MI2V = {
    **OWN,
    "official": Protocol("ivbench-official", protocols.ivbench_official, _mi2v_axes, _mi2v_names),
    "loomvideo": Protocol("ivbench-official", protocols.ivbench_loomvideo, _mi2v_axes, _mi2v_names),
}

_COVEBENCH = {
    **OWN,
    "official": Protocol("covebench", covebench.covebench_official, _no_axes, _no_axes, scale=SHARES),
}

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("geneval", official.geneval, judged=False, scorer="geneval", samples_of=_geneval_samples),
        Suite("imgedit", official.imgedit, protocols=_IMGEDIT),
        Suite("vbench", official.vbench_subset, judged=False, scorer="vbench"),
        Suite("vbench_full", official.vbench, judged=False, scorer="vbench", samples_of=_vbench_samples),
        Suite("openve", official.openve, protocols=_OPENVE),
        Suite("covebench", covebench.covebench, protocols=_COVEBENCH),
        Suite("refvie", official.refvie, protocols=_REFVIE),
        Suite("ivbench_mi2v", official.ivbench_mi2v, protocols=_MI2V),
        Suite("ivbench_tiv2v", official.ivbench_tiv2v, protocols=_TIV2V),
        Suite("fashion", own.fashion),
        Suite("sample", own.sample),
    )
}


def suite(name: str) -> Suite:
    """A suite by name.

    Raises:
        UserError: naming the suites there are.
    """
    if name not in SUITES:
        raise UserError(f"suites: {name!r} is unknown; choose from {', '.join(SUITES)}")
    return SUITES[name]
