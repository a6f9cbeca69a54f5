"""Captions as a stage of the prepare graph: units of samples in, a committed result a unit with every answer.

It comes after assessing, so that nothing is paid for dropped samples, and before the plan of shards. Units are
dealt, committed and re-used like those of curation; answers are cached besides, so an interrupted unit asks only
what it had not asked.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator

import pyarrow as pa

from loomvideo.pipelines.captions import Captioner, CaptionResult, with_text
from loomvideo.pipelines.captions.cost import caption_cost, check_budget
from loomvideo.pipelines.captions.dataset import asked_for
from loomvideo.pipelines.captions.frames import FrameReader
from loomvideo.pipelines.captions.ray_llm import ask_ray_llm
from loomvideo.pipelines.captions.requests import PROMPT_VERSIONS
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.inputs import Inputs, InputTable
from loomvideo.pipelines.prepare.outcomes import RETRIABLE, Outcome
from loomvideo.pipelines.prepare.pools import Pool, map_on_actors
from loomvideo.pipelines.prepare.unit_rows import UnitReport, WorkRow
from loomvideo.pipelines.prepare.units import commit_result, read_planned
from loomvideo.pipelines.sources.samples import Sample, stored_sample
from loomvideo.platform.shards.plan import digest
from loomvideo.platform.shards.storage import Storage

logger = logging.getLogger(__name__)
CAPTION_FOLDER = "work/captions"
# What may differ without another answer.
_NOT_IN_RECIPE = (
    "base_url", "api_key_env", "cache", "concurrency", "per_minute", "max_attempts", "timeout_s",
    "input_usd", "output_usd", "budget_usd",
)  # fmt: skip


class CaptionWorker:
    """Writes the texts of a unit; one a Ray actor.

    Args:
        config: The configuration of the job.
    """

    def __init__(self, config: PrepareConfig):
        options = config.captions
        self.storage = Storage(config.output)
        self.captioner = Captioner(options)
        base = base_folder(config.input)
        self.reader = FrameReader(options.num_frames, options.max_side, base, config.workers.decode_timeout_s)

    def __call__(self, row: WorkRow) -> UnitReport:
        """Ask for the texts of the unit that a row names and commit the answers."""
        samples = _samples(self.storage, row)
        results = [result for _, result in self.captioner.run(samples, self.reader)]
        return commit(self.storage, row, samples, results)

    def close(self) -> None:
        """End the decoder process."""
        self.reader.close()


def _samples(storage: Storage, row: WorkRow) -> list[Sample]:
    return [stored_sample(planned["sample"]) for planned in read_planned(storage, row)]


def commit(storage: Storage, row: WorkRow, samples: list[Sample], results: list[CaptionResult]) -> UnitReport:
    """Write a unit's answers; returns the report of it.

    Raises:
        RuntimeError: if a sample has no result.
    """
    by_key = {result.key: result for result in results}
    missing = [sample.key for sample in samples if sample.key not in by_key]
    if missing:
        raise RuntimeError(f"{row['unit']}: {len(missing)} samples came back without a result, first {missing[0]}")
    result = {"results": [dataclasses.asdict(by_key[sample.key]) for sample in samples]}
    commit_result(storage, CAPTION_FOLDER, row, result)
    asked = sum(result.status == "made" for result in results)
    return {"stage": "caption", "unit": row["unit"], "captioned": len(results), "asked": asked}


def asked_inputs(inputs: Inputs, config: PrepareConfig) -> Inputs:
    """The samples whose text is asked for."""
    wanted = [asked_for(sample, config.captions) for sample in inputs.samples()]
    return Inputs(inputs.table.filter(pa.array(wanted, pa.bool_())), [])


def caption_recipe(config: PrepareConfig) -> str:
    """Names all that the texts depend on besides the samples."""
    options = {k: v for k, v in dataclasses.asdict(config.captions).items() if k not in _NOT_IN_RECIPE}
    if not options["verify"]:
        # Results of before there was a second question are the same without one.
        del options["verify"]
    if not options["wordings"]:
        del options["wordings"]
    return digest("captions", PROMPT_VERSIONS[config.captions.mode], json.dumps(options, sort_keys=True))


def caption_pool(config: PrepareConfig) -> Pool:
    """Actors that hold a model, or that ask a server, each with a decoder of its own."""
    workers = config.caption_workers
    return Pool(workers.count, workers.cpus, 0.0 if config.captions.backend == "openai" else workers.gpus)


def run_captions(config: PrepareConfig, work: list[WorkRow]) -> Iterator[UnitReport]:
    """Ask for the texts of units on the Ray cluster; yields a report a unit.

    Raises:
        UserError: if the estimate passes ``captions.budget_usd``.
    """
    storage = Storage(config.output)
    cost = caption_cost((sample for row in work for sample in _samples(storage, row)), config.captions)
    check_budget(cost, config.captions)
    if cost.questions:
        logger.warning("captions: %s (estimated; answers in %s cost nothing)", cost, config.captions.cache)
    # A relative folder means the same to actors on this machine, wherever they run.
    # The limit of a provider is one for all of them.
    share = config.captions.per_minute / max(min(config.caption_workers.count or len(work), len(work)), 1)
    options = dataclasses.replace(config.captions, cache=os.path.abspath(config.captions.cache), per_minute=share)
    config = dataclasses.replace(config, captions=options)
    if options.backend == "vllm":
        yield from _with_ray_llm(config, work)
    else:
        yield from map_on_actors(CaptionWorker, (config,), work, caption_pool(config))


def _with_ray_llm(config: PrepareConfig, work: list[WorkRow]) -> Iterator[UnitReport]:
    storage, base = Storage(config.output), base_folder(config.input)
    units = {row["unit"]: _samples(storage, row) for row in work}
    unit_of = {sample.key: unit for unit, samples in units.items() for sample in samples}
    rows = {row["unit"]: row for row in work}
    results: dict[str, list[CaptionResult]] = {unit: [] for unit in units}
    ask = ask_ray_llm(config.caption_workers, base)
    for _, result in ask(config.captions, [sample for samples in units.values() for sample in samples]):
        unit = unit_of[result.key]
        results[unit].append(result)
        if len(results[unit]) == len(units[unit]):
            yield commit(storage, rows[unit], units[unit], results.pop(unit))


def _results(data: bytes) -> list[CaptionResult]:
    return [CaptionResult(**values) for values in json.loads(data)["results"]]


def lost_by_captions(result: bytes) -> set[str]:
    """Keys of a committed result that another attempt may answer."""
    return {found.key for found in _results(result) if found.status in RETRIABLE}


def with_captions(results: Iterable[bytes], inputs: Inputs, config: PrepareConfig) -> Inputs:
    """The inputs with the committed texts; samples that have none at the end are set aside with the reason."""
    by_key = {found.key: found for data in results for found in _results(data)}
    mode, losses, collected = config.captions.mode, list(inputs.losses), InputTable(config)
    for sample, assessed in zip(inputs.samples(), inputs.assessed(), strict=True):
        result = by_key.get(sample.key)
        finished = with_text(sample, result, mode) if result is not None else sample
        if finished.text:
            collected.add(finished, assessed)
            continue
        reason = result.status if result is not None else "no_text"
        message = result.detail if result is not None else f"captions.mode={mode} does not ask for it"
        losses.append(Outcome.of(sample, "quarantined", "caption", reason, message))
    return collected.finish(losses)
