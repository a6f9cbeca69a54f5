"""How steady a judge's scores and its checklist answers are when asked again, on the same samples.

    python benchmarks/judge_steadiness.py [--repeats 3] [--sources 40] [--noise 0.6]

Uses the pixel judge, whose answers carry a noise of their own per question and repeat: it stands for a judge that
hesitates near a border, and shows what the two forms make of the same hesitation. A real judge is measured by
``judge.repeats=3`` in either mode, which logs the same figures.
"""

import argparse

import numpy as np

from loomvideo.pipelines.evaluation.judges.fake import PixelJudge
from loomvideo.pipelines.evaluation.judges.inputs import media_for_item
from loomvideo.pipelines.evaluation.judges.rubrics import own_checklists, own_rubrics
from loomvideo.pipelines.evaluation.statistics import item_agreement, test_retest
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.evaluation.suites.parsers import checked, checklist_json, strict_json
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest, labelled


def films(skill: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A source and an edit of it that is done by a share ``skill`` and noisy otherwise."""
    source = np.repeat(rng.integers(0, 256, (1, 8, 8, 3)).repeat(8, 1).repeat(8, 2), 4, 0).astype(np.float32)
    edited = source.copy()
    edited[:, 8:40, 8:40] += skill * (np.array([220, 20, 20]) - edited[:, 8:40, 8:40])
    edited += rng.normal(0, 14 * (1 - skill), edited.shape)
    return source.astype(np.uint8), np.clip(edited, 0, 255).astype(np.uint8)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sources", type=int, default=40)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.3, 0.6, 1.2])
    arguments = parser.parse_args()
    item = EvalItem("fashion", "k", "video_edit", "garment_text", "make the coat red", source="s.mp4")
    forms = {"scores 1 to 5": (own_rubrics(), (1, 2, 3, 4, 5)), "checklist": (own_checklists(), ("yes", "no"))}
    print("| judge's noise | form | answers changed | samples changed | ICC of one judgement | ICC of the mean |")
    print("|--:|---|--:|--:|--:|--:|")
    for noise in arguments.noise:
        judge = PixelJudge(noise)
        for name, (rubrics, choices) in forms.items():
            question = rubrics.question(item)
            rng = np.random.default_rng(0)
            samples, answers = [], []
            for _ in range(arguments.sources):
                source, edited = films(rng.random(), rng)
                media = media_for_item(FrameSampling(4, 64), edited, source, [])
                told = []
                for repeat in range(arguments.repeats):
                    request = VLMRequest(labelled(question.text, media), question.axes, repeat=repeat, choices=choices)
                    reply = judge.complete(request).text
                    if choices[0] == "yes":
                        told.append(checked([checklist_json(reply, question.axes)]))
                    else:
                        told.append(strict_json(reply, question.axes))
                samples.append([parsed.sample for parsed in told])
                answers.append([parsed.answers or parsed.scores for parsed in told])
            found = test_retest(np.array(samples))
            changed = 1 - item_agreement(answers)
            cells = f"{changed:.0%} | {found.changed:.0%} | {found.icc:.3f} | {found.icc_mean:.3f}"
            print(f"| {noise:g} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
