"""Statistics checked by simulation against the truth that generated the data, and against hand-computed cases."""

import numpy as np
import pytest

from loomvideo.pipelines.evaluation import statistics
from loomvideo.pipelines.evaluation.arena import Match, bradley_terry, match_from_orders, position_bias


def judge_scores(rng, num_clusters, per_cluster, mean=3.2, between=0.7, within=0.8):
    """Clustered, rounded 1..5 scores as a judge gives them, and the cluster of each."""
    centres = rng.normal(mean, between, num_clusters).repeat(per_cluster)
    scores = np.clip(np.rint(centres + rng.normal(0, within, centres.shape)), 1, 5)
    return scores, np.repeat(np.arange(num_clusters), per_cluster).astype(str)


TRUTH = judge_scores(np.random.default_rng(99), 200_000, 1)[0].mean()


@pytest.mark.parametrize(("num_clusters", "per_cluster"), [(120, 1), (30, 4), (8, 5)])
def test_interval_covers_the_truth_in_93_to_97_percent(num_clusters, per_cluster):
    rng = np.random.default_rng(5)
    trials, covered = 800, 0
    for trial in range(trials):
        scores, clusters = judge_scores(rng, num_clusters, per_cluster)
        estimate = statistics.bootstrap_mean(scores, clusters, resamples=600, seed=trial)
        covered += estimate.low <= TRUTH <= estimate.high
    assert 0.93 <= covered / trials <= 0.97


def test_interval_of_the_macro_mean_covers():
    rng = np.random.default_rng(6)
    sizes, means = [40, 25, 15], np.array([2.0, 3.0, 4.5])
    categories = np.repeat(["a", "b", "c"], sizes)
    trials, covered = 600, 0
    for trial in range(trials):
        scores = np.repeat(means, sizes) + rng.normal(0, 1, sum(sizes))
        estimate = statistics.bootstrap_mean(scores, np.arange(80).astype(str), categories, resamples=600, seed=trial)
        covered += estimate.low <= means.mean() <= estimate.high
    assert 0.93 <= covered / trials <= 0.97


def test_ignoring_clusters_would_cover_too_little():
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        scores, _ = judge_scores(rng, 30, 4)
        naive = statistics.bootstrap_mean(scores, np.arange(len(scores)).astype(str), resamples=400, seed=trial)
        covered += naive.low <= TRUTH <= naive.high
    assert covered / 200 < 0.92


def test_false_positive_rate_and_power_of_the_paired_test():
    rng = np.random.default_rng(8)
    trials, false_alarms, found = 300, 0, 0
    for trial in range(trials):
        centres = rng.normal(3, 0.8, 40).repeat(3)
        clusters = np.repeat(np.arange(40), 3).astype(str)
        a, b = (centres + rng.normal(0, 0.7, 120) for _ in range(2))
        null = statistics.paired_test(a, b, clusters, seed=trial)
        false_alarms += null.permutation_p < 0.05
        found += statistics.paired_test(a, b + null.detectable(), clusters, seed=trial).permutation_p < 0.05
    assert 0.025 <= false_alarms / trials <= 0.08
    assert 0.7 <= found / trials <= 0.9


def test_sign_flip_test_is_exact_for_few_clusters():
    # All of four differences positive: 2 of the 16 sign patterns are as extreme.
    assert statistics.sign_flip_test(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(2 / 16)
    assert statistics.sign_flip_test(np.array([1.0, -1.0])) == 1


def test_paired_test_uses_shared_valid_samples_only():
    a = np.array([1, 2, np.nan, 4.0])
    b = np.array([2, np.nan, 3, 5.0])
    result = statistics.paired_test(a, b, ["x", "y", "z", "w"])
    assert (result.num_samples, result.num_clusters, result.difference) == (2, 2, 1.0)
    assert statistics.paired_test(a, a, ["x", "y", "z", "w"]).permutation_p == 1


def test_holm_steps_down():
    adjusted = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": float("nan")})
    assert adjusted["a"] == pytest.approx(0.03)
    assert adjusted["c"] == adjusted["b"] == pytest.approx(0.06)
    assert np.isnan(adjusted["d"])


def test_micro_and_macro_means():
    scores = np.array([1.0, 1, 1, 5, np.nan])
    categories = ["a", "a", "a", "b", "b"]
    assert statistics.micro_mean(scores) == 2
    estimate = statistics.bootstrap_mean(scores, list("vwxyz"), categories)
    assert (estimate.value, estimate.num_samples, estimate.num_clusters) == (3, 4, 4)
    assert np.isnan(statistics.bootstrap_mean(np.full(3, np.nan), list("abc")).value)
    assert np.isnan(statistics.bootstrap_mean(np.ones(3), ["s"] * 3).low)


def test_reliability_recovers_the_variance_ratio():
    rng = np.random.default_rng(3)
    truth = rng.normal(0, 1, 4000)
    repeats = truth[:, None] + rng.normal(0, 0.5, (4000, 3))
    reliability = statistics.test_retest(repeats)
    assert reliability.icc == pytest.approx(1 / 1.25, abs=0.02)
    assert reliability.icc_mean == pytest.approx(1 / (1 + 0.25 / 3), abs=0.02)
    assert reliability.deviation == pytest.approx(0.5, abs=0.02)
    assert statistics.test_retest(np.array([[1.0, 1], [2, 3], [4, np.nan]])).changed == 0.5


def test_agreement_with_people():
    human = np.array([1.0, 2, 3, 4, 5, np.nan])
    same = statistics.agreement(human, human)
    assert (same.exact, same.weighted_kappa, same.bias, same.num_items) == (1, 1, 0, 5)
    assert same.spearman == pytest.approx(1)
    reversed_ = statistics.agreement(6 - human, human)
    assert reversed_.weighted_kappa == pytest.approx(-1)
    lenient = statistics.agreement(np.minimum(human + 1, 5), human)
    assert lenient.within_one == 1
    assert lenient.bias == pytest.approx(0.8)


def test_bradley_terry_recovers_strengths_and_order():
    rng = np.random.default_rng(1)
    truth = {"a": 1150.0, "b": 1000.0, "c": 850.0}
    matches = []
    for item in range(400):
        for x, y in (("a", "b"), ("b", "c"), ("a", "c")):
            p = 1 / (1 + 10 ** ((truth[y] - truth[x]) / 400))
            matches.append(Match(x, y, float(rng.random() < p), str(item)))
    strengths = bradley_terry(matches)
    assert [s.model for s in strengths] == ["a", "b", "c"]
    for strength in strengths:
        assert strength.low < truth[strength.model] < strength.high
        assert strength.rating == pytest.approx(truth[strength.model], abs=35)


def test_order_swap_cancels_a_position_bias():
    assert match_from_orders("a", "b", "i", forward=1, swapped=0).outcome == 0.5
    assert match_from_orders("a", "b", "i", forward=1, swapped=1).outcome == 1
    assert position_bias([(1, 1), (1, 0), (0, 0), (0.5, 0.5)]) == 0.25
