"""A judge's checklist as rewards: the shares of questions that were answered well."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.judges.inputs import media_for_item
from loomvideo.pipelines.evaluation.judges.rubrics import OwnChecklists, own_checklists
from loomvideo.pipelines.evaluation.judges.session import Judgement, joined
from loomvideo.pipelines.evaluation.outage import Outage
from loomvideo.pipelines.evaluation.suites.parsers import CHECKLIST_GROUPS, PRESERVED, UNION
from loomvideo.pipelines.evaluation.suites.registry import CHECKLIST
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest, labelled
from loomvideo.platform.errors import UserError

JUDGE = "judge"
JUDGED = (JUDGE, *(f"{JUDGE}_{group}" for group in (*CHECKLIST_GROUPS, UNION)))
"""The share of all questions, of each group, and 1 where everything was done and is plausible."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
AWAY = ("unreachable", "timeout", "rate limited", "server error")
"""Reasons that say nothing of a result: a judge that is away may come back."""


def is_away(failure: str) -> bool:
    """Whether why there are no figures is that the judge was away, as :class:`JudgedRewards` words it."""
    return failure.removeprefix(f"{JUDGE}: ") in AWAY


def groups_of(questions: Iterable[str]) -> set[str]:
    """The figures of :data:`JUDGED` that a checklist's questions give, besides their share."""
    groups = {question.partition("/")[0] for question in questions}
    return {f"{JUDGE}_{group}" for group in (groups | {UNION} if groups - {PRESERVED} else groups)}


@dataclass(frozen=True)
class JudgedRewards:
    """Asks a judge about results.

    Attributes:
        judge: Gives the judgement of a request, read as a checklist's.
        sampling: Frames that are shown.
        checklists: The questions.
        repeats: Independent judgements of a result; shares are their mean.
        threads: Results that are asked about at once.
        patience_s: How long a judge that is away is asked again, counted once for an outage.
    """

    judge: Callable[[VLMRequest], Judgement]
    sampling: FrameSampling
    checklists: OwnChecklists = field(default_factory=own_checklists)
    repeats: int = 1
    threads: int = 1
    patience_s: float = 0.0
    _outage: Outage = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_outage", Outage(self.patience_s))

    def __call__(self, video: np.ndarray, inputs: LoadedItem) -> tuple[dict[str, float], str]:
        """The figures of :data:`JUDGED` for a result uint8 [frames, height, width, 3], or why there are none.

        Raises:
            UserError: when the budget is spent; what was not judged is not a failure of its result.
        """
        question = self.checklists.question(inputs.item)
        parts = labelled(question.text, media_for_item(self.sampling, video, inputs.source, inputs.references))
        requests = [VLMRequest(parts, question.axes, repeat=n, choices=CHECKLIST.choices) for n in range(self.repeats)]
        parsed = [joined([self._ask(request)]).parsed for request in requests]
        read = [each for each in parsed if each.sample is not None]
        if not read:
            return {}, f"judge: {parsed[0].failure}"
        groups = {name for each in read for name in each.scores}
        figures = {JUDGE: _mean([each.sample or 0.0 for each in read])}
        return figures | {f"{JUDGE}_{name}": _mean([each.scores[name] for each in read]) for name in groups}, ""

    def _ask(self, request: VLMRequest) -> Judgement:
        pause_s = FIRST_PAUSE_S
        while True:
            judgement = self.judge(request)
            if judgement.parsed.failure == "budget":
                raise UserError(
                    "judge.budget_usd: spent; raise it and run again, the results that were judged are kept"
                )
            if judgement.parsed.failure not in AWAY:
                self._outage.is_over()
                return judgement
            if not self._outage.may_wait(pause_s):
                return judgement
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
