"""Captions as a stage of the prepare graph: chunks of samples in, a committed result a chunk with every answer.

It comes after assessing, so that nothing is paid for dropped samples, and before the plan of shards. Chunks are
dealt, committed and re-used like those of curation; answers are cached besides, so an interrupted chunk asks only
what it had not asked.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from loomvideo.pipelines.captions import Captioner, CaptionOptions, CaptionResult, with_text
from loomvideo.pipelines.captions.dataset import asked_for
from loomvideo.pipelines.captions.frames import FrameReader
from loomvideo.pipelines.captions.ray_llm import ask_ray_llm
from loomvideo.pipelines.captions.requests import PROMPT_VERSION
from loomvideo.pipelines.media.files import base_folder, media_stamp, resolve
from loomvideo.pipelines.prepare.chunks import chunk_path, chunk_rows, plan_chunks, read_chunk
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.inputs import Inputs
from loomvideo.pipelines.prepare.pools import map_on_actors
from loomvideo.pipelines.sources.samples import Sample, media_paths
from loomvideo.platform.shards.plan import PlannedShard, digest
from loomvideo.platform.shards.storage import Storage

CAPTION_FOLDER = "work/captions"
CAPTION_PLAN = "work/captions.parquet"
# What may differ without another answer.
_NOT_IN_RECIPE = ("base_url", "api_key_env", "cache", "concurrency", "per_minute", "max_attempts", "timeout_s")


class CaptionWorker:
    """Writes the texts of a chunk; one a Ray actor.

    Args:
        config: Of the job.
    """

    def __init__(self, config: PrepareConfig):
        options = config.captions
        self.storage = Storage(config.output)
        self.base = base_folder(config.input)
        self.captioner = Captioner(options)
        self.reader = FrameReader(options.num_frames, options.max_side, self.base, config.workers.decode_timeout_s)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Ask for the texts of the chunk that a row names and commit the answers."""
        samples = read_chunk(self.storage, CAPTION_PLAN, row["chunk"])
        results = [result for _, result in self.captioner.run(samples, self.reader)]
        return commit(self.storage, row, samples, results, self.base)


def commit(
    storage: Storage, row: dict[str, Any], samples: list[Sample], results: list[CaptionResult], base: str
) -> dict[str, Any]:
    """Write a chunk's answers; returns the report of it.

    Raises:
        RuntimeError: if a sample has no result.
    """
    by_key = {result.key: result for result in results}
    missing = [sample.key for sample in samples if sample.key not in by_key]
    if missing:
        raise RuntimeError(f"{row['chunk']}: {len(missing)} samples came back without a result, first {missing[0]}")
    record = {
        "recipe": row["recipe"],
        "media": {path: media_stamp(resolve(path, base)) for s in samples for path in media_paths(s)},
        "results": [dataclasses.asdict(by_key[sample.key]) for sample in samples],
    }
    path = chunk_path(CAPTION_FOLDER, row["chunk"])
    storage.write_bytes(path, json.dumps(record, sort_keys=True, ensure_ascii=False).encode())
    asked = sum(result.status == "made" for result in results)
    return {"chunk": row["chunk"], "captioned": len(results), "asked": asked}


@dataclasses.dataclass(frozen=True)
class Asked:
    """The samples whose text is asked for.

    Attributes:
        chunks: How they are dealt.
        rows: Of work, one a chunk.
        samples: By key.
    """

    chunks: list[PlannedShard]
    rows: list[dict[str, Any]]
    samples: dict[str, Sample]


def caption_chunks(inputs: Inputs, config: PrepareConfig) -> Asked:
    """Which samples' texts are asked for, dealt into chunks."""
    asked = {s.key: s for s in inputs.samples if asked_for(s, config.captions)}
    chunks = plan_chunks(asked.values())
    return Asked(chunks, chunk_rows(chunks, asked, caption_recipe(config)), asked)


def caption_recipe(config: PrepareConfig) -> str:
    """Names all that the texts depend on besides the samples."""
    options = {k: v for k, v in dataclasses.asdict(config.captions).items() if k not in _NOT_IN_RECIPE}
    return digest("captions", PROMPT_VERSION, json.dumps(options, sort_keys=True))


def run_captions(config: PrepareConfig, work: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ask for the texts of chunks on the Ray cluster; yields a report a chunk."""
    # A relative folder means the same to actors on this machine, wherever they run.
    options = dataclasses.replace(config.captions, cache=os.path.abspath(config.captions.cache))
    config = dataclasses.replace(config, captions=options)
    if options.backend == "vllm":
        yield from _with_ray_llm(config, work)
        return
    workers = config.caption_workers
    gpus = workers.gpus if options.backend == "transformers" else 0.0
    count = workers.count if options.backend == "transformers" else 1
    yield from map_on_actors(CaptionWorker, (config,), work, count, workers.cpus, gpus)


def _with_ray_llm(config: PrepareConfig, work: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    storage, base = Storage(config.output), base_folder(config.input)
    chunks = {row["chunk"]: read_chunk(storage, CAPTION_PLAN, row["chunk"]) for row in work}
    chunk_of = {sample.key: chunk for chunk, samples in chunks.items() for sample in samples}
    rows = {row["chunk"]: row for row in work}
    results: dict[str, list[CaptionResult]] = {chunk: [] for chunk in chunks}
    ask = ask_ray_llm(config.caption_workers, base)
    for _, result in ask(config.captions, [sample for samples in chunks.values() for sample in samples]):
        chunk = chunk_of[result.key]
        results[chunk].append(result)
        if len(results[chunk]) == len(chunks[chunk]):
            yield commit(storage, rows[chunk], chunks[chunk], results.pop(chunk), base)


def with_captions(storage: Storage, inputs: Inputs, chunks: list[PlannedShard], options: CaptionOptions) -> Inputs:
    """The inputs with the committed texts; samples that have none at the end are set aside with the reason."""
    results: dict[str, CaptionResult] = {}
    for chunk in chunks:
        record = json.loads(storage.read_bytes(chunk_path(CAPTION_FOLDER, chunk.name)))
        results |= {values["key"]: CaptionResult(**values) for values in record["results"]}
    samples, rejected = [], list(inputs.rejected)
    for sample in inputs.samples:
        result = results.get(sample.key)
        finished = with_text(sample, result, options.mode) if result is not None else sample
        if finished.text:
            samples.append(finished)
            continue
        rejected.append(
            {
                "key": sample.key,
                "dataset": sample.dataset,
                "outcome": "quarantined",
                "stage": "caption",
                "reason": result.status if result is not None else "no_text",
                "message": result.detail if result is not None else f"captions.mode={options.mode} does not ask for it",
                "sample": sample.to_json(),
            }
        )
    return Inputs(samples, rejected, inputs.judged)
