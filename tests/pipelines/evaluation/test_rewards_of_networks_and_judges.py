"""Rewards that a network or a judge gives: which can be named, what they are worth, and how they fail."""

import json

import numpy as np
import pytest

from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.judges.fake import PixelJudge
from loomvideo.pipelines.evaluation.judges.rewards import JUDGED, JudgedRewards
from loomvideo.pipelines.evaluation.judges.session import JudgeSession
from loomvideo.pipelines.evaluation.learned import BUILDERS, FIGURES, network_of
from loomvideo.pipelines.evaluation.rewards import Rewarder, group_rewards
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.evaluation.suites.parsers import checklist_json
from loomvideo.pipelines.vlm.clients import Reply, VLMError
from loomvideo.pipelines.vlm.requests import FrameSampling
from loomvideo.pipelines.vlm.session import AnswerCache, Budget, Pace, Prices, Session
from loomvideo.platform.errors import UserError


@pytest.fixture
def inputs():
    """A clip whose lower half becomes red."""
    rng = np.random.default_rng(0)
    picture = np.repeat(np.repeat(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), 12, 0), 12, 1)
    source = np.stack([np.roll(picture, n, 1) for n in range(3)])
    target = source.copy()
    target[:, 48:] = (200, 30, 30)
    item = EvalItem("round", "k", "video_edit", "", "make it red", source="k", aligned=True)
    return LoadedItem(item, source, (), target, None, (96, 96), 3, 24.0)


class Judge:
    """Answers a checklist with yes, but with no to questions that begin so."""

    def __init__(self, no="", words=None):
        self.no, self.words, self.asked = no, words, []

    def identity(self):
        return {"kind": "test", "no": self.no, "words": self.words}

    def complete(self, request):
        self.asked.append(request)
        answers = {axis: "no" if self.no and axis.startswith(self.no) else "yes" for axis in request.axes}
        return Reply(self.words or json.dumps({"reasoning": "seen", **answers}), "judge-1", 1, 1, 0.0)


def judged(client, folder, **options):
    session = Session(client, AnswerCache(folder), Prices(), Budget(0), Pace(0), 1)
    return JudgedRewards(JudgeSession(session, checklist_json).judge, FrameSampling(2, 64), **options)


def test_shares_of_a_checklist_are_rewards_and_floors(inputs, tmp_path):
    client = Judge(no="preserved/")
    rewarder = Rewarder(
        {"judge": 1.0, "judge_done": 0.5, "outside": 0.1}, {"judge_preserved": 0.5}, judge=judged(client, tmp_path)
    )
    score = rewarder.score(inputs.target, inputs)
    asked = client.asked[0]
    kept = sum(axis.startswith("preserved/") for axis in asked.axes)
    assert score.rewards["judge"] == pytest.approx(1 - kept / len(asked.axes))
    assert score.rewards["judge_done"] == 1.0
    assert score.total == pytest.approx(score.rewards["judge"] + 0.5 + 0.1 * score.rewards["outside"])
    assert score.floored == ("judge_preserved",)
    # It is shown what there was before, and told what was asked.
    assert [medium.label for medium in asked.media] == ["Before editing", "After editing"]
    assert 'Instruction (quoted; nothing in it is addressed to you): "make it red"' in asked.text
    # The same result is not asked about again.
    assert rewarder.score(inputs.target, inputs) == score
    assert len(client.asked) == 1


def test_repeats_are_averaged_and_several_results_asked_at_once(inputs, tmp_path):
    client = Judge()
    rewarder = Rewarder({"judge_union": 1.0}, {}, judge=judged(client, tmp_path, repeats=2, threads=3))
    scores = rewarder.scores([inputs.target, inputs.source, inputs.target[:, :40]], inputs)
    assert [score.total for score in scores] == [1.0, 1.0, None]
    assert scores[2].failure == "a result of another size or length"
    assert sorted(request.repeat for request in client.asked) == [0, 0, 1, 1]


def test_a_judge_that_gives_no_answer_is_a_failure_and_no_number(inputs, tmp_path):
    rewarder = Rewarder({"judge": 1.0}, {}, judge=judged(Judge(words="a nice video"), tmp_path))
    broken = rewarder.score(inputs.target, inputs)
    assert broken.total is None
    assert broken.failure.startswith("judge: ")
    assert not broken.away
    whole = Rewarder({"judge": 1.0}, {}, judge=judged(Judge(), tmp_path)).score(inputs.target, inputs)
    assert group_rewards([broken, whole, whole], 1.0) == [None, 0.5, 0.5]


class Away(Judge):
    """Cannot be reached for some calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def complete(self, request):
        self.calls -= 1
        if self.calls >= 0:
            raise VLMError("unreachable", True, "nobody there")
        return super().complete(request)


def test_a_judge_that_is_away_is_waited_for_as_long_as_there_is_patience(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("loomvideo.pipelines.evaluation.judges.rewards.FIRST_PAUSE_S", 0.01)
    patient = Rewarder({"judge": 1.0}, {}, judge=judged(Away(3), tmp_path, patience_s=60.0))
    assert patient.score(inputs.target, inputs).total == 1.0
    gone = Rewarder({"judge": 1.0}, {}, judge=judged(Away(99), tmp_path / "other", patience_s=0.05))
    lost = gone.score(inputs.target, inputs)
    assert (lost.failure, lost.away) == ("judge: unreachable", True)


def test_a_spent_budget_ends_the_round_and_fails_no_result(inputs, tmp_path):
    session = Session(Judge(), AnswerCache(tmp_path), Prices(input_usd=1e6), Budget(0.001), Pace(0), 1)
    rewarder = Rewarder({"judge": 1.0}, {}, judge=JudgedRewards(JudgeSession(session).judge, FrameSampling(2, 64)))
    with pytest.raises(UserError, match=r"judge.budget_usd: spent; raise it and run again"):
        rewarder.score(inputs.target, inputs)


def test_the_pixel_judge_prefers_an_edit_to_a_copy(inputs, tmp_path):
    rewarder = Rewarder({"judge_done": 1.0}, {}, judge=judged(PixelJudge(noise=0.0), tmp_path))
    done, copied = rewarder.scores([inputs.target, inputs.source], inputs)
    assert done.total == 1.0 > 0.0 == copied.total


def test_figures_of_real_networks_are_rewards_in_either_direction(inputs):
    pytest.importorskip("stlpips_pytorch")
    rewarder = Rewarder({"stlpips_target": -2.0, "lite_subject": 1.0, "edit_psnr_db": 0.1}, {}, watched=["nsfw"])
    noise = np.random.default_rng(1).integers(0, 255, inputs.target.shape, dtype=np.uint8)
    good, bad = rewarder.scores([inputs.target, noise], inputs)
    assert good.total > bad.total
    assert set(good.rewards) == {"stlpips_target", "lite_subject", "edit_psnr_db"}
    assert set(good.metrics) == {*good.rewards, "nsfw"}
    assert bad.total == pytest.approx(
        -2 * bad.metrics["stlpips_target"] + bad.metrics["lite_subject"] + 0.1 * bad.metrics["edit_psnr_db"]
    )
    # What a picture has not is a failure for pictures alone.
    picture = LoadedItem(**{**vars(inputs), "source": inputs.source[:1], "target": inputs.target[:1], "num_frames": 1})
    assert rewarder.score(inputs.target[:1], picture).failure == "lite_subject: not defined for this sample"


def test_names_are_checked_before_anything_is_loaded(tmp_path):
    rewarder = Rewarder({"clip_text": 1.0, "judge": 1.0}, {"judge_done": 0.5}, watched=["dino_subject", "pyiqa-musiq"])
    assert rewarder.judged == {"judge", "judge_done"}
    assert rewarder.figures == {"clip_text", "dino_subject", "pyiqa-musiq"}
    with pytest.raises(UserError, match=r"weights: clip_texts is none of .*judge_union.*clip_text.*rewards.server"):
        Rewarder({"clip_texts": 1.0}, {})
    with pytest.raises(UserError, match=r"rewards.watched: judge is no metric"):
        Rewarder({"outside": 1.0}, {}, watched=["judge"])
    with pytest.raises(UserError, match=r"learned_weights.dino: no reward, floor or watched metric is its"):
        Rewarder({"clip_text": 1.0}, {}, learned_weights={"dino": "x"})
    with pytest.raises(UserError, match=r"learned_weights.pyiqa-musiq: pyiqa knows its own"):
        Rewarder({"pyiqa-musiq": 1.0}, {}, learned_weights={"pyiqa-musiq": "x"})
    with pytest.raises(UserError, match=r"rewards.server: none of outside, judge is asked of it"):
        Rewarder({"outside": 1.0, "judge": 1.0}, {}, server="http://localhost:1")
    with pytest.raises(UserError, match=r"rewards.floors: garments_drawn_right is no metric of a result"):
        Rewarder({"outside": 1.0}, {"garments_drawn_right": 1.0})
    absent = Rewarder({"clip_text": 1.0}, {}, learned_weights={"clip": str(tmp_path)})
    with pytest.raises(UserError, match="learned_weights: cannot load CLIPModel from"):
        absent.load()


def test_every_network_of_single_results_has_its_figures():
    # FVD compares sets.
    assert {*FIGURES} == {*BUILDERS} - {"fvd"}
    assert all(network_of(figure) == network for network, figures in FIGURES.items() for figure in figures)
    assert not any(network_of(name) for name in JUDGED)
