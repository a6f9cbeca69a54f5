"""The gate on made-up scores whose truth is known."""

import dataclasses

import numpy as np
import pytest

from loomvideo.pipelines.evaluation.gate import (
    FAILED,
    PASSED,
    UNDECIDED,
    GateRule,
    decide_gate,
    passing_power,
    sample_size_line,
    sources_needed,
)
from loomvideo.pipelines.evaluation.results import SavedSuite
from loomvideo.platform.errors import UserError

RULE = GateRule("s", "judge", margin=0.25)


def suite(scores, categories=None, status="complete", metric="judge", sources=None):
    rows = [
        {"key": str(n), "series": "model", "failure": "", "metrics": {metric: float(score)},
         "item": {"suite": "s", "key": str(n), "task": "t2v", "category": (categories or ["c"] * len(scores))[n],
                  "text": "x", "references": [], "cluster": str(n if sources is None else sources[n])}}
        for n, score in enumerate(scores)
    ]  # fmt: skip
    return {"s": SavedSuite("s", {"status": status}, rows, [])}


def decide(a, b, rule=RULE, **changes):
    return decide_gate(dataclasses.replace(rule, **changes), a, b)


def scores(n, shift=0.0, seed=0, noise=0.6):
    rng = np.random.default_rng(0)
    level = rng.normal(3, 0.6, n)
    return level + shift + np.random.default_rng(seed + 1).normal(0, noise, n)


def test_an_equal_model_passes_a_worse_one_fails_and_few_samples_do_not_tell():
    assert decide(suite(scores(400)), suite(scores(400, seed=5))).verdict == PASSED
    worse = decide(suite(scores(400)), suite(scores(400, -0.6, seed=5)))
    assert worse.verdict == FAILED
    assert "not by chance" in worse.reasons[0]
    few = decide(suite(scores(12)), suite(scores(12, seed=5)))
    assert few.verdict == UNDECIDED
    assert few.needed > 12
    # Four equal differences: no sign-flip test of four sources could be significant, whatever their bound says.
    assert decide(suite([3, 3, 3, 3]), suite([4, 4, 4, 4])).verdict == UNDECIDED


def test_a_gain_that_is_asked_for_has_to_be_shown():
    better = suite(scores(400, 0.4, seed=5))
    assert decide(suite(scores(400)), better, min_gain=0.2).verdict == PASSED
    assert decide(suite(scores(400)), better, min_gain=0.43).verdict != PASSED


def test_a_category_vetoes_only_when_its_loss_is_shown():
    names = ["a", "b"] * 200
    lost = scores(400, seed=5) - np.where(np.array(names) == "b", 1.0, -1.0)
    found = decide(suite(scores(400), names), suite(lost, names), max_regress=0.5)
    assert found.verdict == FAILED
    assert found.reasons == tuple(r for r in found.reasons if r.startswith("s/judge/b: lost"))
    assert decide(suite(scores(400), names), suite(lost, names), max_regress=1.5).verdict == PASSED


def test_incomplete_and_unlike_runs_do_not_pass():
    base = suite(scores(400))
    assert "the candidate's run is partial" in decide(base, suite(scores(400), status="partial")).reasons[0]
    assert "1 samples are in one run alone" in decide(base, suite(scores(399))).reasons[0]
    other = suite(scores(400))
    other["s"].header["judge"] = "another"
    assert "judge differs" in decide(base, other).reasons[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "sharpness"}, "neither high nor low is better"),
        ({"metric": "flicker"}, "improves by doing nothing; to gate on it all the same say --idle"),
        ({"metric": "fvd", "margin": None}, "has no margin of its own"),
        ({"margin": -0.1}, "must be above 0; to ask for a gain use --min-gain"),
        ({"p": 0.7}, "must be above 0 and under 0.5"),
    ],
)
def test_rules_that_mean_nothing(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RULE, **changes).threshold()


def test_false_passes_and_power_are_as_stated():
    rng = np.random.default_rng(3)
    n, margin, trials = 60, 0.25, 150
    passes = {0.0: 0, -margin: 0}
    for shift in passes:
        for _ in range(trials):
            a = rng.normal(3, 0.6, n)
            b = a + shift + rng.normal(0, 0.8, n)
            passes[shift] += decide(suite(a), suite(b), margin=margin).verdict == PASSED
    power = passing_power(margin, 0.8, n, 0.05)
    assert passes[-margin] / trials <= 0.1
    assert abs(passes[0.0] / trials - power) < 0.12
    needed = sources_needed(margin, 0.8, 0.05)
    assert passing_power(margin, 0.8, needed, 0.05) >= 0.8 > passing_power(margin, 0.8, needed - 1, 0.05)


def test_the_sample_size_line_says_what_can_be_told():
    assert "431 sources detect a judge difference of 0.1" in sample_size_line("openve", 431)
    assert "4 sources: too few samples to tell" in sample_size_line("mine", 4)
