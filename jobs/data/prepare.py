"""``loomvideo data prepare``: a Ray session around the prepare pipeline, with progress and a summary."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from rich.progress import TaskID

from loomvideo.pipelines.gallery.report import write_report
from loomvideo.pipelines.prepare.builder import SHARED_TASK
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.job import UP_TO_DATE, PrepareResult, prepare
from loomvideo.pipelines.prepare.load_ahead import decoders_for
from loomvideo.pipelines.prepare.unit_rows import UnitReport
from loomvideo.platform.config import flatten
from loomvideo.platform.console import bars, console, values_table
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.shards.manifest import SHARD_FOLDER
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.tracking import Tracker

# Stages before the builders and the figure that counts their samples.
_KINDS = {"assess": "assessed", "caption": "captioned", "judge": "judged"}
# Encoders that wait less are what limits.
_BUSY = 0.9


class PrepareProgress:
    """Bars of chunks assessed and captioned and shards built, throughput and the limiting stage; also to a tracker."""

    def __init__(self, track: Callable[[dict[str, float], int], None]):
        self._bar = bars("rate")
        self._track = track
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._total: Counter[str] = Counter()

    def __enter__(self) -> "PrepareProgress":
        self._begun = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, report: UnitReport, total: int) -> None:
        """Count one finished shard or chunk."""
        kind = report["stage"]
        if kind not in self._tasks:
            self._tasks[kind] = self._bar.add_task(kind, total=total, rate="")
            self._started[kind] = self._begun
            self._begun = time.perf_counter()
        self._total.update({k: v for k, v in report.items() if isinstance(v, (int, float))})
        seconds = time.perf_counter() - self._started[kind]
        if kind in _KINDS:
            done = self._total[_KINDS[kind]]
            rate = f"{done / seconds:.1f} samples/s"
            self._track({_KINDS[kind]: done}, done)
        else:
            rate = self._build_rate(report, seconds)
        # Of shards that are built beside another stage there are more with every wave.
        self._bar.update(self._tasks[kind], advance=1, rate=rate, total=total)

    def _build_rate(self, report: UnitReport, seconds: float) -> str:
        total = self._total
        if report["unit"] == SHARED_TASK:
            return ""
        whole_s = max(total["wait_s"] + total["encode_s"] + total["hold_s"], 1e-9)
        figures = {
            "written": total["written"],
            "lost": total["lost"],
            "megabytes": total["num_bytes"] / 1e6,
            "samples_per_s": total["written"] / seconds,
            "decode_wait_share": total["wait_s"] / whole_s,
            "encoder_busy_share": total["encode_s"] / whole_s,
            "write_wait_share": total["hold_s"] / whole_s,
            "decoders_needed": decoders_for(total["load_s"], total["encode_s"]),
            "decoders": report["decoders"],
        }
        self._track(figures, total["written"] + total["lost"])
        busy, awaited = figures["encoder_busy_share"], "decoding" if total["wait_s"] > total["hold_s"] else "writing"
        limit = "encoding" if busy >= _BUSY else awaited
        return (
            f"{figures['samples_per_s']:.1f} samples/s, {figures['megabytes']:.0f} MB, {limit} limits: encoders "
            f"{busy:.0%} busy, {report['decoders']} decoders a builder"
        )


class PrepareRun:
    """The job as an MLflow run in the folder ``config.runs``, opened at the first figures: only when work is done."""

    def __init__(self, config: PrepareConfig):
        self.config = config
        self._tracker: Tracker | None = None

    def log(self, figures: dict[str, float], step: int) -> None:
        """Log progress."""
        if not self.config.runs:
            return
        if self._tracker is None:
            folder = RunFolder.open(self.config.runs, "data-prepare", self.config.run or None)
            self._tracker = Tracker(folder, tags={"loomvideo.output": self.config.output})
            self._tracker.log_params(flatten(self.config))
        self._tracker.log_metrics(figures, step)

    def complete(self, result: PrepareResult) -> None:
        """Log what came out."""
        if self._tracker is None:
            return
        summary = result.summary()
        self._tracker.set_tags({"dataset.digest": result.manifest.digest, "state": result.reason})
        self._tracker.log_metrics({k: v for k, v in summary.items() if isinstance(v, (int, float))})
        self._tracker.log_text(result.manifest.to_json(), "manifest.json")
        self._tracker.folder.write_json("result.json", summary)

    def __enter__(self) -> "PrepareRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._tracker is not None:
            killed = kind is not None and issubclass(kind, KeyboardInterrupt)
            self._tracker.finish("KILLED" if killed else "FAILED" if kind else "FINISHED")


def run(config: PrepareConfig, again: Collection[str] = (), redeal: bool = False) -> PrepareResult:
    """Prepare, print what was done, and return it.

    Args:
        config: The job.
        again: Units to do again though they are up to date.
        redeal: Deal all samples into shards anew.
    """
    out = console()

    @contextlib.contextmanager
    def session() -> Iterator[None]:
        from loomvideo.platform.ray_session import ray_session

        try:
            with ray_session():
                yield
        finally:
            # Builders that were stopped midway leave their temporaries.
            Storage(config.output).remove_temporaries(SHARD_FOLDER)

    with PrepareRun(config) as tracked:
        with PrepareProgress(tracked.log) as progress:
            result = prepare(config, session, progress, again, redeal)
        if result.reason != UP_TO_DATE:
            dataset = ShardDataset.open(config.output)
            write_report(dataset)
        tracked.complete(result)
    summary = result.summary()
    if not result.built_shards and result.reason == UP_TO_DATE:
        out.print(f"{config.output}: up to date, nothing to do ({summary['written']} samples)", soft_wrap=True)
        return result
    out.print(values_table(summary, f"{config.output}: {result.reason}"))
    return result
