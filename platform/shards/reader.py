"""Reading a dataset folder: the index as a table, samples by range reads."""

import hashlib
import io
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards import tensors as safetensors
from loomvideo.platform.shards.manifest import INDEX_FILE, MANIFEST_FILE, SHARED_FILE, Manifest, shard_path
from loomvideo.platform.shards.sample import METADATA, ShardSample
from loomvideo.platform.shards.storage import Storage

Selection = Callable[[str, str], bool]


class ShardDataset:
    """A finished dataset. Reads are thread-safe and the object can be pickled to workers.

    Attributes:
        index: One row a sample, in shard and slot order; see :mod:`loomvideo.platform.shards.index`.
        manifest: The table of contents.
    """

    def __init__(self, storage: Storage, manifest: Manifest, index: pa.Table):
        self.storage, self.manifest, self.index = storage, manifest, index

    @staticmethod
    def open(url: str | Path) -> "ShardDataset":
        """Open a dataset folder, local or any fsspec URL.

        Raises:
            UserError: if there is no finished dataset, or its parts do not belong together.
        """
        storage = Storage(url)
        if not storage.exists(MANIFEST_FILE):
            raise UserError(f"{url}: no {MANIFEST_FILE}, so no finished dataset; run `loomvideo data prepare`")
        manifest = Manifest.from_json(storage.read_bytes(MANIFEST_FILE), f"{url}/{MANIFEST_FILE}")
        index = pq.read_table(io.BytesIO(storage.read_bytes(INDEX_FILE)))
        if len(index) != manifest.num_samples:
            raise UserError(f"{url}: {INDEX_FILE} has {len(index)} rows, the manifest {manifest.num_samples} samples")
        return ShardDataset(storage, manifest, index)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def digest(self) -> str:
        """Names the content of the whole dataset."""
        return self.manifest.digest

    @cached_property
    def rows_by_key(self) -> dict[str, int]:
        """The index row of every key."""
        return {key: row for row, key in enumerate(self.index.column("key").to_pylist())}

    def read(self, row: int, select: Selection | None = None) -> ShardSample:
        """Read one sample without scanning its tar.

        Args:
            row: Row of the index.
            select: ``select(member, tensor name)`` says which tensors to read; by default all.

        Raises:
            UserError: if the tar is missing or shorter than the index says.
        """
        place = {name: self.index.column(name)[row].as_py() for name in ("key", "shard", "offset", "num_bytes")}
        names, offsets, sizes = (
            self.index.column(name)[row].as_py() for name in ("members", "member_offsets", "member_bytes")
        )
        members = {name: (offset, size) for name, offset, size in zip(names, offsets, sizes, strict=True)}
        if select is None:
            start = place["offset"]
            (data,) = self.storage.read_ranges(shard_path(place["shard"]), [(start, place["num_bytes"])])
            content = {name: memoryview(data)[o - start : o - start + n] for name, (o, n) in members.items()}
            tensors = {name: safetensors.parse(part) for name, part in content.items() if name != METADATA}
            metadata = json.loads(bytes(content[METADATA]))
        else:
            metadata, tensors = self._read_selected(shard_path(place["shard"]), members, select)
        if metadata["key"] != place["key"]:
            raise UserError(f"{self.storage.url}/{shard_path(place['shard'])}: holds {metadata['key']} where the index "
                            f"has {place['key']}; run `loomvideo data verify`")  # fmt: skip
        return ShardSample(place["key"], metadata, tensors)

    def _read_selected(
        self, path: str, members: dict[str, tuple[int, int]], select: Selection
    ) -> tuple[dict, dict[str, dict[str, Tensor]]]:
        wanted = [name for name in members if name != METADATA]
        head_size = safetensors.HEADER_SIZE_BYTES
        ranges = [members[METADATA], *((members[name][0], head_size) for name in wanted)]
        metadata, *sizes = self.storage.read_ranges(path, ranges)
        lengths = [int.from_bytes(size, "little") for size in sizes]
        headers = self.storage.read_ranges(
            path, [(members[name][0] + head_size, length) for name, length in zip(wanted, lengths, strict=True)]
        )
        entries, ranges = [], []
        for name, length, header in zip(wanted, lengths, headers, strict=True):
            base = members[name][0] + head_size + length
            for tensor, entry in safetensors.parse_header(header).items():
                if select(name, tensor):
                    begin, end = entry["data_offsets"]
                    entries.append((name, tensor, entry))
                    ranges.append((base + begin, end - begin))
        tensors: dict[str, dict[str, Tensor]] = {}
        for (name, tensor, entry), data in zip(entries, self.storage.read_ranges(path, ranges), strict=True):
            tensors.setdefault(name, {})[tensor] = safetensors.tensor_from(entry, data)
        return json.loads(bytes(metadata)), tensors

    def shared(self) -> dict[str, Tensor]:
        """Dataset-wide tensors, among them ``null`` [layers, tokens, dim]; empty when the dataset has none.

        Raises:
            UserError: if the file's checksum is not the manifest's.
        """
        if not self.manifest.shared_sha256:
            return {}
        data = self.storage.read_bytes(SHARED_FILE)
        if hashlib.sha256(data).hexdigest() != self.manifest.shared_sha256:
            raise UserError(f"{self.storage.url}/{SHARED_FILE}: checksum differs from the manifest's")
        return safetensors.parse(data)
