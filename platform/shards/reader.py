"""Reading a dataset folder: the index as a table, samples by range reads."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards import tensors as safetensors
from loomvideo.platform.shards.layers import expanded
from loomvideo.platform.shards.manifest import INDEX_FILE, MANIFEST_FILE, SHARED_FILE, Manifest, shard_path
from loomvideo.platform.shards.quantize import SCALE_SUFFIX, restore
from loomvideo.platform.shards.sample import METADATA, ShardSample
from loomvideo.platform.shards.storage import Storage

if TYPE_CHECKING:  # both take long to import, and this is part of the door
    import pyarrow as pa
    from torch import Tensor

Selection = Callable[[str, str], bool]
_MADE_AGAIN = f"delete {MANIFEST_FILE} and run `loomvideo data prepare` again, which keeps finished shards"
PLACE_COLUMNS = ("key", "shard", "offset", "num_bytes", "members", "member_offsets", "member_bytes")


class ShardDataset:
    """A finished dataset. Reads are thread-safe and the object can be pickled to workers.

    Attributes:
        index: One row a sample, in shard and slot order; see :mod:`loomvideo.platform.shards.index`. Media paths and
            source ids are in :meth:`whole_index` alone.
        manifest: The table of contents.
    """

    def __init__(self, storage: Storage, manifest: Manifest, index: pa.Table):
        self.storage, self.manifest, self.index = storage, manifest, index

    @staticmethod
    def open(url: str | Path) -> ShardDataset:
        """Open a dataset folder, local or any fsspec URL.

        Raises:
            UserError: if there is no finished dataset, or its parts do not belong together.
        """
        storage = Storage(url)
        if not storage.exists(MANIFEST_FILE):
            raise UserError(f"{url}: no {MANIFEST_FILE}, so no finished dataset; run `loomvideo data prepare`")
        manifest = Manifest.from_json(storage.read_bytes(MANIFEST_FILE), f"{url}/{MANIFEST_FILE}")
        index = _index(storage, manifest, whole=False)
        if len(index) != manifest.num_samples:
            raise UserError(f"{url}: {INDEX_FILE} has {len(index)} rows, the manifest {manifest.num_samples} samples")
        return ShardDataset(storage, manifest, index)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def digest(self) -> str:
        """Names the content of the whole dataset."""
        return self.manifest.digest

    def whole_index(self) -> pa.Table:
        """The index with media paths and source ids, read anew; null in datasets from before they were kept.

        Raises:
            UserError: if its file has changed since the dataset was opened.
        """
        from loomvideo.platform.shards.index import joined

        return joined([_index(self.storage, self.manifest, whole=True)])

    @functools.cached_property
    def rows_by_key(self) -> dict[str, int]:
        """The index row of every key."""
        return {key: row for row, key in enumerate(self.index.column("key").to_pylist())}

    def read(self, row: int, select: Selection | None = None) -> ShardSample:
        """Read one sample without scanning its tar.

        Features come back as bfloat16 and with all layers, however they are stored.

        Args:
            row: Row of the index.
            select: ``select(member, tensor name)`` says which tensors to read; by default all.

        Raises:
            UserError: if the tar is missing or shorter than the index says.
        """
        place = {name: self.index.column(name)[row].as_py() for name in PLACE_COLUMNS}
        sample = read_placed(self.storage, shard_path(place["shard"]), place, select)
        layers = self.manifest.features.get("layers")
        if layers and "mllm" in sample.tensors:
            sample.tensors["mllm"] = expanded(sample.tensors["mllm"], layers, self.manifest.features["num_layers"])
        return sample

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


def read_placed(
    storage: Storage, path: str, place: Mapping[str, Any], select: Selection | None = None, raw: bool = False
) -> ShardSample:
    """Read the sample that an index row describes from a tar.

    Args:
        storage: The dataset folder.
        path: The path of the tar in it.
        place: The columns :data:`PLACE_COLUMNS` of the row.
        select: Which tensors to read; by default all.
        raw: Leave eight-bit features as stored, with their scales.

    Raises:
        UserError: if the tar is missing, shorter than the row says, or holds another sample there.
    """
    extents = zip(place["members"], place["member_offsets"], place["member_bytes"], strict=True)
    members = {name: (offset, size) for name, offset, size in extents}
    try:
        read = _read_whole if select is None else functools.partial(_read_selected, select=select)
        metadata, tensors = read(storage, path, place["offset"], place["num_bytes"], members)
        key = metadata["key"]
    except UserError:
        raise
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{storage.url}/{path}: damaged at {place['key']} ({error}); run `loomvideo data verify`"
        ) from error
    if key != place["key"]:
        raise UserError(
            f"{storage.url}/{path}: holds {key} where the index has {place['key']}; run `loomvideo data verify`"
        )
    if not raw:
        tensors = {name: restore(part) for name, part in tensors.items()}
    return ShardSample(place["key"], metadata, tensors)


def _index(storage: Storage, manifest: Manifest, whole: bool) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from loomvideo.platform.shards.index import IDENTITY_COLUMNS

    data = storage.read_bytes(INDEX_FILE)
    if manifest.index_sha256 and hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise UserError(f"{storage.url}/{INDEX_FILE}: checksum differs from the manifest's; {_MADE_AGAIN}")
    try:
        names = pq.read_schema(io.BytesIO(data)).names
        wanted = names if whole else [name for name in names if name not in IDENTITY_COLUMNS]
        return pq.read_table(io.BytesIO(data), columns=wanted)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{storage.url}/{INDEX_FILE}: not readable; {_MADE_AGAIN}") from error


_Content: TypeAlias = "tuple[dict, dict[str, dict[str, Tensor]]]"


def _read_whole(
    storage: Storage, path: str, start: int, num_bytes: int, members: dict[str, tuple[int, int]]
) -> _Content:
    (data,) = storage.read_ranges(path, [(start, num_bytes)])
    content = {name: memoryview(data)[o - start : o - start + n] for name, (o, n) in members.items()}
    tensors = {name: safetensors.parse(part) for name, part in content.items() if name != METADATA}
    return json.loads(bytes(content[METADATA])), tensors


def _read_selected(
    storage: Storage, path: str, start: int, num_bytes: int, members: dict[str, tuple[int, int]], select: Selection
) -> _Content:
    wanted = [name for name in members if name != METADATA]
    head_size = safetensors.HEADER_SIZE_BYTES
    ranges = [members[METADATA], *((members[name][0], head_size) for name in wanted)]
    metadata, *sizes = storage.read_ranges(path, ranges)
    lengths = [int.from_bytes(size, "little") for size in sizes]
    for name, length in zip(wanted, lengths, strict=True):
        if length > members[name][1] - head_size:
            raise ValueError(f"{name} has a header of {length} bytes")
    headers = storage.read_ranges(
        path, [(members[name][0] + head_size, length) for name, length in zip(wanted, lengths, strict=True)]
    )
    entries, ranges = [], []
    for name, length, header in zip(wanted, lengths, headers, strict=True):
        base = members[name][0] + head_size + length
        for tensor, entry in safetensors.parse_header(header, members[name][1] - head_size - length).items():
            if select(name, tensor.removesuffix(SCALE_SUFFIX)):
                begin, end = entry["data_offsets"]
                entries.append((name, tensor, entry))
                ranges.append((base + begin, end - begin))
    tensors: dict[str, dict[str, Tensor]] = {}
    for (name, tensor, entry), data in zip(entries, storage.read_ranges(path, ranges), strict=True):
        tensors.setdefault(name, {})[tensor] = safetensors.tensor_from(entry, data)
    return json.loads(bytes(metadata)), tensors
