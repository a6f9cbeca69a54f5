"""The worker of the prepare job: builds one planned shard after another.

Decode, encode and write happen in one place because a decoded clip is a hundred times larger than its file and the
features may be larger still: nothing of that passes through Ray's object store. A thread decodes ahead while the
encoders work.
"""

import contextlib
import dataclasses
import json
import logging
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
from loomvideo.pipelines.media.files import base_folder, media_stamp, resolve
from loomvideo.pipelines.prepare.chunks import read_planned
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.encode import LoadedSample, SampleEncoder, SampleLoader
from loomvideo.pipelines.prepare.features import combined_error
from loomvideo.pipelines.prepare.geometry import Filtered
from loomvideo.pipelines.sources.samples import Sample, parse_sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.manifest import shard_path
from loomvideo.platform.shards.reader import read_placed
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import read_record, write_shard, write_shared

logger = logging.getLogger(__name__)

PLAN_FILE = "work/plan.parquet"
SHARED_TASK = "shared"
SHARED_RECORD = "work/shared.json"


@dataclasses.dataclass(frozen=True)
class PlannedSample:
    """A sample, its slot in the shard, and what curation found."""

    slot: int
    sample: Sample
    judged: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a planned sample is not written."""

    outcome: str
    stage: str
    reason: str
    message: str


class ShardBuilder:
    """Builds shards of a plan; one a Ray actor.

    Args:
        config: Of the job.
    """

    def __init__(self, config: PrepareConfig):
        self.config = config
        self.storage = Storage(config.output)
        self.base = base_folder(config.input)
        device = "cuda" if config.workers.gpus > 0 else "cpu"
        if device == "cpu":
            # Sums over threads depend on their number: one thread makes the same bytes on every machine.
            torch.set_num_threads(1)
        model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
        self.encoder = SampleEncoder(model, config.features, device)
        self.loader = SampleLoader(config, self.base, self.encoder.fingerprints)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Build the shard that a row names, or the dataset-wide tensors.

        Returns:
            What happened, for progress: the shard's name, counts, sizes and the seconds spent waiting for decoded
            samples (``wait_s``) and encoding (``encode_s``), and how many members were made and kept (``members``).
        """
        started = time.perf_counter()
        if row["shard"] == SHARED_TASK:
            sha256 = write_shared(self.storage, self.encoder.null_features())
            self.storage.write_bytes(
                "work/shared.json", json.dumps({"sha256": sha256, "recipe": row["recipe"]}).encode()
            )
            return self._report(SHARED_TASK, 0, 0, 0, 0.0, 0.0, started)
        self._wait_s = self._encode_s = 0.0
        self._members: Counter[str] = Counter()
        facts: dict[str, Any] = {"encoders": self.encoder.fingerprints}
        planned = read_plan(self.storage, row["shard"])
        outcomes: list[dict[str, Any]] = []
        record = write_shard(
            self.storage,
            row["shard"],
            row["split"],
            self._samples(row, planned, outcomes, facts),
            row["recipe"],
            outcomes,
            facts,
        )
        lost = len(planned) - len(record.rows)
        report = self._report(
            row["shard"], len(record.rows), lost, record.num_bytes, self._wait_s, self._encode_s, started
        )
        error = max(record.facts["feature_error"]["layers"], default=0.0)
        return report | {"feature_error": error, "members": dict(self._members)}

    def _report(
        self, shard: str, written: int, lost: int, num_bytes: int, wait_s: float, encode_s: float, started: float
    ) -> dict[str, Any]:
        return {
            "shard": shard,
            "written": written,
            "lost": lost,
            "num_bytes": num_bytes,
            "wait_s": wait_s,
            "encode_s": encode_s,
            "feature_error": 0.0,
            "wall_s": time.perf_counter() - started,
        }

    def _samples(
        self,
        row: dict[str, Any],
        planned: list[PlannedSample],
        outcomes: list[dict[str, Any]],
        facts: dict[str, Any],
    ) -> Iterator[tuple[int, ShardSample]]:
        previous = self._previous(row["shard"])
        errors = []
        for plan, loaded in zip(planned, self._loaded(planned, previous), strict=True):
            sample = plan.sample
            outcome = {"key": sample.key, "dataset": sample.dataset, "media": self._stamps(sample)}
            if isinstance(loaded, LoadedSample):
                began = time.perf_counter()
                kept = loaded.kept
                loaded = self._encoded(loaded, row["split"], plan.judged)
                self._encode_s += time.perf_counter() - began
            if isinstance(loaded, Failure):
                outcomes.append({**outcome, **dataclasses.asdict(loaded)})
                continue
            if loaded.key != sample.key:
                raise RuntimeError(f"encoded {loaded.key} where {sample.key} was planned")
            self._members.update(f"{'kept' if member in kept else 'made'}.{member}" for member in loaded.tensors)
            errors.append(loaded.metadata.get("feature_error"))
            outcomes.append({**outcome, "outcome": "written"})
            yield plan.slot, loaded
        facts["feature_error"] = combined_error(errors)

    def _encoded(self, loaded: LoadedSample, split: str, judged: dict[str, Any]) -> ShardSample | Failure:
        try:
            return self.encoder.encode(loaded, split, judged)
        except UserError as error:
            return Failure("quarantined", "encode", "invalid_sample", str(error))
        except Exception:
            # One sample must not end the run; a fault of all samples ends it through limits.max_loss.
            return Failure("quarantined", "encode", "encode_error", traceback.format_exc(limit=-4))

    def _loaded(
        self, planned: list[PlannedSample], previous: dict[str, dict[str, Any]]
    ) -> Iterator[LoadedSample | Failure]:
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
                    put(self._load(plan.sample, previous.get(plan.sample.key)))
            except BaseException as error:
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

    def _load(self, sample: Sample, place: dict[str, Any] | None) -> LoadedSample | Failure:
        try:
            return self.loader.load(sample, self._before(place))
        except DecodeError as error:
            return Failure("quarantined", "decode", error.reason, str(error))
        except Filtered as decision:
            return Failure("filtered", "clip", decision.reason, str(decision))
        except UserError as error:
            return Failure("quarantined", "decode", "invalid_sample", str(error))

    def _before(self, place: dict[str, Any] | None) -> ShardSample | None:
        if place is None:
            return None
        try:
            return read_placed(self.storage, shard_path(place["shard"]), place, raw=True)
        except UserError as error:
            logger.warning("%s; %s is encoded again", error, place["key"])
            return None

    def _previous(self, shard: str) -> dict[str, dict[str, Any]]:
        """Index rows of the shard as it lies there, by key."""
        record = read_record(self.storage, shard)
        return {} if record is None else {row["key"]: row for row in record.rows}

    def _stamps(self, sample: Sample) -> dict[str, list | None]:
        paths = [path for path in (sample.target, sample.source, *sample.references) if path]
        return {path: media_stamp(resolve(path, self.base)) for path in paths}


def read_plan(storage: Storage, shard: str) -> list[PlannedSample]:
    """The samples of one planned shard."""
    return [
        PlannedSample(row["slot"], parse_sample(row["sample"], f"{PLAN_FILE}:{row['key']}"), json.loads(row["judged"]))
        for row in read_planned(storage, PLAN_FILE, shard)
    ]
