"""The worker of the prepare job: builds planned shards.

Three things go on at a time. Decoders, in this process and in actors on any node, load samples ahead, in order, across
the shards that the builder has; one thread encodes, one shard after another; and each shard is written, and uploaded,
by a thread of its own, beside the encoding of the next. Shards and slots are the plan's, so neither the number of
builders nor that of decoders changes a byte.
"""

import contextlib
import itertools
import json
import logging
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch

from loomvideo.model.sizes import model_size, with_folders
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.attempts import Attempt, DeviceFaultError, is_device_fault, worker_place
from loomvideo.pipelines.prepare.background import one_ahead, working_ahead
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.encode import ReadyBatch, SampleEncoder
from loomvideo.pipelines.prepare.features import combined_error
from loomvideo.pipelines.prepare.load import LoadedSample, SampleLoader
from loomvideo.pipelines.prepare.load_ahead import LoadAhead
from loomvideo.pipelines.prepare.loading import (
    DecoderHandle,
    Loaded,
    Loader,
    PlannedSample,
    load_planned,
    lost,
    pixel_bytes,
)
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.pipelines.prepare.turns import EncoderTurn, Turns
from loomvideo.pipelines.prepare.unit_rows import UnitReport, WorkRow
from loomvideo.pipelines.prepare.units import read_planned
from loomvideo.pipelines.sources.samples import stored_sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.devices import device_for
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import stored_record, write_shard, write_shared

logger = logging.getLogger(__name__)

SHARED_TASK = "shared"
SHARED_RECORD = "work/shared.json"
# Encoded samples that wait for the writer: a large one is written while the next is encoded.
_ENCODED_AHEAD = 1
# A sample of the plan, what it was loaded as, and the seconds that took.
Item = tuple[PlannedSample, Loaded, float]


class ShardBuilder:
    """Builds shards of a plan; one a Ray actor, which may be given two at a time.

    Args:
        config: The configuration of the job.
        encoder: What encodes; by default the configuration's encoders, on the device that it asks for.
        loader: Makes what decodes, here and elsewhere, of configuration, base folder and the encoders' fingerprints.
    """

    def __init__(
        self,
        config: PrepareConfig,
        encoder: SampleEncoder | None = None,
        loader: Callable[..., Loader] = SampleLoader,
    ):
        self.config = config
        self.storage = Storage(config.output)
        if encoder is None:
            device = device_for(config.workers.gpus, "workers.gpus").type
            if device == "cpu":
                # Sums over threads depend on their number: one thread makes the same bytes on every machine.
                torch.set_num_threads(1)
            model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
            encoder = SampleEncoder(model, config.features, device, config.encoders)
        self.encoder = encoder
        self.loader = loader(config, base_folder(config.input), encoder.computed_by)
        self.ahead = LoadAhead(
            lambda plan: load_planned(self.loader, self.storage, plan),
            config.workers.ready_bytes,
            lambda plan: pixel_bytes(plan.sample, config),
            lambda: DecoderHandle(config, encoder.computed_by, loader),
            config.workers.decoders,
        )
        self.turns = Turns()
        self._fault = ""

    def close(self) -> None:
        """End all decoders."""
        self.ahead.close()
        self.loader.close()

    def __call__(self, row: WorkRow) -> UnitReport:
        """Build the shard that a row names, or the dataset-wide tensors; several threads may call it.

        Returns:
            What happened, for progress.
        """
        if self._fault:
            # A context that failed once computes nothing that counts: Ray starts another process for this row. What is
            # still written was encoded before.
            self.turns.wait_until_over()
            os._exit(1)
        started = time.perf_counter()
        planned = [] if row["unit"] == SHARED_TASK else self._planned(row)
        with self.turns.take(lambda: self.ahead.add(planned)) as turn:
            try:
                found = self._build(row, planned, turn)
            except DeviceFaultError as error:
                found = {"fault": str(error), "handed_back": bool(self._fault)}
                self._fault = self._fault or str(error)
            finally:
                turn.queued.drop()
        return cast(UnitReport, self._report(row["unit"], turn, started) | found)

    def _build(self, row: WorkRow, planned: list[PlannedSample], turn: EncoderTurn) -> dict[str, Any]:
        if row["unit"] == SHARED_TASK:
            turn.begin()
            self._check_device()
            sha256 = write_shared(self.storage, self.encoder.null_features())
            self.storage.write_bytes(SHARED_RECORD, json.dumps({"sha256": sha256, "recipe": row["recipe"]}).encode())
            return {}
        members: Counter[str] = Counter()
        losses: list[dict[str, Any]] = []
        facts: dict[str, Any] = {"encoders": self.encoder.fingerprints, "device": self.encoder.device_name}
        attempt = Attempt(self.storage, row["unit"], row["run"], self.config.limits.attempts)
        encoding = self._encode(row["split"], turn, members, losses, facts, attempt)
        with working_ahead(encoding, _ENCODED_AHEAD) as samples:
            record = write_shard(
                self.storage, row["unit"], row["split"], samples, row["recipe"], losses, facts, row["before"]
            )
        attempt.end()
        reasons = Counter(loss["reason"] for loss in losses if loss["outcome"] == "quarantined")
        return {
            "written": len(record.index),
            "lost": len(planned) - len(record.index),
            "num_bytes": record.num_bytes,
            "feature_error": max(record.facts["feature_error"]["layers"], default=0.0),
            "members": {**members},
            "lost_by_reason": {**reasons},
        }

    def _report(self, unit: str, turn: EncoderTurn, started: float) -> UnitReport:
        return {
            "stage": "encode",
            "unit": unit,
            "written": 0,
            "lost": 0,
            "num_bytes": 0,
            "wait_s": turn.wait_s,
            "encode_s": turn.encode_s,
            "hold_s": turn.hold_s,
            "load_s": turn.load_s,
            "decoders": self.ahead.num_decoders,
            "feature_error": 0.0,
            "members": {},
            "lost_by_reason": {},
            "fault": "",
            "handed_back": False,
            "where": worker_place(),
            "wall_s": time.perf_counter() - started,
        }

    def _encode(
        self,
        split: str,
        turn: EncoderTurn,
        members: Counter[str],
        losses: list[dict[str, Any]],
        facts: dict[str, Any],
        attempt: Attempt,
    ) -> Iterator[tuple[int, ShardSample]]:
        """The shard's samples with their slots, when it is its turn."""
        errors = []
        with contextlib.ExitStack() as stack:
            stack.callback(turn.end)
            turn.begin()
            self._check_device()
            marked = time.perf_counter()
            batches = _batches(turn.queued, self.config.features.batch)
            ahead = stack.enter_context(contextlib.closing(one_ahead(self._with_ready(batches, attempt))))
            for batch, ready in ahead:
                began = time.perf_counter()
                turn.wait_s += began - marked
                found = self._encoded(batch, ready, split, attempt)
                marked = time.perf_counter()
                turn.encode_s += marked - began
                load_s = sum(load_s for _, _, load_s in batch)
                turn.load_s += load_s
                self.ahead.encoded(load_s / len(batch), (marked - began) / len(batch))
                for (plan, loaded, _), encoded in zip(batch, found, strict=True):
                    if isinstance(encoded, Outcome):
                        losses.append(encoded.to_dict())
                        continue
                    kept = () if isinstance(loaded, Outcome) else loaded.kept
                    if encoded.key != plan.sample.key:
                        raise RuntimeError(f"encoded {encoded.key} where {plan.sample.key} was planned")
                    members.update(f"{'kept' if name in kept else 'made'}.{name}" for name in encoded.tensors)
                    errors.append(encoded.metadata.get("feature_error"))
                    yield plan.slot, encoded
                written = time.perf_counter()
                turn.hold_s += written - marked
                marked = written
            facts["feature_error"] = combined_error(errors)
            attempt.rest()

    def _check_device(self) -> None:
        if self._fault:
            raise DeviceFaultError(self._fault)

    def _with_ready(
        self, batches: Iterator[list[Item]], attempt: Attempt
    ) -> Iterator[tuple[list[Item], ReadyBatch | None]]:
        """Each batch with what a host does for it, done while the one before it is encoded.

        Where workers have died on the shard, nothing is done ahead: a death must be that of the sample that is noted.
        """
        for batch in batches:
            loaded = [loaded for _, loaded, _ in batch if not isinstance(loaded, Outcome)]
            ready = None
            if loaded and not attempt.is_repeated:
                try:
                    ready = self.encoder.ready(loaded)
                except Exception as error:  # done again in its turn, where it is told whose error it is
                    logger.warning("%s could not be made ready ahead: %s", loaded[0].sample.key, error)
            yield batch, ready

    def _encoded(
        self, batch: Sequence[Item], ready: ReadyBatch | None, split: str, attempt: Attempt
    ) -> list[ShardSample | Outcome]:
        """What came of each sample of a batch."""
        found: dict[int, ShardSample | Outcome] = {}
        asked: dict[int, tuple[PlannedSample, LoadedSample]] = {}
        for number, (plan, loaded, _) in enumerate(batch):
            if isinstance(loaded, Outcome):
                found[number] = loaded
            elif plan.sample.key in attempt.crashed:
                message = f"its process died on {attempt.crashed[plan.sample.key]}"
                found[number] = lost(plan.sample, "quarantined", "encode", "repeated_crash", message)
            else:
                asked[number] = plan, loaded
        encoded: list[ShardSample | Outcome] = []
        if len(asked) < 2 or attempt.is_repeated:
            # Workers have died on this shard: each is tried alone, to see on which, before it counts together.
            encoded = [self._encoded_alone(plan, loaded, ready, split, attempt) for plan, loaded in asked.values()]
        if len(asked) > 1:
            encoded = self._encoded_together(list(asked.values()), ready, split, attempt)
        found |= dict(zip(asked, encoded, strict=True))
        return [found[number] for number in range(len(batch))]

    def _encoded_together(
        self,
        asked: Sequence[tuple[PlannedSample, LoadedSample]],
        ready: ReadyBatch | None,
        split: str,
        attempt: Attempt,
    ) -> list[ShardSample | Outcome]:
        try:
            found = self.encoder.encode_together([(loaded, plan.assessed) for plan, loaded in asked], split, ready)
        except Exception as error:  # of models and libraries: each sample is tried alone, to see whose it is
            self._raise_device_fault(error, attempt)
            logger.warning("a batch of %d samples from %s on: %s", len(asked), asked[0][0].sample.key, error)
            return [self._encoded_alone(plan, loaded, None, split, attempt) for plan, loaded in asked]
        invalid = ("quarantined", "encode", "invalid_sample")
        return [
            lost(plan.sample, *invalid, str(one)) if isinstance(one, UserError) else one
            for (plan, _), one in zip(asked, found, strict=True)
        ]

    def _encoded_alone(
        self, plan: PlannedSample, loaded: LoadedSample, ready: ReadyBatch | None, split: str, attempt: Attempt
    ) -> ShardSample | Outcome:
        attempt.begin(plan.sample.key)
        try:
            return self.encoder.encode(loaded, split, plan.assessed, ready)
        except UserError as error:
            return lost(plan.sample, "quarantined", "encode", "invalid_sample", str(error))
        except Exception as error:
            self._raise_device_fault(error, attempt)
            # Of models and libraries. One sample must not end the run; a fault of all ends it through limits.max_loss.
            return lost(plan.sample, "quarantined", "encode", "encode_error", traceback.format_exc(limit=-4))

    def _raise_device_fault(self, error: Exception, attempt: Attempt) -> None:
        if is_device_fault(error):
            attempt.rest()
            raise DeviceFaultError(traceback.format_exc(limit=-4)) from error

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


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """So many at a time, by their number in the plan: what is lost leaves a gap and moves none."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
