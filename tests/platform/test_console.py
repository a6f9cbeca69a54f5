"""What commands print: texts as typed, tables that stay whole in a log, bars."""

import io

import pytest
from rich.console import Console

from loomvideo.platform.console import WIDTH, bars, coloured, console, table, table_of, values_table


def printed(content, width=WIDTH, **options) -> str:
    out = Console(file=io.StringIO(), markup=False, width=width, **options)
    out.print(content)
    return out.file.getvalue()


def test_texts_are_printed_as_typed(capsys):
    shown = table("prompt")
    shown.add_row("[red] dress")
    console().print(shown)
    console().print("[bold]")
    out = capsys.readouterr().out
    assert "[red] dress" in out
    assert "[bold]" in out


def test_a_coloured_cell_shows_its_text_alone():
    shown = table("check")
    shown.add_row(coloured("ok", "green"))
    assert printed(shown).split() == ["check", "ok"]
    assert "\x1b[32mok" in printed(shown, force_terminal=True, color_system="standard")


def test_figures_stand_to_the_right():
    shown = table("metric", "value", "", figures=True)
    shown.add_row("a", "1", "better")
    assert [column.justify for column in shown.columns] == ["left", "right", "left"]


def test_rows_and_values():
    assert printed(table_of([{"a": 1, "b": 2.0}, {"a": 3, "b": 4.4}], "both")).split() == [
        "both",
        "a",
        "b",
        "1",
        "2",
        "3",
        "4",
    ]
    assert printed(values_table({"loss": 0.123456, "name": "x", "more": [1]})).split() == [
        "loss",
        "0.1235",
        "name",
        "x",
    ]
    assert printed(table_of([])).strip() == ""
    assert printed(table_of([], "0 losses")).strip() == "0 losses"


def test_a_log_keeps_rows_whole(capsys):
    shown = table("words")
    shown.add_row("word " * 30)
    console().print(shown)
    assert "word " * 29 in capsys.readouterr().out


@pytest.mark.parametrize(("in_logs", "lines"), [(True, 1), (False, 0)])
def test_a_log_gets_the_last_state_of_a_bar_at_most(capsys, in_logs, lines):
    with bars("rate", in_logs=in_logs) as bar:
        task = bar.add_task("shards", total=2, rate="")
        bar.update(task, advance=2, rate="5 samples/s")
    assert capsys.readouterr().err.count("5 samples/s") == lines
