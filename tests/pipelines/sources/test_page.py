"""Every line of the page's tables of inputs is a test: a line that is added, changed or dropped has to name its own."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]
ROWS, MEDIA = "sources/test_rows.py", "media/test_corpus.py"
ODD, PROFILES, DECODE = "media/test_odd_videos.py", "media/test_profiles.py", "media/test_decode.py"

# The first words of a line's input, and the tests that show what the line says happens.
TESTS = {
    "a caption that is a number": [f"{ROWS}::test_a_bad_value_costs_its_row"],
    "half of a surrogate pair": [f"{ROWS}::test_a_bad_value_costs_its_row"],
    "bytes that are not UTF-8": [f"{ROWS}::test_an_encoding_is_asked_for_and_never_guessed"],
    "no JSON, nested too deeply": [f"{ROWS}::test_a_line_that_is_no_object_costs_itself"],
    "NaN, blank; `nan`": [
        f"{ROWS}::test_a_bad_value_costs_its_row",
        f"{ROWS}::test_cells_that_stand_for_nothing_and_rows_of_another_length",
    ],
    "`references` that is one text": [f"{ROWS}::test_a_value_with_one_meaning_takes_it"],
    "a key like `17.0`": [
        f"{ROWS}::test_any_key_becomes_a_safe_one_and_can_be_asked_for",
        f"{ROWS}::test_a_value_with_one_meaning_takes_it",
        f"{ROWS}::test_twins_keep_apart",
    ],
    "`split` of `validation`": [
        f"{ROWS}::test_a_value_with_one_meaning_takes_it",
        f"{ROWS}::test_a_bad_value_costs_its_row",
    ],
    "`extra.fps` of `30000/1001`": [
        f"{ROWS}::test_a_value_with_one_meaning_takes_it",
        f"{ROWS}::test_a_bad_value_costs_its_row",
    ],
    "a row that repeats another": [f"{ROWS}::test_a_row_that_repeats_another_but_for_spaces_is_a_duplicate"],
    "CSV with `;`, tabs": [f"{ROWS}::test_tables_as_spreadsheets_write_them"],
    "a row of more or fewer cells": [f"{ROWS}::test_cells_that_stand_for_nothing_and_rows_of_another_length"],
    "an empty, cut or unreadable table": [
        f"{ROWS}::test_a_damaged_table_costs_itself",
        f"{ROWS}::test_hidden_files_links_and_odd_names",
    ],
    "a row of another shape": [f"{ROWS}::test_a_row_of_another_shape_than_published_costs_itself"],
    "a workbook, a web page": [
        f"{ROWS}::test_what_is_no_table_says_what_it_is",
        f"{ROWS}::test_a_spreadsheet_is_asked_for_as_csv",
    ],
    "names with `#`, `?v=1`": [f"{ROWS}::test_hidden_files_links_and_odd_names", f"{ROWS}::test_paths_of_rows"],
    "200,000 files in one folder": [f"{ROWS}::test_the_cost_of_a_folder_grows_with_its_files"],
    "EXIF orientations 1 to 8": [f"{MEDIA}::test_exif_orientations", f"{MEDIA}::test_display_matrices"],
    "pixels that are not square": [f"{MEDIA}::test_pixels_are_square"],
    "pictures with a colour profile": [
        f"{MEDIA}::test_colour_profiles_are_followed",
        f"{MEDIA}::test_a_broken_profile_is_taken_as_srgb",
        f"{PROFILES}::test_rgb_spaces",
        f"{PROFILES}::test_inks_of_a_press",
    ],
    "ICO, JPEG 2000, PSD": [f"{MEDIA}::test_pictures_of_other_programs"],
    "a pipe, a socket": [f"{MEDIA}::test_what_has_no_end_is_not_read"],
    "a URL of a store": [f"{MEDIA}::test_a_url_that_nothing_reads_costs_its_sample"],
    "16 bits, palettes, grey": [f"{MEDIA}::test_every_mode_becomes_rgb"],
    "transparency, in pictures": [f"{MEDIA}::test_transparency_is_white", f"{MEDIA}::test_alpha_is_laid_over_white"],
    "a phone's JPEG with a second": [
        f"{MEDIA}::test_a_phone_jpeg_with_a_second_picture_and_a_scan_of_pages_are_pictures"
    ],
    "animated GIF, WebP": [f"{MEDIA}::test_animations_play_at_the_speed_of_browsers"],
    "a stream-copied cut": [f"{MEDIA}::test_cuts_that_start_off_a_key_frame_begin_at_the_next"],
    "an edit list": [f"{ODD}::test_an_edit_list_hides_what_players_hide"],
    "raw H.264, AVI": [f"{MEDIA}::test_frames_come_in_the_order_shown_with_and_without_timestamps"],
    "variable rate, late": [
        f"{DECODE}::test_variable_rate_is_read_by_time",
        f"{MEDIA}::test_a_fragmented_file_and_one_that_starts_late",
        f"{MEDIA}::test_speeds",
    ],
    "interlaced": [f"{MEDIA}::test_interlaced_video_shows_one_moment_a_frame"],
    "10 bits, 4:2:2": [f"{MEDIA}::test_codecs_and_formats_show_the_same_colours"],
    "720 lines and more": [f"{MEDIA}::test_high_definition_without_a_tag_is_bt709_as_players_take_it"],
    "PQ or HLG": [f"{MEDIA}::test_high_dynamic_range_has_its_reason"],
    "two video streams": [f"{ODD}::test_of_two_video_streams_the_default_one_is_shown_as_in_players"],
    "three hours": [f"{ODD}::test_three_hours_are_read_where_they_are_asked_for"],
    "a file that grows": [
        f"{ODD}::test_a_file_that_grows_while_it_is_opened_has_its_reason",
        f"{ODD}::test_a_file_that_is_written_anew_is_opened_anew",
    ],
    "cover art beside sound": [f"{MEDIA}::test_cover_art_is_no_video_and_the_main_stream_is_shown"],
    "a web page, JSON, XML": [f"{MEDIA}::test_what_is_no_media_says_what_it_is"],
    "HEIC without": [f"{MEDIA}::test_what_is_no_media_says_what_it_is"],
    "0 bytes; cut files": [
        f"{MEDIA}::test_odd_pictures",
        f"{MEDIA}::test_what_is_no_media_says_what_it_is",
        f"{DECODE}::test_unusable_files_have_reasons",
        f"{DECODE}::test_truncated_with_index_in_front_is_found",
    ],
    "a name in another Unicode form": [
        f"{MEDIA}::test_a_name_in_another_unicode_form_is_found",
        f"{MEDIA}::test_a_remote_name_with_pattern_characters_is_one_file",
    ],
}


def inputs():
    """The first cells of the tables that say what happens."""
    page = (REPO / "docs/sources.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| input \| what happens \|\n\|[-|]+\|\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    assert len(tables) == 2
    return [re.split(r"(?<!\\) \| ", line[2:])[0] for table in tables for line in table.splitlines()]


@cache
def functions(file):
    """The tests of a file."""
    tree = ast.parse((REPO / "tests/pipelines" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("line", inputs())
def test_a_line_of_the_page_is_a_test(line):
    named = [tests for words, tests in TESTS.items() if line.startswith(words)]
    assert len(named) == 1, f"docs/sources.md has the input {line!r}, and no test is named for it here"
    for test in named[0]:
        file, _, name = test.partition("::")
        assert name in functions(file), test


def test_a_line_that_is_gone_leaves_no_name_here():
    lines = inputs()
    assert [words for words in TESTS if not any(line.startswith(words) for line in lines)] == []
