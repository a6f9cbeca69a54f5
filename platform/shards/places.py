"""Where samples lie, looked up in the index a row at a time."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

PLACE_COLUMNS = ("key", "shard", "offset", "num_bytes", "members", "member_offsets", "member_bytes")


class Places:
    """Rows of the columns :data:`PLACE_COLUMNS`, in the index's own buffers.

    A scalar of a chunked column costs more than the read that it is for.
    """

    def __init__(self, index: pa.Table):
        self._batches = [_Batch(batch) for batch in index.select(PLACE_COLUMNS).to_batches() if len(batch)]
        self._starts, self._num_rows = [], 0
        for batch in self._batches:
            self._starts.append(self._num_rows)
            self._num_rows += batch.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The columns of one row.

        Raises:
            IndexError: if there is no such row.
        """
        if not -self._num_rows <= row < self._num_rows:
            raise IndexError(f"row {row} of {self._num_rows}")
        row %= self._num_rows
        number = bisect.bisect_right(self._starts, row) - 1
        return self._batches[number].row(row - self._starts[number])


class _Batch:
    def __init__(self, batch: pa.RecordBatch):
        self.num_rows = len(batch)
        self._key, self._shard = batch.column("key"), batch.column("shard")
        self._offset, self._num_bytes = (batch.column(name).to_numpy() for name in ("offset", "num_bytes"))
        names, offsets, sizes = (batch.column(name) for name in ("members", "member_offsets", "member_bytes"))
        # Each list column has bounds of its own.
        self._bounds, *self._sizes_bounds = (column.offsets.to_numpy() for column in (names, offsets, sizes))
        self._member_offsets, self._member_bytes = (column.values.to_numpy() for column in (offsets, sizes))
        # A handful of names: their codes are a byte each where the strings would be made anew at every look.
        codes = names.values.dictionary_encode()
        self._names, self._codes = codes.dictionary.to_pylist(), codes.indices.to_numpy().astype(np.uint8)

    def row(self, row: int) -> dict[str, Any]:
        start, end = self._bounds[row : row + 2].tolist()
        number, first, second = end - start, *(int(bounds[row]) for bounds in self._sizes_bounds)
        return {
            "key": self._key[row].as_py(),
            "shard": self._shard[row].as_py(),
            "offset": int(self._offset[row]),
            "num_bytes": int(self._num_bytes[row]),
            "members": [self._names[code] for code in self._codes[start:end].tolist()],
            "member_offsets": self._member_offsets[first : first + number].tolist(),
            "member_bytes": self._member_bytes[second : second + number].tolist(),
        }
