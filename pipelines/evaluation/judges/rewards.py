"""A judge's checklist as rewards: the shares of questions that were answered well."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.judges.inputs import media_for_item
from loomvideo.pipelines.evaluation.judges.rubrics import OwnChecklists, own_checklists
from loomvideo.pipelines.evaluation.judges.session import Judgement, joined
from loomvideo.pipelines.evaluation.suites.parsers import CHECKLIST_GROUPS, UNION
from loomvideo.pipelines.evaluation.suites.registry import CHECKLIST
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest, labelled

JUDGE = "judge"
JUDGED = (JUDGE, *(f"{JUDGE}_{group}" for group in (*CHECKLIST_GROUPS, UNION)))
"""The share of all questions, of each group, and 1 where everything was done and is plausible."""


@dataclass(frozen=True)
class JudgedRewards:
    """Asks a judge about results.

    Attributes:
        judge: Gives the judgement of a request, read as a checklist's.
        sampling: Frames that are shown.
        checklists: The questions.
        repeats: Independent judgements of a result; shares are their mean.
        threads: Results that are asked about at once.
    """

    judge: Callable[[VLMRequest], Judgement]
    sampling: FrameSampling
    checklists: OwnChecklists = field(default_factory=own_checklists)
    repeats: int = 1
    threads: int = 1

    def __call__(self, video: np.ndarray, inputs: LoadedItem) -> tuple[dict[str, float], str]:
        """The figures of :data:`JUDGED` for a result uint8 [frames, height, width, 3], or why there are none."""
        question = self.checklists.question(inputs.item)
        parts = labelled(question.text, media_for_item(self.sampling, video, inputs.source, inputs.references))
        requests = [VLMRequest(parts, question.axes, repeat=n, choices=CHECKLIST.choices) for n in range(self.repeats)]
        parsed = [joined([self.judge(request)]).parsed for request in requests]
        read = [each for each in parsed if each.sample is not None]
        if not read:
            return {}, f"judge: {parsed[0].failure}"
        groups = {name for each in read for name in each.scores}
        figures = {JUDGE: _mean([each.sample or 0.0 for each in read])}
        return figures | {f"{JUDGE}_{name}": _mean([each.scores[name] for each in read]) for name in groups}, ""


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
