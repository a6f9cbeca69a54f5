"""Rows of CSV, TSV, JSON, JSONL and Parquet files, packed or not, as people and spreadsheets write them.

A line or file that cannot be read is a :class:`~loomvideo.pipelines.sources.base.Rejected` with its reason.
"""

import codecs
import csv
import json
import lzma
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loomvideo.pipelines.sources.base import Outcome, Place, Rejected, Root
from loomvideo.pipelines.sources.fields import FieldError, cell
from loomvideo.platform.errors import UserError

PACKED = (".gz", ".bz2", ".xz")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
TABLES = (*SUFFIXES, *(suffix + packed for suffix in SUFFIXES[:-1] for packed in PACKED))
DELIMITERS = ",;\t|"
MOST_LINES_A_ROW = 1000
"""Of a table: a quotation mark that closes no sooner was forgotten."""

Row = dict[str, Any]
Entry = tuple[str, Row] | Rejected
# What pyarrow, and the packers' libraries, raise for a damaged file.
_DAMAGE = (csv.Error, pa.ArrowException, EOFError, OSError, ValueError, OverflowError, lzma.LZMAError, zlib.error)


def plain_name(file: str) -> str:
    """A file's name in lower case without the suffix of its packing."""
    name = file.lower()
    return name.rpartition(".")[0] if name.endswith(PACKED) else name


def rows(place: Place, file: str, dataset: str) -> Iterator[Entry]:
    """``(where, row)`` of a table file below a root; lines that do not parse are rejected.

    Raises:
        UserError: for a suffix that is no table's.
    """
    suffix = Path(plain_name(file)).suffix
    name = place.root.path(file)
    readers = {
        ".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows,
        ".parquet": _parquet_rows,
    }  # fmt: skip
    if suffix not in readers:
        raise UserError(f"{name}: expected a table ending in {', '.join(SUFFIXES)}")
    try:
        yield from readers[suffix](place.root, file, name, dataset)
    except FileNotFoundError as error:
        if file == place.file:
            raise UserError(f"{name}: no such file") from error
        yield Rejected(name, dataset, "unreadable_table", "a link to nothing")
    except _DAMAGE as error:
        if isinstance(error, UserError) or _is_store_error(error, place.root):
            raise
        yield Rejected(name, dataset, "unreadable_table", _first_line(error))


def shaped(where: str, dataset: str, make: Callable[..., Any], *arguments: Any) -> Iterator[Outcome]:
    """The outcome, or outcomes, that a reader makes of one row; a row of another shape is rejected.

    Published layouts nest lists and objects. What breaks when one of them is something else costs its row alone.
    """
    try:
        made = make(*arguments)
        yield from [made] if isinstance(made, Outcome) else list(made)
    except FieldError as error:
        yield Rejected(where, dataset, error.reason, str(error))
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        yield Rejected(where, dataset, "invalid_field", f"not of the published shape: {_first_line(error)}")


def outcomes(place: Place, file: str, dataset: str, make: Callable[..., Any], *arguments: Any) -> Iterator[Outcome]:
    """What ``make(where, row, *arguments)`` makes of every row of a table, see :func:`shaped`."""
    for entry in rows(place, file, dataset):
        if isinstance(entry, Rejected):
            yield entry
        else:
            yield from shaped(entry[0], dataset, make, *entry, *arguments)


def header(root: Root, file: str) -> tuple[list[str], str]:
    """Column names of a CSV file, stripped and made unique, and the delimiter; no names for an empty file."""
    usual = "\t" if plain_name(file).endswith(".tsv") else ","
    with root.open(file, newline="") as opened:  # spreadsheets on a Mac end lines with \r
        line = next((line for line in opened if line.strip()), "")
        if _names_delimiter(line):
            return _names(next(opened, ""), line.strip()[-1]), line.strip()[-1]
    # Excel writes `;` where the comma is the decimal sign. Only a header without the usual delimiter is another's.
    found = max(DELIMITERS, key=lambda delimiter: (len(_names(line, delimiter)), delimiter == usual))
    return _names(line, found), found


def _names_delimiter(line: str) -> bool:
    return line.lower().startswith("sep=") and len(line.strip()) == len("sep=") + 1


def _names(line: str, delimiter: str) -> list[str]:
    try:
        return _unique([name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])])
    except csv.Error:  # binary under a table's name
        return []


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return unique


# What is saved or downloaded under a table's name.
_NO_TABLES = (
    (b"pk\3\4", "is a workbook or another zip archive: save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "is a workbook of an old Excel: save it as CSV"),
    (b"<!doctype html", "is a web page: download the table itself"),
    (b"<html", "is a web page: download the table itself"),
    (b"%pdf", "is a PDF"),
    (b"version https://git-lfs", "is a Git LFS pointer: git lfs pull fetches the table"),
)


def _csv_rows(root: Root, file: str, name: str, dataset: str) -> Iterator[Entry]:
    # Captions of published sets are longer than Python's default limit of a field.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with root.open(file, "rb") as opened:
        head = opened.read(64)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    kind = next((kind for mark, kind in _NO_TABLES if start.startswith(mark)), None)
    if kind:
        yield Rejected(name, dataset, "unreadable_table", kind)
        return
    _, delimiter = header(root, file)
    names: list[str] = []
    with root.open(file, newline="") as opened:
        for number, cells in _records(opened, delimiter):
            if isinstance(cells, str):
                yield Rejected(f"{name}:{number}", dataset, "invalid_field", cells)
                continue
            if not any(value.strip() for value in cells) or (not names and _names_delimiter(delimiter.join(cells))):
                continue
            if not names:
                names = _unique([value.strip() for value in cells])
            elif len(cells) != len(names):
                detail = f"expected {len(names)} columns, found {len(cells)}"
                yield Rejected(f"{name}:{number}", dataset, "invalid_field", detail)
            else:
                row = {column: cell(value) for column, value in zip(names, cells, strict=True)}
                yield f"{name}:{number}", row
    if not names:
        yield Rejected(name, dataset, "unreadable_table", "no header line")


def _records(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The last line's number and the cells of every record, or what is wrong with it.

    A quotation mark that is never closed costs its own line, not all lines up to the next mark.
    """
    ahead: deque[str] = deque()
    source, taken, number = iter(lines), list[str](), 0

    def counted() -> Iterator[str]:
        nonlocal number
        while len(taken) < MOST_LINES_A_ROW and (line := ahead.popleft() if ahead else next(source, None)) is not None:
            taken.append(line)
            number += 1
            yield line

    reader = csv.reader(counted(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if len(taken) > 1:
                ahead.extendleft(reversed(taken[1:]))
                number -= len(taken) - 1
                yield number, "a quotation mark opens a cell and is not closed"
                reader = csv.reader(counted(), delimiter=delimiter, strict=True)
                continue
            try:
                # Marks inside a cell of one line harm nothing.
                cells = next(csv.reader(taken, delimiter=delimiter))
            except csv.Error:
                yield number, str(error)
                continue
        if cells is None:
            return
        yield number, cells


def _jsonl_rows(root: Root, file: str, name: str, dataset: str) -> Iterator[Entry]:
    with root.open(file) as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield _parsed(line, f"{name}:{number}", dataset)


def _parsed(text: str, where: str, dataset: str) -> Entry:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Rejected(where, dataset, "invalid_json", _first_line(error))
    if not isinstance(row, dict):
        return Rejected(where, dataset, "invalid_json", f"expected an object, found {type(row).__name__}")
    return where, row


def _json_rows(root: Root, file: str, name: str, dataset: str) -> Iterator[Entry]:
    try:
        with root.open(file) as opened:
            content = json.load(opened)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            # One object a line, whatever the name says.
            yield from _jsonl_rows(root, file, name, dataset)
        else:
            yield Rejected(name, dataset, "invalid_json", _first_line(error))
        return
    if isinstance(content, dict) and all(isinstance(v, dict) for v in content.values()) and content:
        content = [{"key": key, **value} for key, value in content.items()]
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        where = f"{name}:{number}"
        if isinstance(row, dict):
            yield where, row
        else:
            yield Rejected(where, dataset, "invalid_json", f"expected an object, found {type(row).__name__}")


def _parquet_rows(root: Root, file: str, name: str, dataset: str) -> Iterator[Entry]:
    with root.open(file, "rb") as opened:
        number = 0
        for batch in pq.ParquetFile(opened).iter_batches(batch_size=256):
            for index in range(batch.num_rows):
                try:
                    yield f"{name}:{number}", batch.slice(index, 1).to_pylist()[0]
                except (pa.ArrowException, ValueError, OverflowError) as error:
                    if isinstance(error, UserError):
                        raise
                    yield Rejected(f"{name}:{number}", dataset, "invalid_field", _first_line(error))
                number += 1


def parquet_columns(place: Place, file: str) -> list[str]:
    """Column names of a Parquet file; none when it cannot be read."""
    try:
        with place.root.open(file, "rb") as opened:
            return pq.ParquetFile(opened).schema_arrow.names
    except _DAMAGE as error:
        if _is_store_error(error, place.root):
            raise
        return []


def table_files(place: Place) -> list[str]:
    """The table a user pointed at, or all tables of a folder.

    Raises:
        UserError: when there is none.
    """
    files = place.files(*TABLES)
    if not files:
        raise UserError(f"{place.name}: no file ending in {', '.join(SUFFIXES)}")
    return files


def as_list(value: Any, separator: str = "|") -> list[str]:
    """A list field that may be a list, a JSON list in a string, or strings with a separator.

    Raises:
        FieldError: for anything else.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
        else:
            value = text.split(separator)
    if not isinstance(value, (list, tuple)):
        raise FieldError("list", f"expected a list or text, found {type(value).__name__} {value!r:.60}")
    return [str(item).strip() for item in value if item is not None and str(item).strip()]


def _is_store_error(error: BaseException, root: Root) -> bool:
    # Libraries that read a damaged file raise OSError without a number; a store's failures have one.
    return isinstance(error, OSError) and error.errno is not None and not root.is_local


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
