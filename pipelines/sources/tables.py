"""Rows of CSV, JSON, JSONL and Parquet files, and the column map that makes samples of any of them."""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq

from loomvideo.pipelines.sources.base import Outcome, Place, Rejected, Root, build, register
from loomvideo.platform.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
FIELDS = (
    "key", "task", "target", "source", "references", "instruction", "caption", "licence", "group", "split",
)  # fmt: skip
# Column names that peers use, tried in this order when the map does not name a column.
ALIASES = {
    "target": ("target", "target_path", "target_video_path", "target_image_path", "tgt_video", "edited_path",
               "edited_video", "video_path", "file_path", "video", "path", "media_path", "image_path"),
    "source": ("source", "source_path", "source_video_path", "source_image_path", "src_video", "original_video",
               "control_path", "control_file_path", "reference_video"),
    "references": ("references", "reference_image_paths", "ref_image", "ref_images"),
    "instruction": ("instruction", "edit_instruction", "edit_prompt"),
    "caption": ("caption", "cap", "text", "prompt"),
    "licence": ("licence", "license"),
    "group": ("group", "sku"),
    "split": ("split",),
    "key": ("key",),
    "task": ("task",),
}  # fmt: skip

Row = dict[str, Any]


def rows(place: Place, file: str, dataset: str) -> Iterator[tuple[str, Row] | Rejected]:
    """``(where, row)`` of a table file below a root; lines that do not parse are rejected.

    Raises:
        UserError: for a suffix that is no table's.
    """
    suffix = Path(file).suffix.lower()
    name = place.root.path(file)
    if suffix in (".csv", ".tsv"):
        yield from _csv_rows(place.root, file, name, dataset, "\t" if suffix == ".tsv" else ",")
    elif suffix in (".jsonl", ".ndjson"):
        yield from _jsonl_rows(place.root, file, name, dataset)
    elif suffix == ".json":
        yield from _json_rows(place.root, file, name, dataset)
    elif suffix == ".parquet":
        with place.root.open(file, "rb") as opened:
            number = 0
            for batch in pq.ParquetFile(opened).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield f"{name}:{number}", row
                    number += 1
    else:
        raise UserError(f"{name}: expected a table ending in {', '.join(SUFFIXES)}")


def _csv_rows(root: Root, file: str, name: str, dataset: str, delimiter: str) -> Iterator[tuple[str, Row] | Rejected]:
    # Captions of published sets are longer than Python's default limit of a field.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with root.open(file) as opened:
        reader = csv.DictReader(opened, delimiter=delimiter)
        if not reader.fieldnames:
            raise UserError(f"{name}: no header line")
        for row in reader:
            where = f"{name}:{reader.line_num}"
            if None in row or None in row.values():
                expected = len(reader.fieldnames)
                yield Rejected(where, dataset, "invalid_field", f"expected {expected} columns")
            else:
                yield where, row


def _jsonl_rows(root: Root, file: str, name: str, dataset: str) -> Iterator[tuple[str, Row] | Rejected]:
    with root.open(file) as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield _parsed(line, f"{name}:{number}", dataset)


def _parsed(text: str, where: str, dataset: str) -> tuple[str, Row] | Rejected:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return Rejected(where, dataset, "invalid_json", str(error))
    if not isinstance(row, dict):
        return Rejected(where, dataset, "invalid_json", f"expected an object, found {type(row).__name__}")
    return where, row


def _json_rows(root: Root, file: str, name: str, dataset: str) -> Iterator[tuple[str, Row] | Rejected]:
    try:
        with root.open(file) as opened:
            content = json.load(opened)
    except json.JSONDecodeError as error:
        yield Rejected(name, dataset, "invalid_json", str(error))
        return
    if isinstance(content, dict) and all(isinstance(v, dict) for v in content.values()) and content:
        content = [{"key": key, **value} for key, value in content.items()]
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        where = f"{name}:{number}"
        if isinstance(row, dict):
            yield where, row
        else:
            yield Rejected(where, dataset, "invalid_json", f"expected an object, found {type(row).__name__}")


def table_files(place: Place) -> list[str]:
    """The table a user pointed at, or all tables of a folder.

    Raises:
        UserError: when there is none.
    """
    files = place.files(*SUFFIXES)
    if not files:
        raise UserError(f"{place.name}: no file ending in {', '.join(SUFFIXES)}")
    return files


def as_list(value: Any, separator: str = "|") -> list[str]:
    """A list field that may be a list, a JSON list in a string, or strings with a separator."""
    if value in (None, ""):
        return []
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except json.JSONDecodeError:
                value = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
        else:
            value = text.split(separator)
    return [str(item).strip() for item in value if str(item).strip()]


class Extractor:
    """Writes pictures that lie inside tables to files named after their content, once each."""

    def __init__(self, folder: str):
        """Write below a folder or URL; workers that decode must reach it."""
        self.folder = folder.rstrip("/")
        self.fs, self.base = fsspec.url_to_fs(self.folder)

    def write(self, content: bytes) -> str:
        """Path of the picture's file."""
        name = hashlib.sha256(content).hexdigest()
        relative = f"{name[:2]}/{name}{picture_suffix(content)}"
        path = f"{self.base.rstrip('/')}/{relative}"
        if not self.fs.exists(path):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path + ".tmp", content)
            self.fs.mv(path + ".tmp", path)
        return f"{self.folder}/{relative}"


def picture_suffix(content: bytes) -> str:
    """File suffix of an encoded picture by its first bytes."""
    if content.startswith(b"\x89PNG"):
        return ".png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return ".jpg"


class ColumnMap:
    """Which column, or text with ``{column}`` in it, gives which field of a sample."""

    def __init__(self, columns: dict[str, Any]):
        """Take ``field: column`` pairs.

        Raises:
            UserError: for a field that samples do not have.
        """
        unknown = sorted(set(columns) - set(FIELDS))
        if unknown:
            raise UserError(f"columns.{unknown[0]}: no such field; fields: {', '.join(FIELDS)}")
        self.columns = columns

    def check(self, row: Row, where: str) -> None:
        """Check the mapped columns against the first row.

        Raises:
            UserError: naming the column and those that exist.
        """
        for field, columns in self.columns.items():
            for column in columns if isinstance(columns, list) else [columns]:
                for name in re.findall(r"{([^}]+)}", column) or [column]:
                    if name not in row:
                        have = ", ".join(map(str, row))
                        raise UserError(f"{where}: columns.{field}={column}: no column {name!r}; columns: {have}")
        if self.value(row, "target") is None and not self._column(row, "target"):
            raise UserError(f"{where}: which column is the target? set columns.target=…; columns: {', '.join(row)}")

    def value(self, row: Row, field: str) -> Any:
        """The field's value in a row, None when the map and the known names have no column for it."""
        column = self._column(row, field)
        if column is None:
            return None
        if isinstance(column, list):
            return [value for name in column if (value := self._cell(row, name)) not in (None, "")]
        return self._cell(row, column)

    def used(self, row: Row) -> set[str]:
        """The columns that give fields."""
        names: set[str] = set()
        for field in FIELDS:
            column = self._column(row, field)
            for entry in column if isinstance(column, list) else [column] if column else []:
                names.update(re.findall(r"{([^}]+)}", entry) or [entry])
        return names

    def _column(self, row: Row, field: str) -> Any:
        if field in self.columns:
            return self.columns[field]
        return next((name for name in ALIASES[field] if name in row), None)

    @staticmethod
    def _cell(row: Row, column: str) -> Any:
        if "{" in column:
            return re.sub(r"{([^}]+)}", lambda match: str(row.get(match.group(1), "")), column)
        return row.get(column)


def _looks_like_table(place: Place) -> bool:
    return bool(place.file) and place.file.lower().endswith(SUFFIXES)


@register("table", _looks_like_table)
def read_table(
    place: Place,
    *,
    columns: dict[str, Any] | None = None,
    media: str = "",
    dataset: str = "",
    task: str = "",
    licence: str = "",
    separator: str = "|",
    keep: list[str] | None = None,
    extract: str = "",
) -> Iterator[Outcome]:
    """Any CSV, JSON, JSONL or Parquet through a column map; well-known column names need none.

    Args:
        place: A table, or a folder of tables.
        columns: ``field: column``, ``field: "text {column}"`` or, for references, a list of columns.
        media: Folder that relative media paths start from; default: the table's.
        dataset: Name; default: the table's.
        task: Of all rows; default: from the row, else from which media it has.
        licence: Of all rows without their own.
        separator: Between several references in one cell.
        keep: Columns to carry along in ``extra``; default: every number, text and boolean that is no field.
        extract: Folder or URL for pictures that lie in the table as bytes.
    """
    mapping = ColumnMap(columns or {})
    base = Root(media) if media else place.root
    for file in table_files(place):
        name = dataset or Path(file).stem
        extractor = Extractor(extract or default_extract_folder(name))
        checked = False
        for entry in rows(place, file, name):
            if isinstance(entry, Rejected):
                yield entry
                continue
            where, row = entry
            if not checked:
                mapping.check(row, where)
                checked = True
            yield _sample(row, where, mapping, base, name, task, licence, separator, keep, extractor)


def default_extract_folder(dataset: str) -> str:
    """Where pictures out of tables go when no folder is given."""
    return str(Path.home() / ".cache" / "loomvideo" / "extracted" / dataset)


def _sample(
    row: Row,
    where: str,
    mapping: ColumnMap,
    base: Root,
    dataset: str,
    task: str,
    licence: str,
    separator: str,
    keep: list[str] | None,
    extractor: Extractor,
) -> Outcome:
    def located(value: Any) -> str | None:
        content = embedded_bytes(value)
        if content is not None:
            return extractor.write(content)
        return base.path(str(value)) if value not in (None, "") else None

    references = mapping.value(row, "references")
    if embedded_bytes(references) is not None:
        references = [references]
    elif not isinstance(references, list):
        references = as_list(references, separator)
    source, target = located(mapping.value(row, "source")), located(mapping.value(row, "target"))
    instruction, caption = mapping.value(row, "instruction"), mapping.value(row, "caption")
    if source and not instruction:
        # Tables of pairs call the instruction a prompt.
        instruction, caption = caption, None
    used = mapping.used(row)
    extra = {k: v for k, v in row.items() if (k in keep if keep is not None else k not in used and _is_plain(v))}
    return build(
        where,
        dataset,
        key=mapping.value(row, "key"),
        task=task or mapping.value(row, "task"),
        target=target,
        source=source,
        references=[path for item in references if (path := located(item))],
        instruction=instruction,
        caption=caption,
        licence=mapping.value(row, "licence") or licence,
        group=str(mapping.value(row, "group") or source or target or ""),
        split=mapping.value(row, "split"),
        extra=extra,
    )


def embedded_bytes(value: Any) -> bytes | None:
    """The bytes of a picture that lies in a cell, as such or as Hugging Face's ``{"bytes": …}``."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) and value != ""
