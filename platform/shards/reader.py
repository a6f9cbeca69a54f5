"""Reading a dataset folder: the index as a table, samples by range reads."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards import tensors as safetensors
from loomvideo.platform.shards.fetch import RangeFetcher
from loomvideo.platform.shards.layers import expanded
from loomvideo.platform.shards.manifest import INDEX_FILE, MANIFEST_FILE, SHARED_FILE, Manifest, shard_path
from loomvideo.platform.shards.places import Places
from loomvideo.platform.shards.quantize import SCALE_SUFFIX, restore
from loomvideo.platform.shards.reading import ReadingConfig, ReadTally
from loomvideo.platform.shards.sample import METADATA, ShardSample
from loomvideo.platform.shards.storage import Storage

if TYPE_CHECKING:  # both take long to import, and this is part of the door
    import pyarrow as pa
    from torch import Tensor

Selection = Callable[[str, str], bool]
_MADE_AGAIN = f"delete {MANIFEST_FILE} and run `loomvideo data prepare` again, which keeps finished shards"
HEAD_BYTES = 16_384
"""Read of a member to learn where its tensors lie; a header that is longer costs another read."""
_SAMPLES_AT_A_TIME = 64


class ShardDataset:
    """A finished dataset. Reads are thread-safe and the object can be pickled to workers.

    Attributes:
        index: One row a sample, in shard and slot order; see :mod:`loomvideo.platform.shards.index`. Media paths and
            source ids are in :meth:`whole_index` alone.
        manifest: The table of contents.
        reading: How ranges of shards are asked of an object store.
    """

    def __init__(self, storage: Storage, manifest: Manifest, index: pa.Table, reading: ReadingConfig | None = None):
        self.storage, self.manifest, self.index = storage, manifest, index
        self.reading = reading or ReadingConfig()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("storage", "manifest", "index", "reading")}

    @staticmethod
    def open(url: str | Path, reading: ReadingConfig | None = None) -> ShardDataset:
        """Open a dataset folder, local or any fsspec URL.

        Args:
            url: The folder.
            reading: How ranges of shards are asked of an object store; local files are read as they are.

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
        return ShardDataset(storage, manifest, index, reading)

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

    @functools.cached_property
    def places(self) -> Places:
        """Where the sample of every row lies."""
        return Places(self.index)

    @functools.cached_property
    def ranges(self) -> Storage | RangeFetcher:
        """What reads byte ranges of shards."""
        if self.storage.is_local:
            return self.storage
        digests = {shard.path: shard.sha256 for shard in self.manifest.shards}
        return RangeFetcher(self.storage, self.reading, digests)

    def tally(self) -> ReadTally:
        """What this process has asked of an object store for the samples so far; nothing for local files."""
        return self.ranges.tally() if isinstance(self.ranges, RangeFetcher) else ReadTally()

    def read(self, row: int, select: Selection | None = None) -> ShardSample:
        """Read one sample without scanning its tar.

        Features come back as bfloat16 and with all layers, however they are stored.

        Args:
            row: Row of the index.
            select: ``select(member, tensor name)`` says which tensors to read; by default all.

        Raises:
            UserError: if the tar is missing or shorter than the index says.
        """
        place = self.places[row]
        return self._whole_layers(read_placed(self.ranges, shard_path(place["shard"]), place, select))

    def metadata(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The metadata of samples, in their order; what neighbours in a shard say is read together.

        Raises:
            UserError: if a tar is missing or shorter than the index says, or damaged.
        """
        for first in range(0, len(rows), _SAMPLES_AT_A_TIME):
            places = [self.places[row] for row in rows[first : first + _SAMPLES_AT_A_TIME]]
            for shard, group in itertools.groupby(places, key=lambda place: place["shard"]):
                yield from _metadata(self.ranges, shard_path(shard), list(group))

    def _whole_layers(self, sample: ShardSample) -> ShardSample:
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
    storage: Storage | RangeFetcher,
    path: str,
    place: Mapping[str, Any],
    select: Selection | None = None,
    raw: bool = False,
) -> ShardSample:
    """Read the sample that an index row describes from a tar.

    Args:
        storage: The dataset folder, or what reads ranges in it.
        path: The path of the tar in it.
        place: The columns :data:`~loomvideo.platform.shards.places.PLACE_COLUMNS` of the row.
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
        raise _damaged(storage, path, place, error) from error
    if key != place["key"]:
        raise _displaced(storage, path, place, key)
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
    storage: Storage | RangeFetcher, path: str, start: int, num_bytes: int, members: dict[str, tuple[int, int]]
) -> _Content:
    (data,) = storage.read_ranges(path, [(start, num_bytes)])
    content = {name: memoryview(data)[o - start : o - start + n] for name, (o, n) in members.items()}
    tensors = {name: safetensors.parse(part) for name, part in content.items() if name != METADATA}
    return json.loads(str(content[METADATA], "utf-8")), tensors


def _read_selected(
    storage: Storage | RangeFetcher,
    path: str,
    start: int,
    num_bytes: int,
    members: dict[str, tuple[int, int]],
    select: Selection,
) -> _Content:
    size_bytes, whole_bytes = safetensors.HEADER_SIZE_BYTES, max(HEAD_BYTES, getattr(storage, "whole_bytes", 0))
    wanted = [name for name in members if name != METADATA]
    # A small member is read whole at once: on an object store a second request costs more than its bytes.
    sizes = {name: n if (n := members[name][1]) <= whole_bytes else HEAD_BYTES for name in wanted}
    metadata, *heads = storage.read_ranges(
        path, [members[METADATA], *((members[name][0], sizes[name]) for name in wanted)]
    )
    begun = {name: memoryview(head) for name, head in zip(wanted, heads, strict=True)}
    lengths = {name: int.from_bytes(head[:size_bytes], "little") for name, head in begun.items()}
    for name, length in lengths.items():
        if length > members[name][1] - size_bytes:
            raise ValueError(f"{name} has a header of {length} bytes")
    longer = [name for name in wanted if size_bytes + lengths[name] > sizes[name]]
    if longer:
        again = storage.read_ranges(path, [(members[name][0], size_bytes + lengths[name]) for name in longer])
        begun |= {name: memoryview(head) for name, head in zip(longer, again, strict=True)}
    entries, ranges = [], []
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, head in begun.items():
        first = size_bytes + lengths[name]
        for tensor, entry in safetensors.parse_header(head[size_bytes:first], members[name][1] - first).items():
            if not select(name, tensor.removesuffix(SCALE_SUFFIX)):
                continue
            begin, end = (first + bound for bound in entry["data_offsets"])
            if end <= len(head):
                tensors.setdefault(name, {})[tensor] = safetensors.tensor_from(entry, head[begin:end])
            else:
                entries.append((name, tensor, entry))
                ranges.append((members[name][0] + begin, end - begin))
    for (name, tensor, entry), data in zip(entries, storage.read_ranges(path, ranges) if ranges else (), strict=True):
        tensors.setdefault(name, {})[tensor] = safetensors.tensor_from(entry, data)
    return json.loads(str(metadata, "utf-8")), tensors


def _metadata(
    storage: Storage | RangeFetcher, path: str, places: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    extents = []
    for place in places:
        number = place["members"].index(METADATA)
        extents.append((place["member_offsets"][number], place["member_bytes"][number]))
    for place, text in zip(places, storage.read_ranges(path, extents), strict=True):
        try:
            metadata = json.loads(str(text, "utf-8"))
            key = metadata["key"]
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise _damaged(storage, path, place, error) from error
        if key != place["key"]:
            raise _displaced(storage, path, place, key)
        yield metadata


def _damaged(storage: Storage | RangeFetcher, path: str, place: Mapping[str, Any], error: Exception) -> UserError:
    return UserError(f"{storage.url}/{path}: damaged at {place['key']} ({error}); run `loomvideo data verify`")


def _displaced(storage: Storage | RangeFetcher, path: str, place: Mapping[str, Any], key: str) -> UserError:
    return UserError(
        f"{storage.url}/{path}: holds {key} where the index has {place['key']}; run `loomvideo data verify`"
    )
