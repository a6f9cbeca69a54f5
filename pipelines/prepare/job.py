"""The prepare job: raw samples to shards.

The plan (sample -> shard and slot) is made first, from the input, the configuration and the seed alone. Shard builders
in a Ray Data actor pool then build what has no valid commit record yet, and the dataset is closed when every input
sample is accounted for. So a second run has nothing to do, an interrupted one resumes on any number of CPUs, and both
end in the same bytes.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from loomvideo.model.sizes import model_size, with_folders
from loomvideo.pipelines.media.files import base_folder, media_stamp, resolve
from loomvideo.pipelines.prepare.accounts import check_losses, count_outcomes, quarantine_table
from loomvideo.pipelines.prepare.builder import PLAN_FILE, SHARED_RECORD, SHARED_TASK, ShardBuilder
from loomvideo.pipelines.prepare.caption_stage import (
    CAPTION_FOLDER,
    CAPTION_PLAN,
    caption_chunks,
    caption_recipe,
    run_captions,
    with_captions,
)
from loomvideo.pipelines.prepare.chunks import chunk_rows, plan_chunks, stale_chunks, write_plan
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.curate import (
    CURATION_FOLDER,
    CURATION_PLAN,
    SampleAssessor,
    assessments,
    chunk_recipe_parts,
    decide,
)
from loomvideo.pipelines.prepare.encode import TENSORS_VERSION, encoder_identity
from loomvideo.pipelines.prepare.estimate import estimated_bytes
from loomvideo.pipelines.prepare.features import combined_error
from loomvideo.pipelines.prepare.geometry import PIXELS_VERSION
from loomvideo.pipelines.prepare.inputs import Inputs, read_inputs, without_removed
from loomvideo.pipelines.prepare.pools import map_on_actors
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.config import flatten, to_yaml
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    QUARANTINE_FILE,
    SHARD_FOLDER,
    SHARED_FILE,
    Manifest,
    shard_path,
)
from loomvideo.platform.shards.plan import PlanItem, PlannedShard, digest, plan_shards
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.takedown import tombstones
from loomvideo.platform.shards.writer import (
    RECORD_FOLDER,
    ShardRecord,
    finish_dataset,
    read_record,
    record_path,
    write_table,
)

logger = logging.getLogger(__name__)

CONFIG_FILE = "work/config.yaml"
# What changes where or how fast the work is done, not what is written.
NOT_IN_MANIFEST = (
    "input", "output", "run", "workers.", "limits.", "codec_folder", "mllm_folder", "features.max_error",
    "caption_workers.", "captions.base_url", "captions.api_key_env", "captions.cache", "captions.concurrency",
    "captions.per_minute", "captions.max_attempts", "captions.timeout_s",
)  # fmt: skip
# Texts are part of the samples and assessments are kept beside them: what made them is no part of a shard's recipe.
NOT_IN_RECIPE = (*NOT_IN_MANIFEST, "captions.", "stages.", "curate")


@dataclasses.dataclass
class PrepareResult:
    """What a prepare job did.

    Attributes:
        manifest: Of the finished dataset.
        built_shards: Shards that were visited.
        reused_shards: Shards that were left as they lay.
        seconds: Of the whole job.
        reason: Why it was built, or ``up to date``.
        work: ``made.{member}`` and ``kept.{member}`` of the visited shards, ``assessed``, ``decoded`` (of them, those
            whose files were decoded), ``captioned``, ``asked`` (of them, those that a model answered).
    """

    manifest: Manifest
    built_shards: int
    reused_shards: int
    seconds: float
    reason: str
    work: Counter[str] = dataclasses.field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """The main figures."""
        counts = Counter()
        for count in self.manifest.counts.values():
            counts.update(count)
        num_bytes = sum(shard.num_bytes for shard in self.manifest.shards)
        return {
            **counts,
            "shards": len(self.manifest.shards),
            "built_shards": self.built_shards,
            "reused_shards": self.reused_shards,
            **{name: count for name, count in sorted(self.work.items()) if count},
            "megabytes": num_bytes / 1e6,
            "seconds": self.seconds,
            "samples_per_s": counts["written"] / self.seconds if self.built_shards else 0.0,
            "dataset": self.manifest.digest[:16],
            "state": self.reason,
        }


Progress = Callable[[dict[str, Any], int], None]


def make_plan(inputs: Inputs, config: PrepareConfig) -> list[PlannedShard]:
    """Deal the samples into shards."""
    model = model_size(config.model)
    items = (
        PlanItem(sample.key, sample.assigned_split(config.heldout_fraction), estimated_bytes(sample, config, model))
        for sample in inputs.samples
    )
    return plan_shards(items, config.shards.target_bytes, config.shards.max_samples, config.seed)


def recipe_parts(inputs: Inputs, config: PrepareConfig) -> dict[str, str]:
    """What the dataset's content depends on, part by part, so that a stale one can say why."""
    values = {k: v for k, v in flatten(config).items() if not k.startswith(NOT_IN_RECIPE)}
    model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
    parts = {
        "input": inputs.digest,
        "config": digest(json.dumps(values, sort_keys=True)),
        "encoders": encoder_identity(model),
        "code": digest(PIXELS_VERSION, TENSORS_VERSION),
    }
    if config.curate:
        parts["stages"] = digest(*chunk_recipe_parts(config))
    if config.makes_texts:
        parts["captions"] = caption_recipe(config)
    return parts


def manifest_config(config: PrepareConfig) -> dict[str, Any]:
    """The configuration that a dataset's content depends on; stages that are off left out."""
    off = [*(() if config.curate else ("stages.",)), *(() if config.makes_texts else ("captions.",))]
    return {k: v for k, v in flatten(config).items() if not k.startswith((*NOT_IN_MANIFEST, *off))}


def prepare(
    config: PrepareConfig,
    session: Callable[[], Any] | None = None,
    on_progress: Progress | None = None,
    again: Collection[str] = (),
) -> PrepareResult:
    """Bring the output folder up to date with input and configuration.

    Args:
        config: The job.
        session: Makes a context in which Ray is up; entered only when there is work. By default the caller's session.
        on_progress: Called with a worker's report and the number of its rows.
        again: Names of shards, and paths of chunks' results, to do again though nothing they depend on has changed.

    Raises:
        UserError: for bad input or configuration, or when more is lost than ``limits.max_loss`` allows.
    """
    config.check()
    started = time.perf_counter()
    storage = Storage(config.output)
    inputs = without_removed(read_inputs(config), tombstones(storage))
    for folder in (SHARD_FOLDER, RECORD_FOLDER, CURATION_FOLDER, CAPTION_FOLDER, "work", ""):
        storage.remove_temporaries(folder)
    recipe = recipe_parts(inputs, config)
    stamps = Stamps(base_folder(config.input))
    work: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        entered: list[bool] = []

        def connect() -> None:
            if session is not None and not entered:
                stack.enter_context(session())
                entered.append(True)

        def progress(report: dict[str, Any], total: int) -> None:
            work.update({name: report[name] for name in _WORK if name in report} | report.get("members", {}))
            if on_progress is not None:
                on_progress(report, total)

        if config.curate:
            inputs = _curated(storage, inputs, config, stamps, connect, progress, again)
        if config.makes_texts:
            inputs = _captioned(storage, inputs, config, stamps, connect, progress, again)
        plan = make_plan(inputs, config)
        by_key = {sample.key: sample for sample in inputs.samples}
        rows = [
            {"shard": shard.name, "split": shard.split, "recipe": _shard_recipe(shard, by_key, inputs, recipe)}
            for shard in plan
        ]
        shared_recipe = digest(recipe["config"], recipe["encoders"], recipe["code"])
        shared_row = {"shard": SHARED_TASK, "split": "", "recipe": shared_recipe}
        todo = [row for row in rows if row["shard"] in again or not _is_current(storage, row, stamps)]
        shared_sha256 = _shared_sha256(storage, shared_row)
        before = stored_manifest(storage)
        if not todo and shared_sha256 and before is not None and before.recipe == recipe:
            return PrepareResult(before, 0, len(rows), time.perf_counter() - started, "up to date", work)
        reason = _why(before, recipe, todo, config)
        storage.write_bytes(CONFIG_FILE, to_yaml(config).encode())
        if todo or not shared_sha256:
            # Without its manifest the folder is no finished dataset while its shards change.
            storage.delete(MANIFEST_FILE)
            storage.delete(INDEX_FILE)
            write_plan(storage, PLAN_FILE, plan, inputs, by_key)
            tasks = ([] if shared_sha256 else [shared_row]) + todo
            connect()
            for report in run_builders(config, tasks):
                _check_error(report, config)
                progress(report, len(tasks))
    _remove_unplanned(storage, plan)
    records = [read_record(storage, shard.name) for shard in plan]
    missing = [shard.name for shard, record in zip(plan, records, strict=True) if record is None]
    if missing:
        raise RuntimeError(f"{len(missing)} shards were not committed, first {missing[0]}")
    manifest = _finish(storage, config, inputs, recipe, records, _shared_sha256(storage, shared_row))
    return PrepareResult(manifest, len(todo), len(rows) - len(todo), time.perf_counter() - started, reason, work)


_WORK = ("assessed", "decoded", "captioned", "asked")


def _curated(
    storage: Storage,
    inputs: Inputs,
    config: PrepareConfig,
    stamps: "Stamps",
    connect: Callable[[], None],
    on_progress: Progress,
    again: Collection[str],
) -> Inputs:
    """The inputs without what curation drops, with what it found of the others."""
    chunks = plan_chunks(inputs.samples)
    by_key = {sample.key: sample for sample in inputs.samples}
    rows = chunk_rows(chunks, by_key, *chunk_recipe_parts(config))
    stale = stale_chunks(storage, CURATION_FOLDER, rows, stamps.same, again)
    if stale:
        write_plan(storage, CURATION_PLAN, chunks, inputs, by_key)
        connect()
        for report in run_assessors(config, stale):
            on_progress(report, len(stale))
    return decided(storage, inputs, config, chunks)


def decided(storage: Storage, inputs: Inputs, config: PrepareConfig, chunks: list[PlannedShard]) -> Inputs:
    """The inputs after committed assessments."""
    kept, outcomes = decide(list(assessments(storage, chunks)), config)
    judged = {sample.key: {"scores": j.scores, "reasons": list(j.reasons)} for sample, j in kept}
    return Inputs([sample for sample, _ in kept], [*inputs.rejected, *outcomes], judged)


def _captioned(
    storage: Storage,
    inputs: Inputs,
    config: PrepareConfig,
    stamps: "Stamps",
    connect: Callable[[], None],
    on_progress: Progress,
    again: Collection[str],
) -> Inputs:
    """The inputs with texts that a model wrote."""
    asked = caption_chunks(inputs, config)
    stale = stale_chunks(storage, CAPTION_FOLDER, asked.rows, stamps.same, again)
    if stale:
        write_plan(storage, CAPTION_PLAN, asked.chunks, inputs, asked.samples)
        connect()
        for report in run_captions(config, stale):
            on_progress(report, len(stale))
    return with_captions(storage, inputs, asked.chunks, config.captions)


def _check_error(report: dict[str, Any], config: PrepareConfig) -> None:
    features = config.features
    if report["feature_error"] > features.max_error:
        key, fix = f"dtype={features.dtype}", "use features.dtype=bf16"
        if features.layers:
            key, fix = f"layers={features.layers}", "list more layers, or allow the loss"
        raise UserError(
            f"features.{key}: relative error {report['feature_error']:.4f} in a layer of shard {report['shard']}, "
            f"features.max_error={features.max_error:g}; {fix}"
        )


def run_builders(config: PrepareConfig, work: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Build shards on the Ray cluster; yields a report a shard."""
    workers = config.workers
    yield from map_on_actors(ShardBuilder, (config,), work, workers.count, workers.cpus, workers.gpus)


def run_assessors(config: PrepareConfig, work: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Assess chunks on the Ray cluster; yields a report a chunk."""
    yield from map_on_actors(SampleAssessor, (config,), work, config.workers.count, config.workers.cpus, gpus=0.0)


class Stamps:
    """Size and time of media files, each looked at once."""

    def __init__(self, base: str):
        self.base = base
        self._known: dict[str, list | None] = {}

    def same(self, media: Mapping[str, list | None]) -> bool:
        """Whether the files are as they were."""
        for path, stamp in media.items():
            if path not in self._known:
                self._known[path] = media_stamp(resolve(path, self.base))
            if self._known[path] != stamp:
                return False
        return True


def _is_current(storage: Storage, row: dict[str, Any], stamps: Stamps) -> bool:
    record = read_record(storage, row["shard"])
    if record is None or record.recipe != row["recipe"]:
        return False
    return all(stamps.same(outcome["media"]) for outcome in record.outcomes)


def _shard_recipe(shard: PlannedShard, by_key: dict[str, Sample], inputs: Inputs, recipe: dict[str, str]) -> str:
    lines = [by_key[key].to_json() + inputs.judged_json(key) for key in shard.keys]
    return digest(recipe["config"], recipe["encoders"], recipe["code"], shard.name, *lines)


def _shared_sha256(storage: Storage, row: dict[str, Any]) -> str:
    if not storage.exists(SHARED_RECORD) or not storage.exists(SHARED_FILE):
        return ""
    known = json.loads(storage.read_bytes(SHARED_RECORD))
    return known["sha256"] if known["recipe"] == row["recipe"] else ""


def stored_manifest(storage: Storage) -> Manifest | None:
    """The manifest of a finished dataset; None without one, or with one of another format version."""
    if not storage.exists(MANIFEST_FILE):
        return None
    try:
        return Manifest.from_json(storage.read_bytes(MANIFEST_FILE), f"{storage.url}/{MANIFEST_FILE}")
    except UserError as error:
        logger.warning("%s", error)
        return None


def _why(before: Manifest | None, recipe: dict[str, str], todo: list[dict[str, Any]], config: PrepareConfig) -> str:
    if before is None:
        return "built"
    changed = sorted(part for part in {*recipe, *before.recipe} if before.recipe.get(part) != recipe.get(part))
    if not changed:
        return f"rebuilt {len(todo)} shards: media files changed or a shard was damaged"
    parts = [part for part in changed if part not in ("config", "stages", "captions")]
    if parts != changed:
        now = manifest_config(config)
        different = [
            f"{key} {before.config[key]!r} -> {now[key]!r}"
            for key in now
            if key in before.config and before.config[key] != now[key]
        ]
        parts.append("config (" + ", ".join(different or ["stages on or off, or new keys"]) + ")")
    return "rebuilt: changed " + ", ".join(parts)


def _remove_unplanned(storage: Storage, plan: list[PlannedShard]) -> None:
    tars = {shard_path(shard.name) for shard in plan}
    records = {record_path(shard.name) for shard in plan}
    for folder, planned in ((SHARD_FOLDER, tars), (RECORD_FOLDER, records)):
        for name in storage.names(folder):
            if f"{folder}/{name}" not in planned:
                storage.delete(f"{folder}/{name}")


def _finish(
    storage: Storage,
    config: PrepareConfig,
    inputs: Inputs,
    recipe: dict[str, str],
    records: list[ShardRecord],
    shared_sha256: str,
) -> Manifest:
    samples = {sample.key: sample for sample in inputs.samples}
    outcomes = [*inputs.rejected, *(outcome for record in records for outcome in record.outcomes)]
    counts = count_outcomes(inputs, outcomes)
    losses = [outcome for outcome in outcomes if outcome["outcome"] != "written"]
    write_table(storage, QUARANTINE_FILE, quarantine_table(losses, samples))
    check_losses(losses, sum(count["inputs"] for count in counts.values()), config)
    return finish_dataset(
        storage,
        records,
        config=manifest_config(config),
        encoders=_encoders(records),
        features={
            "mode": config.features.mode,
            "dtype": config.features.dtype,
            "layers": config.features.layers,
            "num_layers": model_size(config.model).dit.num_layers,
            "error": combined_error([record.facts.get("feature_error") for record in records]),
        },
        counts=counts,
        inputs={"digest": inputs.digest, "samples": len(inputs.samples), "rejected": len(inputs.rejected)},
        recipe=recipe,
        shared_sha256=shared_sha256,
    )


def _encoders(records: list[ShardRecord]) -> dict[str, str]:
    found = {json.dumps(record.facts["encoders"], sort_keys=True) for record in records}
    if len(found) > 1:
        raise RuntimeError(f"shards of one dataset come from different encoders: {' and '.join(sorted(found))}")
    return json.loads(found.pop()) if found else {}
