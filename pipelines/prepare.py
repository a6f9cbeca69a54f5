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
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loomvideo.model.presets import preset, with_folders
from loomvideo.pipelines.builder import PLAN_FILE, RETRIABLE, SHARED_RECORD, SHARED_TASK, ShardBuilder
from loomvideo.pipelines.curate import (
    CURATION_FOLDER,
    CURATION_PLAN,
    SampleJudge,
    chunk_rows,
    decide,
    judgements,
    media_paths,
    plan_chunks,
    stale_chunks,
)
from loomvideo.pipelines.encode import TENSORS_VERSION, encoder_identity
from loomvideo.pipelines.estimate import estimated_bytes
from loomvideo.pipelines.features import combined_error
from loomvideo.pipelines.geometry import PIXELS_VERSION
from loomvideo.pipelines.media_files import base_folder, media_stamp, resolve
from loomvideo.pipelines.prepare_config import PrepareConfig
from loomvideo.pipelines.samples import Sample
from loomvideo.pipelines.sources import Rejected, open_source
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
from loomvideo.platform.shards.plan import PlanItem, PlannedShard, digest, digest_lines, plan_shards
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.takedown import identities, tombstones
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
QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "dataset", "outcome", "stage", "reason")]
    + [("retriable", pa.bool_())]
    + [(name, pa.string()) for name in ("message", "sample")]
)
# What changes where or how fast the work is done, not what is written.
NOT_IN_RECIPE = ("input", "output", "run", "workers.", "limits.", "codec_folder", "mllm_folder", "features.max_error")


@dataclasses.dataclass
class Inputs:
    """The samples to prepare and the lines that are none.

    Attributes:
        samples: In input order, keys unique.
        rejected: Outcomes ``{key, dataset, outcome, stage, reason, message}`` of what is left out.
        judged: What curation found of the samples, by key.
    """

    samples: list[Sample]
    rejected: list[dict[str, Any]]
    judged: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Names the input, whatever order its lines have."""
        lines = [sample.to_json() for sample in self.samples] + [json.dumps(r, sort_keys=True) for r in self.rejected]
        return digest_lines(sorted(lines))

    def judged_json(self, key: str) -> str:
        """What curation found of a sample."""
        return json.dumps(self.judged.get(key, {}), sort_keys=True)


@dataclasses.dataclass
class PrepareResult:
    """What a prepare job did."""

    manifest: Manifest
    built_shards: int
    reused_shards: int
    seconds: float
    reason: str

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
            "megabytes": num_bytes / 1e6,
            "seconds": self.seconds,
            "samples_per_s": counts["written"] / self.seconds if self.built_shards else 0.0,
            "dataset": self.manifest.digest[:16],
            "state": self.reason,
        }


Progress = Callable[[dict[str, Any], int], None]


def read_inputs(config: PrepareConfig) -> Inputs:
    """Read the input; what is no sample, and repeated keys, are set aside with their reason.

    Raises:
        UserError: if there is no such input or it holds no sample.
    """
    base = base_folder(config.input) + "/"
    samples: dict[str, Sample] = {}
    rejected = []
    for item in open_source(config.input, config.format, **config.source_options):
        if isinstance(item, Rejected):
            where = item.where.removeprefix(base)
            rejected.append(
                _rejected(where, item.dataset or "unknown", "quarantined", item.reason, f"{where}: {item.detail}")
            )
            continue
        # Paths as they stand in the input: equal input makes equal shards wherever it lies.
        sample = dataclasses.replace(
            item,
            target=item.target.removeprefix(base),
            source=item.source and item.source.removeprefix(base),
            references=[path.removeprefix(base) for path in item.references],
        )
        if sample.key in samples:
            same = samples[sample.key] == sample
            outcome = ("duplicates", "repeated_line") if same else ("quarantined", "repeated_key")
            rejected.append(_rejected(sample.key, sample.dataset, *outcome, f"key {sample.key} again"))
            continue
        samples[sample.key] = sample
    if not samples:
        first = f"; first: {rejected[0]['message']}" if rejected else ""
        raise UserError(f"input={config.input}: no valid sample in it{first}")
    return Inputs(list(samples.values()), rejected)


def _rejected(key: str, dataset: str, outcome: str, reason: str, message: str) -> dict[str, Any]:
    return {
        "key": key,
        "dataset": dataset,
        "outcome": outcome,
        "stage": "read",
        "reason": reason,
        "message": message,
    }


def make_plan(inputs: Inputs, config: PrepareConfig) -> list[PlannedShard]:
    """Deal the samples into shards."""
    model = preset(config.model)
    items = (
        PlanItem(sample.key, sample.assigned_split(config.heldout_fraction), estimated_bytes(sample, config, model))
        for sample in inputs.samples
    )
    return plan_shards(items, config.shards.target_bytes, config.shards.max_samples, config.seed)


def recipe_parts(inputs: Inputs, config: PrepareConfig) -> dict[str, str]:
    """What the dataset's content depends on, part by part, so that a stale one can say why."""
    values = {k: v for k, v in flatten(config).items() if not k.startswith(NOT_IN_RECIPE)}
    model = with_folders(preset(config.model), config.codec_folder, config.mllm_folder)
    return {
        "input": inputs.digest,
        "config": digest(json.dumps(values, sort_keys=True)),
        "encoders": encoder_identity(model),
        "code": digest(PIXELS_VERSION, TENSORS_VERSION),
    }


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
        again: Names of shards to build again though nothing they depend on has changed.

    Raises:
        UserError: for bad input or configuration, or when more is lost than ``limits.max_loss`` allows.
    """
    config.check()
    started = time.perf_counter()
    storage = Storage(config.output)
    inputs = _without_removed(read_inputs(config), tombstones(storage))
    for folder in (SHARD_FOLDER, RECORD_FOLDER, CURATION_FOLDER, "work", ""):
        storage.remove_temporaries(folder)
    recipe = recipe_parts(inputs, config)
    stamps = _Stamps(base_folder(config.input))
    with contextlib.ExitStack() as stack:

        def connect() -> None:
            if session is not None and not stack_entered:
                stack.enter_context(session())
                stack_entered.append(True)

        stack_entered: list[bool] = []
        if config.curate:
            inputs = _curated(storage, inputs, config, stamps, connect, on_progress)
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
            return PrepareResult(before, 0, len(rows), time.perf_counter() - started, "up to date")
        reason = _why(before, recipe, todo, config)
        storage.write_bytes(CONFIG_FILE, to_yaml(config).encode())
        if todo or not shared_sha256:
            # Without its manifest the folder is no finished dataset while its shards change.
            storage.delete(MANIFEST_FILE)
            storage.delete(INDEX_FILE)
            _write_plan(storage, PLAN_FILE, plan, inputs, by_key)
            work = ([] if shared_sha256 else [shared_row]) + todo
            connect()
            for report in run_builders(config, work):
                _check_error(report, config)
                if on_progress is not None:
                    on_progress(report, len(work))
    _remove_unplanned(storage, plan)
    records = [read_record(storage, shard.name) for shard in plan]
    missing = [shard.name for shard, record in zip(plan, records, strict=True) if record is None]
    if missing:
        raise RuntimeError(f"{len(missing)} shards were not committed, first {missing[0]}")
    manifest = _finish(storage, config, inputs, recipe, records, _shared_sha256(storage, shared_row))
    return PrepareResult(manifest, len(todo), len(rows) - len(todo), time.perf_counter() - started, reason)


def _without_removed(inputs: Inputs, ids: set[str]) -> Inputs:
    """The inputs without samples that were asked to be removed."""
    if not ids:
        return inputs
    kept, rejected = [], list(inputs.rejected)
    for sample in inputs.samples:
        if ids & identities(sample.key, sample.group, media_paths(sample), sample.extra):
            rejected.append(_rejected(sample.key, sample.dataset, "removed", "tombstone", "removed by request"))
        else:
            kept.append(sample)
    return Inputs(kept, rejected)


def _curated(
    storage: Storage,
    inputs: Inputs,
    config: PrepareConfig,
    stamps: "_Stamps",
    connect: Callable[[], None],
    on_progress: Progress | None,
) -> Inputs:
    """The inputs without what curation drops, with what it found of the others."""
    chunks = plan_chunks(inputs.samples)
    by_key = {sample.key: sample for sample in inputs.samples}
    stale = stale_chunks(storage, chunk_rows(chunks, by_key, config), stamps.same)
    if stale:
        _write_plan(storage, CURATION_PLAN, chunks, inputs, by_key)
        connect()
        for report in run_judges(config, stale):
            if on_progress is not None:
                on_progress(report, len(stale))
    kept, outcomes = decide(list(judgements(storage, chunks)), config)
    judged = {sample.key: {"scores": j.scores, "reasons": list(j.reasons)} for sample, j in kept}
    return Inputs([sample for sample, _ in kept], [*inputs.rejected, *outcomes], judged)


def _check_error(report: dict[str, Any], config: PrepareConfig) -> None:
    if report["feature_error"] > config.features.max_error:
        raise UserError(
            f"features.dtype={config.features.dtype}: relative error {report['feature_error']:.4f} in a layer of shard "
            f"{report['shard']}, features.max_error={config.features.max_error:g}; use features.dtype=bf16"
        )


def run_builders(config: PrepareConfig, work: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Build shards on the Ray cluster; yields a report a shard."""
    yield from _map_on_actors(ShardBuilder, config, work, num_gpus=config.workers.gpus)


def _map_on_actors(
    worker: type, config: PrepareConfig, work: list[dict[str, Any]], num_gpus: float
) -> Iterator[dict[str, Any]]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    count = config.workers.count or _workers_that_fit(config, num_gpus, ray.cluster_resources())
    dataset = ray.data.from_items(work, override_num_blocks=len(work)).map(
        worker,
        fn_constructor_args=(config,),
        num_cpus=config.workers.cpus,
        num_gpus=num_gpus,
        # One row at a time: queueing several behind one worker would leave others idle at the end.
        compute=ray.data.ActorPoolStrategy(size=max(min(count, len(work)), 1), max_tasks_in_flight_per_actor=1),
    )
    yield from dataset.iter_rows()


def run_judges(config: PrepareConfig, work: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Judge chunks on the Ray cluster; yields a report a chunk."""
    yield from _map_on_actors(SampleJudge, config, work, num_gpus=0.0)


def _workers_that_fit(config: PrepareConfig, num_gpus: float, resources: dict[str, float]) -> int:
    count = int(resources.get("CPU", 1) / config.workers.cpus) if config.workers.cpus else 1
    if num_gpus:
        count = min(count, int(resources.get("GPU", 0) / num_gpus))
        if count < 1:
            raise UserError(f"workers.gpus={num_gpus:g}: the cluster has {resources.get('GPU', 0):g} GPUs")
    return max(count, 1)


class _Stamps:
    """Size and time of media files, each looked at once."""

    def __init__(self, base: str):
        self.base = base
        self._known: dict[str, list | None] = {}

    def same(self, media: dict[str, list | None]) -> bool:
        for path, stamp in media.items():
            if path not in self._known:
                self._known[path] = media_stamp(resolve(path, self.base))
            if self._known[path] != stamp:
                return False
        return True


def _is_current(storage: Storage, row: dict[str, Any], stamps: _Stamps) -> bool:
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
    changed = [part for part in recipe if before.recipe.get(part) != recipe[part]]
    if not changed:
        return f"rebuilt {len(todo)} shards: media files changed or a shard was damaged"
    details = list(changed)
    if "config" in changed:
        now = flatten(config)
        different = [
            f"{key} {before.config[key]!r} -> {now[key]!r}"
            for key in now
            if key in before.config and before.config[key] != now[key] and not key.startswith(NOT_IN_RECIPE)
        ]
        details[details.index("config")] = "config (" + ", ".join(different or ["new keys"]) + ")"
    return "rebuilt: changed " + ", ".join(details)


def _write_plan(
    storage: Storage, file: str, plan: list[PlannedShard], inputs: Inputs, by_key: dict[str, Sample]
) -> None:
    columns = [("shard", pa.string()), ("slot", pa.int32()), ("key", pa.string())]
    schema = pa.schema([*columns, ("sample", pa.string()), ("judged", pa.string())])
    with storage.staged(file) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for shard in plan:
            rows = [
                {
                    "shard": shard.name,
                    "slot": slot,
                    "key": key,
                    "sample": by_key[key].to_json(),
                    "judged": inputs.judged_json(key),
                }
                for slot, key in enumerate(shard.keys)
            ]
            # A row group a shard: a builder reads its own part only.
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


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
    counts = _counts(inputs, outcomes)
    losses = [outcome for outcome in outcomes if outcome["outcome"] != "written"]
    write_table(storage, QUARANTINE_FILE, _quarantine_table(losses, samples))
    _check_losses(losses, sum(count["inputs"] for count in counts.values()), config)
    return finish_dataset(
        storage,
        records,
        config={k: v for k, v in flatten(config).items() if not k.startswith(NOT_IN_RECIPE)},
        encoders=_encoders(records),
        features={
            "mode": config.features.mode,
            "dtype": config.features.dtype,
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


def _counts(inputs: Inputs, outcomes: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    empty = {"inputs": 0, "written": 0, "filtered": 0, "duplicates": 0, "quarantined": 0}
    counts: dict[str, dict[str, int]] = {}
    for entry in [*({"dataset": s.dataset} for s in inputs.samples), *inputs.rejected]:
        counts.setdefault(entry["dataset"], dict(empty))["inputs"] += 1
    for outcome in outcomes:
        count = counts[outcome["dataset"]]
        count[outcome["outcome"]] = count.get(outcome["outcome"], 0) + 1
    return counts


def _quarantine_table(losses: list[dict[str, Any]], samples: dict[str, Sample]) -> pa.Table:
    rows = [
        {
            **{name: loss[name] for name in ("key", "dataset", "outcome", "stage", "reason", "message")},
            "retriable": loss["reason"] in RETRIABLE,
            "sample": loss.get("sample") or (samples[loss["key"]].to_json() if loss["key"] in samples else None),
        }
        for loss in losses
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def _check_losses(losses: list[dict[str, Any]], num_inputs: int, config: PrepareConfig) -> None:
    by_reason = Counter(loss["reason"] for loss in losses if loss["outcome"] == "quarantined")
    for reason, count in by_reason.most_common():
        if count > config.limits.max_loss * num_inputs:
            example = next(loss["message"] for loss in losses if loss["reason"] == reason)
            raise UserError(
                f"{count} of {num_inputs} samples were lost to {reason} (limits.max_loss={config.limits.max_loss:g}); "
                f"first: {example.strip().splitlines()[-1][:200]}; all are in {config.output}/{QUARANTINE_FILE}"
            )
