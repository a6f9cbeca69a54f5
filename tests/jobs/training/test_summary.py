"""What a run says of its held-out edits in words."""

import pytest

from loomvideo.jobs.training.summary import HeldoutSample, wilson, words


def sample(group, **values):
    return HeldoutSample("a", "video_edit", group, "make it blue", values)


def test_words_count_colours_and_name_decibels():
    samples = [
        sample(
            f"g{n}",
            garment_colour_right=float(n != 0),
            outside_psnr_db=25.0 + n % 3,
            edit_psnr_db=22.0,
            gain_psnr_db=6.0,
            asked_area=0.3,
            wrong_instruction_psnr_db=17.0 - n % 2,
        )
        for n in range(20)
    ]
    lines = words(samples)
    assert lines[0] == "19 of 20 garments have the colour asked for (95%, 76% to 99%)"
    assert lines[1].startswith("outside the edit 25.9 dB (25.")
    assert "22.0 dB (22.0 to 22.0), 6.0 dB (6.0 to 6.0) over copying the source (20 edits)" in lines[2]
    assert lines[3].startswith("with another instruction 5.5 dB (")


def test_words_count_captions():
    samples = [sample(f"g{n}", garments_drawn_right=float(n % 4 != 0)) for n in range(20)]
    assert words(samples) == ["15 of 20 captions are drawn with their garments and colours (75%, 53% to 89%)"]


def test_small_edits_and_missing_figures_are_left_out():
    assert words([sample("a", sharpness=3.0)]) == []
    small = sample("a", edit_psnr_db=30.0, gain_psnr_db=1.0, asked_area=0.05, garment_colour_right=None)
    assert words([small]) == []


def test_interval_of_a_share():
    low, high = wilson(20, 24)
    assert (low, high) == (pytest.approx(0.641, abs=0.001), pytest.approx(0.933, abs=0.001))
    assert wilson(5, 5)[1] == 1.0
