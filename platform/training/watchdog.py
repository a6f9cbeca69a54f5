"""Hang detection: a worker that makes no progress writes all its stacks and ends, so that the run restarts.

Beside the stacks it leaves the collectives it took part in, from torch's flight recorder, as one file a rank;
``torchfrtrace FOLDER`` tells from all ranks' files which collective one of them did not join.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from loomvideo.platform.time_limits import DUMP_GRACE

EXIT_CODE = 75
RECORDED_COLLECTIVES = 2000
FLIGHT_FOLDER = "flight"
FLIGHT_PREFIX = "nccl_trace_rank_"
"""What torch's own analyser expects."""


def recorder_environment(folder: Path) -> dict[str, str]:
    """Environment of a worker whose collectives are recorded, with dumps of NCCL's own time-out in ``folder``."""
    return {
        "TORCH_FR_BUFFER_SIZE": str(RECORDED_COLLECTIVES),
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / FLIGHT_PREFIX),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def flight_record() -> bytes:
    """The recorded collectives of this process, as the analyser reads them."""
    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d

    # NCCL has a recorder of its own, which knows the state of the GPU too; in a build with NCCL it is there beside the
    # one of other backends, and empty where those are used.
    nccl = dist.is_initialized() and "nccl" in dist.get_backend()
    return c10d._dump_nccl_trace() if nccl else c10d._dump_fr_trace()


class Watchdog:
    """Watches one worker.

    Args:
        limit_s: Seconds without :meth:`beat` that count as a hang; 0 never does.
        report_file: Where the stacks of all threads are written; they go to stderr too.
        flight_file: Where the recorded collectives are written; None for nowhere.
    """

    def __init__(self, limit_s: float, report_file: Path, flight_file: Path | None = None):
        self.limit_s, self.report_file, self.flight_file = limit_s, report_file, flight_file
        self._last = time.monotonic()
        self._closed = threading.Event()
        if limit_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Say that there was progress."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.limit_s / 4)):
            if time.monotonic() - self._last > self.limit_s:
                self._end()

    def _end(self) -> None:
        note = f"no progress for {self.limit_s:.0f} s; stacks of all threads are in {self.report_file}"
        print(note, file=sys.stderr, flush=True)
        self.report_file.parent.mkdir(parents=True, exist_ok=True)
        with self.report_file.open("w") as out:
            faulthandler.dump_traceback(out, all_threads=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self.flight_file is not None:
            self.flight_file.parent.mkdir(parents=True, exist_ok=True)
            self.flight_file.write_bytes(flight_record())
            print(f"the last collectives are in {self.flight_file.parent} (torchfrtrace)", file=sys.stderr, flush=True)
            # The first to leave would break the connections of those still writing.
            time.sleep(DUMP_GRACE.here())
        # The main thread sits in a collective and cannot be interrupted otherwise.
        os._exit(EXIT_CODE)
