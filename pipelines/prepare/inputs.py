"""The input of a prepare job: its samples as a table, and what is none or was dropped on the way.

A sample is a row of a few hundred bytes, its JSON among them: the driver holds that and its key, never an object a
sample.
"""

import functools
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loomvideo.model.sizes import model_size
from loomvideo.pipelines.media.files import base_folder, media_stamp, resolve
from loomvideo.pipelines.media.fragments import split_fragment
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.estimate import planned_bytes
from loomvideo.pipelines.prepare.input_cache import CACHE_FOLDER, cache_name, cached, keep
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.fields import without_spaces
from loomvideo.pipelines.sources.samples import Sample, media_paths, stored_sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.folders import absolute
from loomvideo.platform.shards.plan import digest_unordered
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.takedown import identities, tombstones

logger = logging.getLogger(__name__)

SAMPLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("num_bytes", pa.int64()),
        ("sample", pa.large_string()),
        ("media", pa.large_string()),
        ("assessed", pa.large_string()),
    ]
)
"""A row a sample: its JSON, estimated size, what is known of its files (``{path: [size, time]}``) and frames."""

_BATCH_ROWS = 16_384
# Files that samples share, such as sources, come again soon; all of them would be a table of their own.
_KNOWN_FILES = 65_536
# Fewer parts of films are no reason to speak of cutting them.
_MANY_PARTS = 100


class Inputs:
    """The samples to prepare and the lines that are none.

    Attributes:
        table: A table of :data:`SAMPLE_SCHEMA`, in input order, keys unique.
        losses: What is left out.
    """

    def __init__(self, table: pa.Table, losses: list[Outcome]):
        self.table, self.losses = table, losses

    def __len__(self) -> int:
        return len(self.table)

    @functools.cached_property
    def digest(self) -> str:
        """Names the input, whatever order its lines have."""
        return digest_unordered(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from self._strings("sample")
        for loss in self.losses:
            yield json.dumps([loss.key, loss.dataset, loss.outcome, loss.stage, loss.reason, loss.message])

    def _strings(self, column: str) -> Iterator[str]:
        for chunk in self.table.column(column).chunks:
            for start in range(0, len(chunk), _BATCH_ROWS):
                yield from chunk.slice(start, _BATCH_ROWS).to_pylist()

    def samples(self) -> Iterator[Sample]:
        """The samples, parsed one after another."""
        return map(stored_sample, self._strings("sample"))

    def assessed(self) -> Iterator[dict[str, Any]]:
        """What curation found of each sample."""
        return map(json.loads, self._strings("assessed"))


class InputTable:
    """Collects samples as rows.

    Args:
        config: The configuration of the job, for splits, sizes and the files' folder.

    Attributes:
        parts: Media paths that name a part of a file.
    """

    def __init__(self, config: PrepareConfig):
        self.config, self.base, self.model = config, base_folder(config.input), model_size(config.model)
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[tuple] = []
        self._sizes: dict[tuple, int] = {}
        self.parts = 0
        self._films: set[int] = set()
        self._stamp = functools.lru_cache(_KNOWN_FILES)(lambda path: media_stamp(resolve(path, self.base)))

    def __len__(self) -> int:
        return len(self._batches) * _BATCH_ROWS + len(self._rows)

    @property
    def films(self) -> int:
        """Files of which parts are named."""
        return len(self._films)

    def add(self, sample: Sample, assessed: dict[str, Any] | None = None) -> None:
        """Append a sample, with what curation found of it."""
        for path in media_paths(sample):
            file, part = split_fragment(path)
            if part is not None:
                self.parts += 1
                self._films.add(hash(file))
        self._rows.append(
            (
                sample.key,
                sample.dataset,
                sample.assigned_split(self.config.heldout_fraction),
                self._planned_bytes(sample),
                sample.to_json(),
                self.stamps(media_paths(sample)),
                json.dumps(assessed, sort_keys=True) if assessed else "{}",
            )
        )
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def _planned_bytes(self, sample: Sample) -> int:
        # It depends on nothing else of a sample.
        kind = (sample.task, bool(sample.source), len(sample.references))
        if kind not in self._sizes:
            self._sizes[kind] = planned_bytes(sample, self.config, self.model)
        return self._sizes[kind]

    def sample_of_key(self, key: str) -> str | None:
        """JSON of the sample of that key, None if none was added; looks through all of them."""
        for row in self._rows:
            if row[0] == key:
                return row[4]
        for batch in self._batches:
            position = pc.index(batch.column("key"), key).as_py()
            if position >= 0:
                return batch.column("sample")[position].as_py()
        return None

    def stamps(self, paths: Iterable[str]) -> str:
        """JSON of what a sample's files look like now: ``{path: [size, time]}`` of local ones that exist."""
        found = {path: stamp for path in paths if (stamp := self._stamp(path)) is not None}
        return json.dumps(found, sort_keys=True) if found else ""

    def stamped(self, table: pa.Table) -> pa.Table:
        """A table with what its files look like now."""

        def batches() -> Iterator[pa.Array]:
            for batch in table.select(["sample"]).to_batches(_BATCH_ROWS):
                samples = map(json.loads, batch.column(0).to_pylist())
                paths = ((s["target"], s.get("source"), *s.get("references", ())) for s in samples)
                stamps = [self.stamps(filter(None, some)) for some in paths]
                yield pa.array(stamps, SAMPLE_SCHEMA.field("media").type)

        column = pa.chunked_array(batches(), SAMPLE_SCHEMA.field("media").type)
        return table.set_column(SAMPLE_SCHEMA.get_field_index("media"), SAMPLE_SCHEMA.field("media"), column)

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else [[] for _ in SAMPLE_SCHEMA]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, SAMPLE_SCHEMA, strict=True)]
        self._batches.append(pa.record_batch(arrays, schema=SAMPLE_SCHEMA))
        self._rows = []

    def finish(self, losses: list[Outcome]) -> Inputs:
        """The collected samples."""
        if self._rows:
            self._flush()
        return Inputs(pa.Table.from_batches(self._batches, SAMPLE_SCHEMA), losses)


def read_inputs(config: PrepareConfig, storage: Storage | None = None, keep_table: bool = False) -> Inputs:
    """Read the input, or take its last reading where it is the same sample file.

    What is no sample, repeated keys, and what was taken down are set aside with their reason.

    Samples that lack nothing but their text are taken when the caption stage can give them one.

    Args:
        config: The job.
        storage: The dataset folder, for its take-downs and its last reading; None for neither.
        keep_table: Keep this reading in the folder for the next.

    Raises:
        UserError: if there is no such input or it holds no sample.
    """
    removed = tombstones(storage) if storage is not None else set()
    name = cache_name(config, removed) if storage is not None else None
    known = cached(storage, name) if name is not None else None
    if known is not None:
        table, losses = known
        return Inputs(InputTable(config).stamped(table), losses)
    inputs = _read(config, removed)
    if name is not None and keep_table:
        keep(storage, name, inputs.table, inputs.losses)
    return inputs


def input_rows(config: PrepareConfig, storage: Storage) -> Iterator[tuple[str, str]]:
    """``(key, JSON)`` of all samples that :func:`read_inputs` takes, one by one; only hashes of keys are held."""
    removed = tombstones(storage)
    name = cache_name(config, removed)
    if name is not None and name in storage.names(CACHE_FOLDER):
        with storage.fs.open(storage.full_path(f"{CACHE_FOLDER}/{name}"), "rb") as opened:
            for batch in pq.ParquetFile(opened).iter_batches(_BATCH_ROWS, columns=["key", "sample"]):
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
        return
    known: set[int] = set()
    for item in _items(config):
        if isinstance(item, Rejected) or hash(item.key) in known:
            continue
        if removed and removed & identities(item.key, item.group, media_paths(item), item.extra):
            continue
        known.add(hash(item.key))
        yield item.key, item.to_json()


def _items(config: PrepareConfig) -> Iterator[Sample | Rejected]:
    """What the input has: samples with paths as they stand in it, and what is none."""
    base = base_folder(config.input) + "/"
    # Where workers on other nodes reach them too.
    extracted = f"{absolute(config.output)}/work/extracted"
    for found in open_source(config.input, config.format, extracted, **config.source_options):
        unfinished = isinstance(found, Rejected) and config.makes_texts and found.unfinished is not None
        item = found.unfinished if unfinished else found
        yield item if isinstance(item, Rejected) else _relative(item, base)


def _read(config: PrepareConfig, removed: set[str]) -> Inputs:
    base = base_folder(config.input) + "/"
    collected = InputTable(config)
    # Hashes: keys themselves, with the dictionary that finds their rows, would take half of the driver's memory.
    known: set[int] = set()
    losses: list[Outcome] = []
    taken_down = 0
    for sample in _items(config):
        if isinstance(sample, Rejected):
            where = sample.where.removeprefix(base)
            message = f"{where}: {sample.detail}"
            losses.append(Outcome(where, sample.dataset or "unknown", "quarantined", "read", sample.reason, message))
            continue
        if removed and removed & identities(sample.key, sample.group, media_paths(sample), sample.extra):
            taken_down += 1
            losses.append(Outcome(sample.key, sample.dataset, "removed", "read", "tombstone", "removed by request"))
            continue
        first = collected.sample_of_key(sample.key) if hash(sample.key) in known else None
        if first is not None:
            same = _squeezed(stored_sample(first)) == _squeezed(sample)
            kind, reason = ("duplicates", "repeated_line") if same else ("quarantined", "repeated_key")
            losses.append(Outcome(sample.key, sample.dataset, kind, "read", reason, f"key {sample.key} again"))
            continue
        known.add(hash(sample.key))
        collected.add(sample)
    if collected.parts > _MANY_PARTS and collected.parts > 2 * collected.films:
        logger.warning(
            "input=%s: %d media paths name parts of %d films, and every stage reads the whole film for each; "
            "`loomvideo data cut input=%s output=…` reads each once and writes clips and a sample file for `prepare`",
            config.input, collected.parts, collected.films, config.input,
        )  # fmt: skip
    if not known and not taken_down:
        first = f"; first: {losses[0].message}" if losses else ""
        raise UserError(f"input={config.input}: no valid sample in it{first}")
    return collected.finish(losses)


def _relative(sample: Sample, base: str) -> Sample:
    """Paths as they stand in the input: equal input makes equal shards wherever it lies."""
    if not any(path.startswith(base) for path in media_paths(sample)):
        return sample
    values = vars(sample) | {
        "target": sample.target.removeprefix(base),
        "source": sample.source and sample.source.removeprefix(base),
        "references": [path.removeprefix(base) for path in sample.references],
    }
    return Sample(**values)


def _squeezed(sample: Sample) -> dict[str, Any]:
    """The fields of a sample, texts without the spaces that a copy may have more."""
    return {name: without_spaces(value) for name, value in vars(sample).items()}
