"""The gallery's data in parts that a page loads as it needs them, from a disk as from any server.

Every part is a script that calls ``loom(name, data)``: a page that was opened from a file may load scripts beside it,
and nothing else. ``data`` is base64 of gzip. ``report/rows-000012.js`` holds a thousand rows as columns of JSON;
``report/column-task.js`` one number a row of all rows, for filtering and sorting, loaded when somebody filters by it.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from loomvideo.pipelines.gallery.rows import GalleryRow
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.storage import Storage

FOLDER = "report"
ROWS_IN_A_PART = 1000
FACETS = ("outcome", "reason", "task", "split", "dataset")
"""Fields with few values: a code of two bytes a row."""
PART_NAME = re.compile(r"(rows-\d{6}|column-[\w.-]+|strips)\.js|strip-\d+-\w+\.jpg")
# Values of a facet that have an entry of their own; the page lists all of them at its first load.
_MOST_VALUES = 1000
_OTHER = "(other)"
_BINS = 32
# Objects of a store are written side by side; a local disk is faster than gzip.
_WRITERS = 8
_MEASURES = ("frames",)


class GalleryWriter:
    """Writes rows as they come; holds one part of them and a few numbers a row.

    Args:
        storage: The dataset folder.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._pool = ThreadPoolExecutor(1 if storage.is_local else _WRITERS, thread_name_prefix="gallery")
        self._writing: list[Future] = []
        self._held: list[GalleryRow] = []
        self._names: dict[str, dict[str, int]] = {facet: {} for facet in FACETS}
        self._codes: dict[str, list[np.ndarray]] = {facet: [] for facet in FACETS}
        self._values: dict[str, list[np.ndarray]] = {}
        self.files: set[str] = set()
        self.num_rows = 0

    def add_all(self, rows: Iterable[GalleryRow]) -> None:
        """Write rows."""
        for row in rows:
            self._held.append(row)
            if len(self._held) == ROWS_IN_A_PART:
                self._flush()

    def finish(self) -> dict[str, Any]:
        """Write the columns; returns what the page must know at its first load, a few kilobytes for any number of rows.

        Returns:
            ``{"rows": …, "part": …, "facets": {name: [[value, count], …]}, "measures": {name: {file, low, high,
            bins, rows}}}``.
        """
        if self._held:
            self._flush()
        facets = {}
        for facet in FACETS:
            codes = np.concatenate([np.empty(0, np.uint16), *self._codes[facet]])
            counts = np.bincount(codes, minlength=len(self._names[facet])).tolist()
            facets[facet] = [[name, counts[code]] for name, code in self._names[facet].items()]
            self._write(f"column-{facet}", codes.tobytes())
        measures = {}
        for number, name in enumerate(sorted(self._values)):
            values = np.concatenate(self._values[name])
            known = values[np.isfinite(values)]
            if not len(known):
                continue
            file = f"column-measure{number}"
            self._write(file, values.astype("<f4").tobytes())
            bins = np.histogram(known, _BINS)[0].tolist()
            measures[name] = {
                "file": file, "low": float(known.min()), "high": float(known.max()), "bins": bins, "rows": len(known),
            }  # fmt: skip
        self._wait()
        self._pool.shutdown()
        return {"rows": self.num_rows, "part": ROWS_IN_A_PART, "facets": facets, "measures": measures}

    def codes(self) -> np.ndarray:
        """``[rows, facets]`` of all rows so far, to draw a sample over all kinds of them."""
        return np.stack([np.concatenate([np.empty(0, np.uint16), *self._codes[facet]]) for facet in FACETS], 1)

    def _flush(self) -> None:
        rows, self._held = self._held, []
        for facet in FACETS:
            self._codes[facet].append(np.array([self._code(facet, row[facet]) for row in rows], "<u2"))
        names = {name for row in rows for name in row["scores"]}
        found = {name: [row["scores"].get(name) for row in rows] for name in names}
        found |= {name: [row[name] for row in rows] for name in _MEASURES}
        for name in found.keys() | self._values.keys():
            # A score that comes up late is unknown of all rows before.
            earlier = self._values.setdefault(name, [np.full(self.num_rows, np.nan, np.float32)])
            earlier.append(np.array(found.get(name, [None] * len(rows)), np.float32))
        columns = {name: [row[name] for row in rows] for name in GalleryRow.__annotations__}
        columns["scores"] = [{k: float(f"{v:.5g}") for k, v in row["scores"].items()} for row in rows]
        text = json.dumps(columns, ensure_ascii=False, separators=(",", ":"))
        self._write(f"rows-{self.num_rows // ROWS_IN_A_PART:06d}", text.encode())
        self.num_rows += len(rows)

    def _code(self, facet: str, value: str) -> int:
        names = self._names[facet]
        if value not in names and len(names) >= _MOST_VALUES:
            value = _OTHER
        return names.setdefault(value, len(names))

    def _write(self, name: str, data: bytes) -> None:
        if len(self._writing) >= 2 * _WRITERS:
            self._wait()
        self.files.add(f"{name}.js")
        self._writing.append(self._pool.submit(write_part, self._storage, name, data))

    def _wait(self) -> None:
        for writing in self._writing:
            writing.result()
        self._writing = []


def write_part(storage: Storage, name: str, data: bytes) -> None:
    """Write one part."""
    packed = base64.b64encode(gzip.compress(data, 4, mtime=0)).decode()
    storage.write_bytes(f"{FOLDER}/{name}.js", f'loom("{name}","{packed}")\n'.encode())


def read_part(storage: Storage, name: str) -> bytes:
    """The data of a part.

    Raises:
        UserError: if it is missing or none.
    """
    text = storage.read_bytes(f"{FOLDER}/{name}.js").decode()
    match = re.fullmatch(rf'loom\("{re.escape(name)}","([^"]*)"\)\n', text)
    if match is None:
        raise UserError(f"{storage.url}/{FOLDER}/{name}.js: damaged; run `loomvideo data report {storage.url}`")
    return gzip.decompress(base64.b64decode(match.group(1)))


def read_rows(storage: Storage, numbers: Sequence[int]) -> Iterator[tuple[int, GalleryRow]]:
    """Some rows by number, in ascending order; a part is read once.

    Raises:
        UserError: if there is no such row.
    """
    part, columns = -1, {}
    for number in sorted(numbers):
        if number // ROWS_IN_A_PART != part:
            part = number // ROWS_IN_A_PART
            columns = json.loads(read_part(storage, f"rows-{part:06d}"))
        position = number % ROWS_IN_A_PART
        if position >= len(columns["key"]):
            raise UserError(f"{storage.url}: no row {number} in its report")
        yield number, GalleryRow(**{name: column[position] for name, column in columns.items()})


def sampled(codes: np.ndarray, count: int) -> list[int]:
    """Row numbers of at most so many rows, as evenly as can be over all combinations of outcome, reason and task.

    Args:
        codes: What :meth:`GalleryWriter.codes` gives.
        count: Rows at most.
    """
    if not len(codes) or count <= 0:
        return []
    kinds = np.unique(codes[:, : FACETS.index("task") + 1], axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(kinds, kind="stable")
    groups = sorted(np.split(order, np.cumsum(np.bincount(kinds))[:-1]), key=len)
    chosen: list[int] = []
    for number, rows in enumerate(groups):
        # Small groups first: what they do not use is left to the large ones.
        share = min(-(-(count - len(chosen)) // (len(groups) - number)), count - len(chosen), len(rows))
        chosen += rows[np.linspace(0, len(rows) - 1, share).round().astype(int)].tolist() if share else []
    return sorted(chosen)
