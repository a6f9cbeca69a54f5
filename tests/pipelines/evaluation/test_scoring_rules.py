"""Official answer forms and totals on hand-computed cases."""

import json

import pytest

from loomvideo.pipelines.evaluation.suites import geneval, protocols, vbench
from loomvideo.pipelines.evaluation.suites.geneval import Detection
from loomvideo.pipelines.evaluation.suites.parsers import (
    PARSERS,
    REFVIE_BACKGROUND_AXES,
    REFVIE_SUBJECT_AXES,
    Parsed,
)
from loomvideo.pipelines.evaluation.suites.protocols import Judged
from loomvideo.platform.errors import UserError

AXES = ("A", "B", "C")
FAILED = Parsed(None, {}, failure="unparsable")
REFUSAL = "I'm sorry, I can't help with evaluating pictures of people."


def score(parser, reply, axes=AXES):
    return PARSERS[parser](reply, axes).sample


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Prompt Compliance: 4\nNaturalness: 3\nDetail: 3", 3.33),
        ("**Prompt Compliance**: 4\n- Naturalness: 5", 4.5),
        ("Prompt Compliance: 4/5\nNaturalness: 3.0\nDetail: 2", 2),
        ("Prompt Compliance: 4**\n", None),
        ("Note: one: 4", None),
        ("  Prompt Compliance: 4   ", 4),
        (REFUSAL, None),
    ],
)
def test_imgedit_counts_lines_of_name_colon_digits(reply, expected):
    assert score("imgedit-official", reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Brief reasoning: good.\nA: 4\nB: 3\nC: 3", 3.33),
        ("Brief reasoning: 2 cats.\nA: 4\nB: 4\nC: 4", 3.5),
        ("**A:** 4\nB: 4/5\nC: 3.5", 3.75),
        ("A：4", None),
        ("ERROR: All retries exhausted", None),
        (REFUSAL, None),
    ],
)
def test_openve_counts_every_number_after_a_colon(reply, expected):
    assert score("openve-official", reply) == expected


def refvie_reply(values, axes=REFVIE_SUBJECT_AXES, form="{axis}: {value}"):
    return "\n".join(form.format(axis=axis, value=value) for axis, value in zip(axes, values, strict=False))


def test_refvie_official_form():
    assert score("refvie-official", "Brief reasoning: x\n" + refvie_reply((4, 3, 3))) == pytest.approx(10 / 3)
    assert score("refvie-official", refvie_reply((4, 2), REFVIE_BACKGROUND_AXES)) == 3
    assert PARSERS["refvie-official"](refvie_reply((4, 6, 3)), ()).failure == "out of range"
    assert score("refvie-official", refvie_reply(("4/5", 3, 3))) is None
    assert score("refvie-official", refvie_reply((4, 3, 3), form="**{axis}**: {value}")) is None
    assert score("refvie-official", refvie_reply((4.6, 3, 3))) == pytest.approx(10 / 3)


def test_refvie_loomvideo_form_needs_all_three_axes():
    assert score("refvie-loomvideo", refvie_reply((4, 3, 3)), REFVIE_SUBJECT_AXES) == 3.33
    assert score("refvie-loomvideo", refvie_reply((4, 3, 3), form="- {axis}: {value}"), REFVIE_SUBJECT_AXES) == 3.33
    assert score("refvie-loomvideo", refvie_reply((4, 3)), REFVIE_SUBJECT_AXES) is None


@pytest.mark.parametrize(
    ("reply", "expected", "minimum"),
    [
        ('{"A": 4, "B": 3, "C": 3}', 3.33, 3),
        ('```json\n{"A": 4, "B": "5", "C": 3}\n```', 4, 3),
        ('Scores {"A": 9, "B": 0, "C": 3} done', 3, 1),
        ('{"A": 4, "B": 3}', None, None),
        ('{"A": "4/5", "B": 3, "C": 3}', None, None),
        ("[4, 3, 3]", None, None),
        (REFUSAL, None, None),
    ],
)
def test_ivbench_json_clamps_and_needs_every_axis(reply, expected, minimum):
    parsed = PARSERS["ivbench-official"](reply, AXES)
    assert (parsed.sample, parsed.minimum) == (expected, minimum)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"A": 4, "B": 3, "C": 2, "reasoning": "fine"}', 3),
        ('```json\n{"A": 5, "B": 5, "C": 5}\n```', 5),
        ('{"A": 4, "B": 3, "C": "2"}', None),
        ('{"A": 4, "B": 3, "C": 0}', None),
        ('{"A": 4, "B": 3, "C": true}', None),
        ('{"A": 4, "B": 3, "C": 2.5}', None),
        ("A: 4\nB: 3\nC: 2", None),
        (REFUSAL, None),
    ],
)
def test_strict_form_accepts_nothing_but_what_was_asked_for(reply, expected):
    assert score("strict", reply) == expected


def judged(category, sample, *scores, minimum=None):
    return Judged(category, Parsed(sample, {str(i): s for i, s in enumerate(scores)}, minimum))


def test_sample_mean_drops_failures_and_numbers_outside_the_scale():
    rows = [judged("x", 4.0), judged("x", 2.0), judged("y", 3.0), judged("y", 33.5), Judged("y", FAILED)]
    assert protocols.typed_sample_mean(rows) == {"x": 3.0, "y": 3.0, "overall_average": 3.0}
    assert protocols.imgedit_official(rows) == {"x": 3.0, "y": 18.25}


def test_openve_subsets_reproduce_published_arithmetic():
    # OpenVE-Edit-5B's published types give 2.50 over five types and 2.57 over six.
    published = {
        "global_style": 3.16, "background_change": 2.36, "local_change": 2.98,
        "local_remove": 1.85, "local_add": 2.15, "subtitle_edit": 2.91,
    }  # fmt: skip
    figures = protocols.openve([judged(name, value) for name, value in published.items()])
    assert figures["macro5"] == 2.5
    assert figures["macro6"] == 2.57
    assert "macro8" not in figures


def test_refvie_overall_is_the_mean_of_axis_scores():
    rows = [judged("subject", 4.0, 4, 4, 4), judged("background", 2.5, 2, 3), Judged("subject", FAILED)]
    figures = protocols.refvie_official(rows)
    assert figures["overall"] == pytest.approx((12 + 5) / 5)
    assert figures["background/Matting Quality & Temporal Stability"] == 3
    assert figures["background/Visual Harmony & Perspective"] == 0
    assert protocols.refvie_loomvideo(rows)["overall_average"] == 3.25


def test_ivbench_counts_failures_as_one_officially_and_drops_them_in_loomvideo():
    rows = [
        judged("1subject", 4.0, minimum=3.0),
        judged("1subject", 5.0, minimum=5.0),
        judged("2subject", 3.0, minimum=2.0),
        Judged("2subject", FAILED),
    ]
    figures = protocols.ivbench_official(rows)
    assert figures["overall/avg"] == (4 + 5 + 3 + 1) / 4
    assert figures["overall/min"] == (3 + 5 + 2 + 1) / 4
    assert figures["2subject/avg"] == 2
    assert protocols.ivbench_loomvideo(rows) == {"1subject": 4.5, "2subject": 3.0, "overall_average": 4.0}


def test_mi2v_axes_follow_subjects_and_background():
    assert protocols.mi2v_axes(1, False)[1] == "Subject Consistency"
    assert protocols.mi2v_axes(1, True)[1] == "Subject and Background Consistency"
    assert protocols.mi2v_axes(3, True)[1] == "Multi-Subject and Background Consistency"


def test_vbench_normalisation_and_totals():
    ceilings = {name: d.high for name, d in {**vbench.QUALITY, **vbench.SEMANTIC}.items()}
    floors = {name: d.low for name, d in {**vbench.QUALITY, **vbench.SEMANTIC}.items()}
    assert vbench.official_totals(ceilings).total == pytest.approx(1)
    assert vbench.official_totals(floors).total == pytest.approx(0)
    # Dynamic degree weighs a half of 6.5; quality weighs four fifths.
    assert vbench.official_totals({**floors, "dynamic_degree": 1.0}).quality == pytest.approx(0.5 / 6.5)
    assert vbench.official_totals({**floors, "scene": 0.4111}).total == pytest.approx(0.5 / 9 / 5)
    # Motion smoothness 0.99: (0.99 - 0.706) / 0.2915 = 0.974271.
    totals = vbench.official_totals({"motion_smoothness": 0.99})
    assert totals.quality == pytest.approx(0.9742710 / 6.5, abs=1e-6)
    assert len(totals.missing) == 15


def test_vbench_result_files_and_loomvideo_average(tmp_path):
    path = tmp_path / "x_eval_results.json"
    path.write_text(
        json.dumps({"imaging_quality": [69.0, []], "overall_consistency": [0.27, []], "subject_consistency": 0.935})
    )
    raw = vbench.read_results(path)
    assert vbench.loomvideo_average(raw) == pytest.approx((69 + 27 + 93.5) / 3)
    with pytest.raises(UserError, match="subject_consistency is missing"):
        vbench.loomvideo_average({"imaging_quality": 0.7, "overall_consistency": 0.2})
    path.write_text('{"subject_quality": [0.5, []]}')
    with pytest.raises(UserError, match="unknown VBench dimension"):
        vbench.read_results(path)


def box(x, y, size=20):
    return (x, y, x + size, y + size)


def test_geneval_counting_position_colour_and_exclusion():
    include = [{"class": "cup", "count": 2}]
    counting = {"tag": "counting", "include": include, "exclude": [{"class": "cup", "count": 3}]}
    cups = [Detection("cup", box(40 * i, 0), 0.95) for i in range(3)]
    assert geneval.judge_picture(counting, cups[:2]).correct
    assert "cup<3" in geneval.judge_picture(counting, cups).reason
    assert not geneval.judge_picture(counting, [cups[0], Detection("cup", box(90, 0), 0.8)]).correct
    assert geneval.judge_picture(
        {**counting, "tag": "two_object"}, [cups[0], Detection("cup", box(90, 0), 0.8)]
    ).correct

    position = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    }
    dog, cat = Detection("dog", box(100, 0), 0.9), Detection("cat", box(0, 5), 0.9)
    assert geneval.judge_picture(position, [dog, cat]).correct
    assert "left of" in geneval.judge_picture(position, [dog, Detection("cat", box(200, 0), 0.9)]).reason
    assert geneval.judge_picture(position, [cat]).reason.startswith("expected dog>=1, found 0")

    colour = {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}]}
    assert geneval.judge_picture(colour, [Detection("bus", box(0, 0), 0.4, "red")]).correct
    assert "red bus" in geneval.judge_picture(colour, [Detection("bus", box(0, 0), 0.4, "blue")]).reason


def test_geneval_positions_ignore_small_offsets():
    assert geneval.relative_position(Detection("a", box(0, 0), 1), Detection("b", box(3, 3), 1)) == set()
    assert geneval.relative_position(Detection("a", box(60, 60), 1), Detection("b", box(0, 0), 1)) == {
        "right of",
        "below",
    }


def test_geneval_overall_is_the_mean_of_tags():
    results = [("counting", True), ("counting", False), ("colors", True), ("colors", True), ("colors", True)]
    summary = geneval.summarise(results)
    assert summary["overall"] == 0.75
    assert summary["correct_images"] == 0.8
