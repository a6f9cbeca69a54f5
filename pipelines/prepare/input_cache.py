"""The input as it was read last: a sample file that has not changed is not parsed and checked again.

Only for the project's own sample files: what they say depends on nothing but the file. Other layouts are folders whose
every file may matter, so they are read anew.
"""

import dataclasses
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from loomvideo.pipelines import sources
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.pipelines.sources.base import locate
from loomvideo.platform.config import flatten
from loomvideo.platform.folders import absolute
from loomvideo.platform.shards.plan import digest
from loomvideo.platform.shards.storage import Storage

CACHE_FOLDER = "work/inputs"
_LOSSES = b"loomvideo.losses"
_ROWS_IN_A_GROUP = 16_384


def cache_name(config: PrepareConfig, removed: set[str]) -> str | None:
    """Names all that the table of the input depends on, None for an input that is read anew each time.

    Args:
        config: The job.
        removed: Identities that were taken down.
    """
    if config.format not in ("auto", "jsonl") or config.source_options:
        return None
    place = locate(config.input)
    if not place.file or not sources.FORMATS["jsonl"].detect(place):
        return None
    fs, path = fsspec.url_to_fs(config.input)
    info = fs.info(path)
    stamp = [str(info.get(name)) for name in ("size", "mtime", "ETag", "etag", "LastModified", "updated")]
    if set(stamp[1:]) == {"None"}:
        return None
    code = [file.read_bytes() for file in sorted(Path(sources.__file__).parent.glob("*.py"))]
    # The same from another folder, and for workers that stand in one.
    places = {name: absolute(getattr(config, name)) for name in ("input", "output", "codec_folder", "mllm_folder")}
    values = json.dumps(flatten(dataclasses.replace(config, **places)), sort_keys=True, default=str)
    return f"{digest(places['input'], stamp, sorted(removed), digest(*code), values)}.parquet"


def cached(storage: Storage, name: str) -> tuple[pa.Table, list[Outcome]] | None:
    """The table and losses of that name, None when they are not there."""
    if name not in storage.names(CACHE_FOLDER):
        return None
    table = pq.read_table(pa.BufferReader(storage.read_bytes(f"{CACHE_FOLDER}/{name}")))
    losses = [Outcome(**values) for values in json.loads(table.schema.metadata[_LOSSES])]
    return table.replace_schema_metadata(None), losses


def keep(storage: Storage, name: str, table: pa.Table, losses: list[Outcome]) -> None:
    """Write table and losses, and delete those of other names."""
    text = json.dumps([loss.to_dict() for loss in losses])
    with storage.staged(f"{CACHE_FOLDER}/{name}") as path:
        schema = table.schema.with_metadata({_LOSSES: text})
        # A few rows at a time: the writer holds a group as it is encoded beside the table.
        with pq.ParquetWriter(path, schema, compression="zstd") as out:
            for batch in table.to_batches(_ROWS_IN_A_GROUP):
                out.write_batch(batch.replace_schema_metadata(schema.metadata))
    for other in storage.names(CACHE_FOLDER):
        if other != name:
            storage.delete(f"{CACHE_FOLDER}/{other}")
