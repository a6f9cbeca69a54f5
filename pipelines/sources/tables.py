"""The column map that makes samples of any table, and media that lie in tables as bytes."""

import hashlib
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Outcome,
    Place,
    Rejected,
    Root,
    build,
    register,
)
from loomvideo.pipelines.sources.rows import (
    SUFFIXES,
    TABLES,
    Entry,
    Row,
    as_list,
    plain_name,
    rows,
    shaped,
    table_files,
)
from loomvideo.platform.errors import UserError, full_disk_named
from loomvideo.platform.machine import cache_folder

logger = logging.getLogger(__name__)

FIELDS = (
    "key", "task", "target", "source", "references", "instruction", "caption", "licence", "group", "split",
)  # fmt: skip
# Column names that peers use, tried in this order when the map does not name a column.
ALIASES = {
    "target": ("target", "target_path", "target_video_path", "target_image_path", "tgt_video", "edited_path",
               "edited_video", "edited_image", "target_image", "target_img", "output_images", "output_image",
               "video_path", "file_path", "file_name", "video", "path", "media_path", "image_path"),
    "source": ("source", "source_path", "source_video_path", "source_image_path", "source_image", "source_img",
               "original_image", "input_images", "input_image", "src_video", "original_video", "control_path",
               "control_file_path", "reference_video"),
    "references": ("references", "reference_image_paths", "ref_image", "ref_images"),
    "instruction": ("instruction", "edit_instruction", "edit_prompt"),
    "caption": ("caption", "cap", "text", "prompt"),
    "licence": ("licence", "license"),
    "group": ("group", "sku"),
    "split": ("split",),
    "key": ("key",),
    "task": ("task",),
}  # fmt: skip

# Fields of which a wrong guess would teach the wrong thing.
_ASKED = ("target", "source", "instruction", "caption")
# Rows of JSON need not all have every column.
_HEAD_ROWS = 20


class Extractor:
    """Writes pictures and videos that lie inside tables to files named after their content, once each."""

    def __init__(self, folder: str):
        """Write below a folder or URL; workers that decode must reach it."""
        self.folder = folder.rstrip("/")
        self.fs, self.base = fsspec.url_to_fs(self.folder)

    def write(self, content: bytes, named: str = "") -> str:
        """Path of the file; ``named`` is what the table calls it, which tells the kind where the content does not."""
        name = hashlib.sha256(content).hexdigest()
        relative = f"{name[:2]}/{name}{media_suffix(content, named)}"
        path = f"{self.base.rstrip('/')}/{relative}"
        if not self.fs.exists(path):
            with full_disk_named(path, Path(f"{path}.tmp")):
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.fs.pipe_file(path + ".tmp", content)
                self.fs.mv(path + ".tmp", path)
        return f"{self.folder}/{relative}"


_SIGNATURES = (
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"GIF8", ".gif"),
    (0, b"BM", ".bmp"),
    (0, b"II*\0", ".tif"),
    (0, b"MM\0*", ".tif"),
    (8, b"WEBP", ".webp"),
    (8, b"AVI ", ".avi"),
    (8, b"avif", ".avif"),
    (8, b"heic", ".heic"),
    (8, b"qt  ", ".mov"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1a\x45\xdf\xa3", ".mkv"),
    (0, b"\0\0\x01\xba", ".mpg"),
)


def media_suffix(content: bytes, named: str = "") -> str:
    """File suffix of an encoded picture or video by its first bytes, else by its name.

    Raises:
        FieldError: when neither tells.
    """
    found = next((suffix for at, mark, suffix in _SIGNATURES if content[at : at + len(mark)] == mark), "")
    suffix = Path(named).suffix.lower()
    if not found and suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        raise fields.FieldError("bytes", f"{len(content)} bytes that are no picture or video known here")
    return found or suffix


_LONGEST_PATH = 4096
_MEDIA_ENDINGS = tuple(suffix.encode() for suffix in sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))


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

    def check(self, entries: Sequence[Entry], where: str) -> None:
        """Check the mapped columns against a table's first rows.

        Raises:
            UserError: naming the column and those that exist.
        """
        row: Row = {}
        for entry in entries:
            row |= {} if isinstance(entry, Rejected) else entry[1]
        if not row:
            return
        have = ", ".join(map(str, row))
        for field, columns in self.columns.items():
            for column in columns if isinstance(columns, list) else [columns]:
                for name in re.findall(r"{([^}]+)}", str(column)) or [column]:
                    if name not in row:
                        raise UserError(f"{where}: columns.{field}={column}: no column {name!r}; columns: {have}")
        if not self._column(row, "target"):
            raise UserError(f"{where}: which column is the target? set columns.target=…; columns: {have}")

    def described(self, row: Row) -> list[tuple[str, str]]:
        """``(field, what gives it)`` of every field that a row's columns give."""
        given = ((field, self._column(row, field)) for field in FIELDS)
        return [(field, ", ".join(c) if isinstance(c, list) else str(c)) for field, c in given if c is not None]

    def unclear(self, entries: Sequence[Entry]) -> dict[str, list[str]]:
        """Fields that no map names and that several known columns with other values could give."""
        found: dict[str, list[str]] = {}
        kept = [entry[1] for entry in entries if not isinstance(entry, Rejected)]
        for field in set(_ASKED) - set(self.columns):
            # Case and spaces apart, as columns are matched.
            names = {name: _plain_name(name) for row in kept for name in row}
            fitting = [name for alias in ALIASES[field] for name, plain in names.items() if plain == alias]
            full = [name for name in fitting if any(not fields.is_missing(row.get(name)) for row in kept)]
            if len({repr([row.get(name) for row in kept]) for name in full}) > 1 and any(
                sum(not fields.is_missing(row.get(name)) for name in full) > 1 for row in kept
            ):
                found[field] = full
        return found

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
        found = next((name for name in ALIASES[field] if name in row), None)
        if found is None:
            # Spreadsheets have `Video` and `Target Path`.
            plain = {_plain_name(name): name for name in reversed(list(row))}
            found = next((plain[name] for name in ALIASES[field] if name in plain), None)
        return found

    @staticmethod
    def _cell(row: Row, column: str) -> Any:
        if "{" in column:
            return re.sub(r"{([^}]+)}", lambda match: str(row.get(match.group(1), "")), column)
        return row.get(column)


def _plain_name(name: object) -> str:
    return re.sub(r"[^a-z]+", "_", str(name).lower()).strip("_")


# What Hugging Face calls the table beside the files of a folder of pictures or videos.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def tables_of(place: Place) -> list[str]:
    """The table that was named; of a folder the one that describes its files, its tables, or those in ``data/``."""
    if place.file:
        return [place.file] if plain_name(place.file).endswith(SUFFIXES) else []
    described = [name for name in _METADATA if place.root.has(name)]
    return described[:1] or place.files(*TABLES) or place.files(*TABLES, folder="data")


def _looks_like_table(place: Place) -> bool:
    return bool(tables_of(place))


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
        task: The task of all rows; default: from the row, else from which media it has.
        licence: The licence of all rows without their own.
        separator: Between several references in one cell.
        keep: Columns to carry along in ``extra``; default: every number, text and boolean that is no field.
        extract: Folder or URL for pictures that lie in the table as bytes.
    """
    mapping = ColumnMap(columns or {})
    base = Root(media) if media else place.root
    for file in tables_of(place) or table_files(place):
        name = dataset or Path(plain_name(file)).stem
        extractor = Extractor(extract or default_extract_folder(name))
        entries = rows(place, file, name)
        head = list(itertools.islice(entries, _HEAD_ROWS))
        for field, found in mapping.unclear(head).items():
            logger.warning(
                "%s: columns %s could all be the %s; taken: %s; set source_options.columns.%s=…",
                place.root.path(file), ", ".join(found), field, found[0], field,
            )  # fmt: skip
        try:
            mapping.check(head, place.root.path(file))
        except UserError as error:
            if place.file:
                raise
            yield Rejected(place.root.path(file), name, "unreadable_table", str(error))
            continue
        options = (mapping, base, name, task, licence, separator, keep, extractor)
        for entry in itertools.chain(head, entries):
            if isinstance(entry, Rejected):
                yield entry
            else:
                yield from shaped(entry[0], name, _sample, *entry, *options)


def default_extract_folder(dataset: str) -> str:
    """Where pictures out of tables go when no folder is given."""
    return str(cache_folder() / "extracted" / dataset)


def _sample(
    where: str,
    row: Row,
    mapping: ColumnMap,
    base: Root,
    dataset: str,
    task: str,
    licence: str,
    separator: str,
    keep: list[str] | None,
    extractor: Extractor,
) -> Outcome:
    def located(field: str, value: Any) -> str | None:
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # a list where others have several turns or views
        content = embedded_bytes(value)
        if content is not None:
            return extractor.write(content, str(value.get("path") or "") if isinstance(value, dict) else "")
        given = fields.path(value.get("path") if isinstance(value, dict) else value, field)
        return base.path(given) if given else None

    references = mapping.value(row, "references")
    if isinstance(references, (dict, bytes)):
        references = [references]
    elif not isinstance(references, list):
        references = as_list(references, separator)
    source, target = (located(field, mapping.value(row, field)) for field in ("source", "target"))
    instruction, caption = mapping.value(row, "instruction"), mapping.value(row, "caption")
    if source and not instruction:
        # Tables of pairs call the instruction a prompt.
        instruction, caption = caption, None
    used = mapping.used(row)
    # Other sets call their own kinds of edits tasks.
    given_task = fields.name(mapping.value(row, "task"), "task")
    if given_task not in TASKS and "task" not in mapping.columns:
        used.discard("task")
        given_task = None
    extra = {k: v for k, v in row.items() if (k in keep if keep is not None else k not in used and _is_plain(v))}
    return build(
        where,
        dataset,
        key=mapping.value(row, "key"),
        task=task or given_task,
        target=target,
        source=source,
        references=[path for item in references if (path := located("references", item))],
        instruction=instruction,
        caption=caption,
        licence=mapping.value(row, "licence") or licence,
        group=fields.name(mapping.value(row, "group"), "group") or source or target,
        split=mapping.value(row, "split"),
        extra=extra,
    )


def embedded_bytes(value: Any) -> bytes | None:
    """The bytes of a picture that lies in a cell, as such or as Hugging Face's ``{"bytes": …}``."""
    if isinstance(value, dict):
        value = value.get("bytes")
    elif isinstance(value, bytes) and len(value) < _LONGEST_PATH and value.lower().endswith(_MEDIA_ENDINGS):
        return None  # a path that Spark wrote without saying that it is text
    return value if isinstance(value, bytes) else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) and not fields.is_missing(value)
