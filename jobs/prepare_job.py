"""``loomvideo data prepare``: a Ray session around the prepare pipeline, with progress and a summary."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from loomvideo.pipelines.builder import SHARED_TASK
from loomvideo.pipelines.prepare import prepare
from loomvideo.pipelines.prepare_config import PrepareConfig
from loomvideo.platform.shards.manifest import SHARD_FOLDER
from loomvideo.platform.shards.storage import Storage


class PrepareProgress:
    """A bar of shards with throughput and the limiting stage."""

    def __init__(self, console: Console):
        self._bar = Progress(
            TextColumn("shards"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = None
        self._written = self._bytes = 0
        self._wait_s = self._encode_s = 0.0

    def __enter__(self) -> "PrepareProgress":
        self._started = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, report: dict[str, Any], total: int) -> None:
        """Count one finished shard."""
        if self._task is None:
            self._task = self._bar.add_task("shards", total=total, rate="")
        self._written += report["written"]
        self._bytes += report["num_bytes"]
        self._wait_s += report["wait_s"]
        self._encode_s += report["encode_s"]
        seconds = time.perf_counter() - self._started
        limit = "decoding" if self._wait_s > self._encode_s else "encoding"
        rate = f"{self._written / seconds:.1f} samples/s, {self._bytes / 1e6:.0f} MB, {limit} limits"
        self._bar.update(self._task, advance=1, rate="" if report["shard"] == SHARED_TASK else rate)


def run(config: PrepareConfig) -> None:
    """Prepare, and print what was done."""
    console = Console()

    @contextlib.contextmanager
    def session() -> Iterator[None]:
        from loomvideo.platform.ray_session import ray_session

        try:
            with ray_session():
                yield
        finally:
            # Builders that were stopped midway leave their temporaries.
            Storage(config.output).remove_temporaries(SHARD_FOLDER)

    with PrepareProgress(console) as progress:
        result = prepare(config, session, progress)
    summary = result.summary()
    if not result.built_shards and result.reason == "up to date":
        console.print(f"{config.output}: up to date, nothing to do ({summary['written']} samples)", soft_wrap=True)
        return
    table = Table(title=f"{config.output}: {result.reason}", title_justify="left", show_header=False)
    for key, value in summary.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
