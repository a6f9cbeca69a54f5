"""The worker of the prepare job: builds one planned shard after another.

Decode, encode and write happen in one place because a decoded clip is a hundred times larger than its file and the
features may be larger still: nothing of that passes through Ray's object store. A thread decodes ahead while the
encoders work.
"""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from loomvideo.model.sizes import model_size, with_folders
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.attempts import Attempt, DeviceFaultError, is_device_fault, worker_place
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.encode import LoadedSample, SampleEncoder, SampleLoader
from loomvideo.pipelines.prepare.features import combined_error
from loomvideo.pipelines.prepare.geometry import Filtered
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.pipelines.prepare.units import UnitReport, WorkRow, read_planned
from loomvideo.pipelines.sources.samples import Sample, stored_sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.devices import device_for
from loomvideo.platform.shards.manifest import shard_path
from loomvideo.platform.shards.reader import read_placed
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import stored_record, write_shard, write_shared

logger = logging.getLogger(__name__)

SHARED_TASK = "shared"
SHARED_RECORD = "work/shared.json"


@dataclasses.dataclass(frozen=True)
class PlannedSample:
    """A sample of the plan.

    Attributes:
        slot: Its place in the shard.
        sample: What to make.
        assessed: What curation found.
        place: Index row of its earlier encoding, None without one.
    """

    slot: int
    sample: Sample
    assessed: dict[str, Any]
    place: dict[str, Any] | None


class ShardBuilder:
    """Builds shards of a plan; one a Ray actor.

    Args:
        config: The configuration of the job.
    """

    def __init__(self, config: PrepareConfig):
        self.config = config
        self.storage = Storage(config.output)
        self.base = base_folder(config.input)
        device = device_for(config.workers.gpus, "workers.gpus").type
        if device == "cpu":
            # Sums over threads depend on their number: one thread makes the same bytes on every machine.
            torch.set_num_threads(1)
        model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
        self.encoder = SampleEncoder(model, config.features, device)
        self._faulty = False
        self.loader = SampleLoader(config, self.base, self.encoder.computed_by)

    def close(self) -> None:
        """End the decoder process."""
        self.loader.close()

    def __call__(self, row: WorkRow) -> UnitReport:
        """Build the shard that a row names, or the dataset-wide tensors.

        Returns:
            What happened, for progress.
        """
        if self._faulty:
            # A context that failed once computes nothing that counts: Ray starts another process for this row.
            os._exit(1)
        started = time.perf_counter()
        try:
            return self._build(row, started)
        except DeviceFaultError as error:
            self._faulty = True
            report = self._report(row["unit"], 0, 0, 0, 0.0, 0.0, started)
            return {**report, "fault": str(error)}

    def _build(self, row: WorkRow, started: float) -> UnitReport:
        if row["unit"] == SHARED_TASK:
            sha256 = write_shared(self.storage, self.encoder.null_features())
            self.storage.write_bytes(SHARED_RECORD, json.dumps({"sha256": sha256, "recipe": row["recipe"]}).encode())
            return self._report(SHARED_TASK, 0, 0, 0, 0.0, 0.0, started)
        self._wait_s = self._encode_s = 0.0
        self._members: Counter[str] = Counter()
        facts: dict[str, Any] = {"encoders": self.encoder.fingerprints, "device": self.encoder.device_name}
        attempt = Attempt(self.storage, row["unit"], row["run"], self.config.limits.attempts)
        planned = self._planned(row)
        losses: list[dict[str, Any]] = []
        record = write_shard(
            self.storage,
            row["unit"],
            row["split"],
            self._samples(row, planned, losses, facts, attempt),
            row["recipe"],
            losses,
            facts,
            row["before"],
        )
        attempt.end()
        lost = len(planned) - len(record.index)
        report = self._report(
            row["unit"], len(record.index), lost, record.num_bytes, self._wait_s, self._encode_s, started
        )
        error = max(record.facts["feature_error"]["layers"], default=0.0)
        reasons = Counter(loss["reason"] for loss in losses if loss["outcome"] == "quarantined")
        return {**report, "feature_error": error, "members": {**self._members}, "lost_by_reason": {**reasons}}

    def _report(
        self, unit: str, written: int, lost: int, num_bytes: int, wait_s: float, encode_s: float, started: float
    ) -> UnitReport:
        return {
            "stage": "encode",
            "unit": unit,
            "written": written,
            "lost": lost,
            "num_bytes": num_bytes,
            "wait_s": wait_s,
            "encode_s": encode_s,
            "feature_error": 0.0,
            "members": {},
            "lost_by_reason": {},
            "fault": "",
            "where": worker_place(),
            "wall_s": time.perf_counter() - started,
        }

    def _samples(
        self,
        row: WorkRow,
        planned: list[PlannedSample],
        losses: list[dict[str, Any]],
        facts: dict[str, Any],
        attempt: Attempt,
    ) -> Iterator[tuple[int, ShardSample]]:
        errors = []
        for plan, loaded in zip(planned, self._loaded(planned), strict=True):
            kept = loaded.kept if isinstance(loaded, LoadedSample) else ()
            if isinstance(loaded, LoadedSample) and plan.sample.key in attempt.crashed:
                message = f"its process died on {attempt.crashed[plan.sample.key]}"
                loaded = _lost(plan.sample, "quarantined", "encode", "repeated_crash", message)
            elif isinstance(loaded, LoadedSample):
                attempt.begin(plan.sample.key)
                began = time.perf_counter()
                loaded = self._encoded(loaded, row["split"], plan.assessed)
                self._encode_s += time.perf_counter() - began
            if isinstance(loaded, Outcome):
                losses.append(loaded.to_dict())
                continue
            if loaded.key != plan.sample.key:
                raise RuntimeError(f"encoded {loaded.key} where {plan.sample.key} was planned")
            self._members.update(f"{'kept' if member in kept else 'made'}.{member}" for member in loaded.tensors)
            errors.append(loaded.metadata.get("feature_error"))
            yield plan.slot, loaded
        facts["feature_error"] = combined_error(errors)

    def _encoded(self, loaded: LoadedSample, split: str, assessed: dict[str, Any]) -> ShardSample | Outcome:
        try:
            return self.encoder.encode(loaded, split, assessed)
        except UserError as error:
            return _lost(loaded.sample, "quarantined", "encode", "invalid_sample", str(error))
        except Exception as error:
            if is_device_fault(error):
                raise DeviceFaultError(traceback.format_exc(limit=-4)) from error
            # Of models and libraries. One sample must not end the run; a fault of all ends it through limits.max_loss.
            trace = traceback.format_exc(limit=-4)
            return _lost(loaded.sample, "quarantined", "encode", "encode_error", trace)

    def _loaded(self, planned: list[PlannedSample]) -> Iterator[LoadedSample | Outcome]:
        ready: queue.Queue = queue.Queue(self.config.workers.prefetch)
        stopped = threading.Event()

        def put(item: object) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.2)
                    return

        def work() -> None:
            try:
                for plan in planned:
                    if stopped.is_set():
                        return
                    put(self._load(plan))
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            for _ in planned:
                began = time.perf_counter()
                item = ready.get()
                self._wait_s += time.perf_counter() - began
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _load(self, plan: PlannedSample) -> LoadedSample | Outcome:
        sample = plan.sample
        try:
            return self.loader.load(sample, self._before(plan.place))
        except DecodeError as error:
            return _lost(sample, "quarantined", "decode", error.reason, str(error))
        except Filtered as decision:
            return _lost(sample, "filtered", "clip", decision.reason, str(decision))
        except UserError as error:
            return _lost(sample, "quarantined", "decode", "invalid_sample", str(error))

    def _before(self, place: dict[str, Any] | None) -> ShardSample | None:
        if place is None:
            return None
        try:
            return read_placed(self.storage, shard_path(place["shard"]), place, raw=True)
        except (UserError, ValueError, KeyError) as error:
            # A shard that another worker is writing anew holds other bytes there.
            logger.warning("%s; %s is encoded again", error, place["key"])
            return None

    def _planned(self, row: WorkRow) -> list[PlannedSample]:
        """The unit's samples, with where they lie now: in the unit's own shard, or in those they are moved from."""
        files = json.loads(row["moved"]) | ({row["unit"]: row["before"][0]} if row["before"] else {})
        records = {unit: stored_record(self.storage, file) for unit, file in files.items()}
        places = {(unit, place["key"]): place for unit, record in records.items() for place in record.rows}
        return [
            PlannedSample(
                entry["slot"],
                stored_sample(entry["sample"]),
                json.loads(entry["assessed"]),
                places.get((entry["was"] or row["unit"], entry["key"])),
            )
            for entry in read_planned(self.storage, row)
        ]


def _lost(sample: Sample, outcome: str, stage: str, reason: str, message: str) -> Outcome:
    # The plan has the sample: its record needs no copy.
    return Outcome(sample.key, sample.dataset, outcome, stage, reason, message, where=worker_place())
