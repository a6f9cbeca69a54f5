"""The prepare job: raw samples to shards.

Every stage of :mod:`~loomvideo.pipelines.prepare.stages` plans first, from the input, the configuration and the seed
alone. Workers in a Ray Data actor pool then do what has no committed result yet, and the dataset is closed when every
input sample is accounted for. So a second run has nothing to do, an interrupted one resumes on any number of CPUs, and
both end in the same bytes.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from loomvideo.model.sizes import model_size
from loomvideo.pipelines.prepare.accounts import Accounts, check_losses, write_quarantine
from loomvideo.pipelines.prepare.ahead import BuildingAhead, ReadyShards, may_build_beside
from loomvideo.pipelines.prepare.attempts import ATTEMPT_FOLDER, Watch
from loomvideo.pipelines.prepare.builder import SHARED_RECORD, SHARED_TASK
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.features import combined_error
from loomvideo.pipelines.prepare.identities import Identified
from loomvideo.pipelines.prepare.inputs import Inputs, read_inputs
from loomvideo.pipelines.prepare.recipe import manifest_config, recipe_parts, why_stale
from loomvideo.pipelines.prepare.stages import ENCODE, STAGES, Stage, run_stage, stages_of
from loomvideo.pipelines.prepare.unit_rows import UnitReport, WorkRow
from loomvideo.pipelines.prepare.units import (
    PLAN_FOLDER,
    UnitPlan,
    commit_plan,
    committed_files,
    planned_samples,
    remove_unplanned,
)
from loomvideo.platform.config import to_yaml
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.commits import read_all
from loomvideo.platform.shards.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    SHARD_FOLDER,
    SHARED_FILE,
    Manifest,
    shard_path,
)
from loomvideo.platform.shards.plan import digest
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import StoredRecord, finish_dataset

logger = logging.getLogger(__name__)

CONFIG_FILE = "work/config.yaml"
UP_TO_DATE = "up to date"
_WORK = ("assessed", "decoded", "captioned", "judged", "asked")

Progress = Callable[[UnitReport, int], None]
OnDone = Callable[[str], None]


@dataclasses.dataclass
class PrepareResult:
    """What a prepare job did.

    Attributes:
        manifest: The manifest of the finished dataset.
        built_shards: Shards that were visited.
        reused_shards: Shards that were left as they lay.
        seconds: The seconds of the whole job.
        reason: Why it was built, or ``up to date``.
        work: ``made.{member}`` and ``kept.{member}`` of the visited shards, ``assessed``, ``decoded`` (of them, those
            whose files were decoded), ``captioned``, ``judged``, ``asked`` (of both, those that a model answered).
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


def prepare(
    config: PrepareConfig,
    session: Callable[[], Any] | None = None,
    on_progress: Progress | None = None,
    again: Collection[str] = (),
    redeal: bool = False,
) -> PrepareResult:
    """Bring the output folder up to date with input and configuration.

    Args:
        config: The job.
        session: Makes a context in which Ray is up; entered only when there is work. By default the caller's session.
        on_progress: Called with a worker's report and the number of its stage's units so far.
        again: Names of units (shards, and chunks of the stages before) to do again though nothing has changed.
        redeal: Deal all samples into shards anew, as a first prepare would; what is encoded is copied.

    Raises:
        UserError: for bad input or configuration, or when more is lost than ``limits.max_loss`` allows.
    """
    config.check()
    with contextlib.ExitStack() as stack:
        return _Run(config, session, on_progress, again, redeal, stack).run()


class _Run:
    """One call of :func:`prepare`."""

    def __init__(
        self,
        config: PrepareConfig,
        session: Callable[[], Any] | None,
        on_progress: Progress | None,
        again: Collection[str],
        redeal: bool,
        stack: contextlib.ExitStack,
    ):
        self.config, self.again, self.redeal = config, again, redeal
        self.storage = Storage(config.output)
        self.work: Counter[str] = Counter()
        self._session, self._on_progress, self._stack = session, on_progress, stack
        self._started = time.perf_counter()
        self._run = os.urandom(8).hex()
        self._before: Manifest | None = None
        self._ahead: set[str] = set()
        self._num_ahead = 0
        self._counting = threading.Lock()

    def run(self) -> PrepareResult:
        storage, config = self.storage, self.config
        for folder in (SHARD_FOLDER, PLAN_FOLDER, ATTEMPT_FOLDER, "work", "", *(stage.folder for stage in STAGES)):
            storage.remove_temporaries(folder)
        inputs = read_inputs(config, storage, keep_table=True)
        recipe = recipe_parts(inputs.digest, config)
        self._before = stored_manifest(storage)
        stages = stages_of(config)
        for stage in stages:
            plan = stage.plan(storage, inputs, config, self.again, self.redeal)
            if stage is ENCODE:
                return self._encode(plan, inputs, recipe)
            if plan.stale:
                work, num_inputs = commit_plan(storage, plan, self._run), len(plan.table) + len(inputs.losses)
                if may_build_beside(stage, stages, config) and not (self.again or self.redeal):
                    ready = ReadyShards(storage, stage, plan, inputs, config)
                    with BuildingAhead(ready, functools.partial(self._build_ahead, num_inputs), self._run) as building:
                        self._work_through(stage, plan, work, num_inputs, building.done)
                    self._ahead = building.built
                else:
                    self._work_through(stage, plan, work, num_inputs)
            inputs = stage.after(read_all(storage, stage.folder, committed_files(storage, plan)), inputs, config)
        raise AssertionError("encoding is every configuration's last stage")

    def _build_ahead(self, num_inputs: int, work: list[WorkRow], on_done: OnDone) -> None:
        """Build shards while the stage before them works; what a device fails at is left for their own stage."""
        self._unfinish()
        self._num_ahead += len(work)
        self._pass(ENCODE, work, self._num_ahead, Watch(self.config.limits, num_inputs), on_done)

    def _unfinish(self) -> None:
        # Without its manifest the folder is no finished dataset while its shards change.
        self.storage.delete(MANIFEST_FILE)
        self.storage.delete(INDEX_FILE)

    def _work_through(
        self, stage: Stage, plan: UnitPlan, work: list[WorkRow], num_inputs: int, on_done: OnDone = lambda unit: None
    ) -> None:
        """Do the rows of a committed plan, then remove what it does not have."""
        if self._session is not None:
            self._stack.enter_context(self._session())
            self._session = None
        watch, left = Watch(self.config.limits, num_inputs), work
        total = len(work) + (self._num_ahead if stage is ENCODE else 0)
        failed: dict[str, tuple[str, str]] = {}
        for _ in range(self.config.limits.attempts):
            failed = self._pass(stage, left, total, watch, on_done)
            left = [row for row in left if row["unit"] in failed]
            if not left:
                break
        else:
            unit, (where, fault) = next(iter(failed.items()))
            raise UserError(
                f"{unit}: its GPU failed in each of limits.attempts={self.config.limits.attempts} attempts, last on "
                f"{where}: {fault.strip().splitlines()[-1][:200]}; finished shards are kept"
            )
        remove_unplanned(self.storage, plan)

    def _pass(
        self, stage: Stage, work: list[WorkRow], total: int, watch: Watch, on_done: OnDone
    ) -> dict[str, tuple[str, str]]:
        """Run rows once; returns units whose device failed, with where and how."""
        failed = {}
        for report in run_stage(stage, self.config, work):
            watch.see(report)
            if report.get("fault"):
                failed[report["unit"]] = (report["where"], report["fault"])
                continue
            self._check_error(report)
            made = {name: count for name, count in report.get("members", {}).items() if count}
            with self._counting:
                self.work.update({name: report[name] for name in _WORK if name in report} | made)
                if self._on_progress is not None:
                    self._on_progress(report, total)
            on_done(report["unit"])
        return failed

    def _encode(self, plan: UnitPlan, inputs: Inputs, recipe: dict[str, str]) -> PrepareResult:
        storage = self.storage
        shared_recipe = digest(recipe["config"], recipe["encoders"], recipe["code"])
        shared = [] if _shared_sha256(storage, shared_recipe) else [_shared_row(shared_recipe, self._run)]
        before = self._before
        if not (plan.stale or shared or self._ahead) and before is not None and before.recipe == recipe:
            return PrepareResult(before, 0, len(plan.units), self._seconds, UP_TO_DATE, self.work)
        reason = why_stale(before, recipe, len(plan.stale) + len(self._ahead), self.config)
        if self.redeal and before is not None and before.recipe == recipe:
            reason = "dealt anew"
        storage.write_bytes(CONFIG_FILE, to_yaml(self.config).encode())
        if plan.stale or shared:
            self._unfinish()
        # Even where nothing is stale: samples that left may have left no shard that stays.
        work = [*shared, *commit_plan(storage, plan, self._run)]
        accounts = Accounts(inputs)
        facts = {"digest": inputs.digest, "samples": len(inputs), "rejected": len(inputs.losses)}
        # What workers and accounts need of the samples from here on lies in the plan's files.
        plan.table = inputs.table = plan.table.schema.empty_table()
        plan.was = None
        if work:
            self._work_through(ENCODE, plan, work, accounts.num_inputs)
        else:
            remove_unplanned(storage, plan)
        files = committed_files(storage, plan)
        shared_sha256 = _shared_sha256(storage, shared_recipe)
        manifest = _finish(storage, self.config, accounts, facts, recipe, files, shared_sha256)
        _remove_other_shards(storage, plan)
        num_built = len({plan.units[number].name for number in plan.stale} | self._ahead)
        return PrepareResult(manifest, num_built, len(plan.units) - num_built, self._seconds, reason, self.work)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _check_error(self, report: UnitReport) -> None:
        features = self.config.features
        if report.get("feature_error", 0.0) > features.max_error:
            key, fix = f"dtype={features.dtype}", "use features.dtype=bf16"
            if features.layers:
                key, fix = f"layers={features.layers}", "list more layers, or allow the loss"
            raise UserError(
                f"features.{key}: relative error {report['feature_error']:.4f} in a layer of shard {report['unit']}, "
                f"features.max_error={features.max_error:g}; {fix}"
            )


def _shared_row(recipe: str, run: str) -> WorkRow:
    return WorkRow(
        unit=SHARED_TASK, split="", recipe=recipe, part="", group=0, before=[], moved="{}", run=run
    )  # fmt: skip


def _shared_sha256(storage: Storage, recipe: str) -> str:
    if not storage.exists(SHARED_RECORD) or not storage.exists(SHARED_FILE):
        return ""
    known = json.loads(storage.read_bytes(SHARED_RECORD))
    return known["sha256"] if known["recipe"] == recipe else ""


def stored_manifest(storage: Storage) -> Manifest | None:
    """The manifest of a finished dataset; None without one, or with one of another format version."""
    if not storage.exists(MANIFEST_FILE):
        return None
    try:
        return Manifest.from_json(storage.read_bytes(MANIFEST_FILE), f"{storage.url}/{MANIFEST_FILE}")
    except UserError as error:
        logger.warning("%s", error)
        return None


def _remove_other_shards(storage: Storage, plan: UnitPlan) -> None:
    planned = {shard_path(unit.name) for unit in plan.units}
    for name in storage.names(SHARD_FOLDER):
        if f"{SHARD_FOLDER}/{name}" not in planned:
            storage.delete(f"{SHARD_FOLDER}/{name}")


def _finish(
    storage: Storage,
    config: PrepareConfig,
    accounts: Accounts,
    inputs: dict[str, Any],
    recipe: dict[str, str],
    files: list[str],
    shared: str,
) -> Manifest:
    """Close the accounts, then write index and manifest from the records, which are held as they are stored."""
    encoders: set[str] = set()
    devices: set[str] = set()
    errors: list[dict[str, Any] | None] = []
    records = []
    for file, data in zip(files, read_all(storage, ENCODE.folder, files), strict=True):
        record = StoredRecord(data, f"{storage.url}/{ENCODE.folder}/{file}")
        records.append(record)
        accounts.add(record)
        facts = record.facts["facts"]
        encoders.add(json.dumps(facts["encoders"], sort_keys=True))
        devices.add(facts.get("device", "cpu"))
        errors.append(facts.get("feature_error"))
    write_quarantine(storage, accounts.losses, lambda keys: planned_samples(storage, ENCODE.name, keys))
    check_losses(accounts, config)
    if len(encoders) > 1:
        raise RuntimeError(f"shards of one dataset come from different encoders: {' and '.join(sorted(encoders))}")
    if len(devices) > 1:
        logger.warning(
            "shards were encoded on different devices, whose bytes may differ: %s", ", ".join(sorted(devices))
        )
    return finish_dataset(
        storage,
        records,
        Identified(storage),
        config=manifest_config(config),
        encoders=json.loads(encoders.pop()) if encoders else {},
        devices=sorted(devices),
        features={
            "mode": config.features.mode,
            "dtype": config.features.dtype,
            "layers": config.features.layers,
            "num_layers": model_size(config.model).dit.num_layers,
            "error": combined_error(errors),
        },
        counts=accounts.counts,
        inputs=inputs,
        recipe=recipe,
        shared_sha256=shared,
    )
