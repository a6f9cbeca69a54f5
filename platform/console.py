"""What people see in a terminal, alike in every command: lines as they are, tables without frames, bars of progress.

Texts are printed as typed: a prompt such as ``[red] dress`` is no markup. Colours come from :func:`coloured`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

WIDTH = 160
"""Columns where the output is no terminal: a log keeps the rows of a table whole."""


def console(stderr: bool = False) -> Console:
    """Where a command prints.

    Args:
        stderr: Whether it is no part of the result: warnings, progress.
    """
    made = Console(markup=False, stderr=stderr)
    return made if made.is_terminal else Console(markup=False, stderr=stderr, width=WIDTH)


def table(*headers: str, title: str = "", figures: bool = False) -> Table:
    """An empty table.

    Args:
        headers: One a column; none for a table of names and values.
        title: Over the table.
        figures: Whether all columns but the first, and those without a header, stand to the right.
    """
    made = Table(
        title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=bool(headers)
    )  # fmt: skip
    for number, header in enumerate(headers):
        made.add_column(header, justify="right" if figures and number and header else "left", overflow="fold")
    return made


def table_of(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table | Text:
    """A table of rows with the same keys, which are its headers; of no rows the title alone."""
    if not rows:
        return Text(title)
    made = table(*rows[0], title=title)
    for row in rows:
        made.add_row(*(f"{value:.0f}" if isinstance(value, float) else str(value) for value in row.values()))
    return made


def values_table(values: Mapping[str, Any], title: str = "") -> Table:
    """A table of names and values; what is a list or mapping is left out."""
    made = table(title=title)
    for name, value in values.items():
        if not isinstance(value, (dict, list)):
            made.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    return made


def coloured(text: str, colour: str) -> Text:
    """A table's cell in a colour; an empty one gives none."""
    return Text(text, style=colour)


def bars(*fields: str, remaining: bool = True, in_logs: bool = True, on: Console | None = None) -> Progress:
    """Bars of progress, one a task: description, done of total, the named fields, time gone and left.

    Args:
        fields: Fields of the tasks that are shown, such as a rate.
        remaining: Whether the time left is shown.
        in_logs: Whether the last state is written where the output is no terminal.
        on: Where; stderr when unset.
    """
    on = on or console(stderr=True)
    shown = [TextColumn(f"{{task.fields[{field}]}}") for field in fields]
    times = [TimeElapsedColumn(), *([TimeRemainingColumn()] if remaining else [])]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *shown, *times)
    return Progress(*columns, console=on, disable=not (in_logs or on.is_terminal))
