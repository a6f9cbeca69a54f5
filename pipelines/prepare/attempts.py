"""When work fails as a whole: a worker that dies, a GPU that fails, a sample that takes its process with it.

A worker leaves a note before it begins a unit and takes it away at the end, so that whoever gets the unit after a death
knows. The second attempt notes every sample as well; the third leaves out the one that the second died in. A GPU's own
error is no fault of the sample: the worker reports it, ends its process before it takes more work, and the unit is done
elsewhere or by its successor. Both are counted, and end the run where they go on.
"""

import json
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from loomvideo.pipelines.prepare.config import LimitOptions
from loomvideo.pipelines.prepare.unit_rows import UnitReport
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.storage import Storage

ATTEMPT_FOLDER = "work/attempts"
# Losses that are no reason to stop before the end, where all of them are counted and named.
FEW_SAMPLES = 20
# What CUDA and its libraries say when the device or its context is at fault; torch raises them as RuntimeError.
_DEVICE_WORDS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert", "NCCL error")


class DeviceFaultError(RuntimeError):
    """The device, or this process's context on it, failed: nothing that it computes from now on counts."""


def is_device_fault(error: BaseException) -> bool:
    """Whether an error is the device's and not the sample's; running out of its memory is one."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    accelerator = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _DEVICE_WORDS)
    )


def worker_place() -> str:
    """Node and GPU of this process, for a person who has to find them."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return socket.gethostname() + (f" GPU {devices}" if devices else "")


class Attempt:
    """A worker's note on the unit it works on.

    Args:
        storage: The dataset folder.
        unit: Name of the unit.
        run: The run of the prepare; notes of another run say nothing, since it may have been stopped.
        most: Attempts at a unit in one run.

    Raises:
        UserError: if the unit has been tried that often.
    """

    def __init__(self, storage: Storage, unit: str, run: str, most: int):
        self._storage, self._path = storage, f"{ATTEMPT_FOLDER}/{unit}.json"
        note: dict[str, Any] = {}
        if storage.exists(self._path):
            note = json.loads(storage.read_bytes(self._path))
        if note.get("run") != run:
            note = {"number": 0, "sample": "", "crashed": {}, "where": ""}
        crashed = dict(note["crashed"])
        if note["sample"]:
            crashed[note["sample"]] = note["where"]
        if note["number"] >= most:
            raise UserError(
                f"{unit}: its worker died {most} times (limits.attempts={most}), last on {note['where']}, in sample "
                f"{note['sample'] or 'unknown'}; see that node's log, take the sample out of the input or raise "
                "limits.attempts, and run again: finished shards are kept"
            )
        self._note = {"run": run, "number": note["number"] + 1, "sample": "", "crashed": crashed}
        self._note["where"] = worker_place()
        self._write()

    @property
    def crashed(self) -> Mapping[str, str]:
        """Keys of samples in which a worker died, and where."""
        return self._note["crashed"]

    @property
    def is_repeated(self) -> bool:
        """Whether an earlier attempt at the unit did not end."""
        return self._note["number"] > 1

    def begin(self, key: str) -> None:
        """Note the sample, if workers have died on this unit."""
        if self.is_repeated:
            self._note["sample"] = key
            self._write()

    def rest(self) -> None:
        """Note that no sample is worked on: what ends the process from now on is another shard's."""
        if self._note["sample"]:
            self._note["sample"] = ""
            self._write()

    def end(self) -> None:
        """Take the note away."""
        self._storage.delete(self._path)

    def _write(self) -> None:
        self._storage.write_bytes(self._path, json.dumps(self._note).encode())


class Watch:
    """Counts what is lost while a stage runs, and ends the run as soon as it must fail.

    Args:
        limits: The limits of the job.
        num_inputs: Samples of the job, for the share that may be lost.
    """

    def __init__(self, limits: LimitOptions, num_inputs: int):
        self.limits, self.num_inputs = limits, num_inputs
        self._lost: Counter[str] = Counter()
        self._places: dict[str, Counter[str]] = defaultdict(Counter)
        self._faults: Counter[str] = Counter()

    def see(self, report: UnitReport) -> None:
        """Take a worker's report.

        Raises:
            UserError: when one reason has lost more than ``limits.max_loss`` allows, or one device keeps failing.
        """
        place = report.get("where", "")
        for reason, count in report.get("lost_by_reason", {}).items():
            self._lost[reason] += count or 0
            self._places[reason][place] += count or 0
            if self._lost[reason] > max(self.limits.max_loss * self.num_inputs, FEW_SAMPLES):
                where, most = self._places[reason].most_common(1)[0]
                raise UserError(
                    f"{self._lost[reason]} samples are lost to {reason} so far, more than limits.max_loss="
                    f"{self.limits.max_loss:g} of {self.num_inputs}; {most} of them on {where}; stopped early, "
                    "finished shards are kept"
                )
        if report.get("fault") and not report.get("handed_back"):
            self._faults[place] += 1
            if self._faults[place] >= self.limits.device_faults:
                raise UserError(
                    f"{place} failed {self._faults[place]} times (limits.device_faults={self.limits.device_faults}), "
                    f"last: {report['fault'].strip().splitlines()[-1][:200]}; take it out of the cluster and run "
                    "again: finished shards are kept"
                )
