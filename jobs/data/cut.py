"""``loomvideo data cut``: films to clips, with progress and the accounts."""

import contextlib
from collections import Counter

from loomvideo.pipelines.clips.config import CutConfig
from loomvideo.pipelines.clips.job import SAMPLES_FILE, CutResult, FilmReport, cut
from loomvideo.platform.console import bars, console, table


def run(config: CutConfig) -> CutResult:
    """Cut, print the accounts, and return them."""
    from loomvideo.platform.ray_session import ray_session

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(bars("rate"))
        task = bar.add_task("films", total=None, rate="")
        seen: Counter[str] = Counter()

        def show(report: FilmReport, total: int) -> None:
            seen.update(frames=report["num_frames"], read=report["num_read"], lost=report["lost"])
            rate = f"{seen['frames']} frames, {seen['read'] / 1e6:.0f} MB read, {seen['lost']} parts lost"
            bar.update(task, advance=1, total=total, rate=rate)

        result = cut(config, ray_session, show)
    console().print(
        f"{config.output}/{SAMPLES_FILE}: {result.counts['samples']} samples; {result.films} films read "
        f"({result.num_read / 1e6:.1f} MB), {result.films_before} as before",
        soft_wrap=True,
    )
    rows = table("what", "how many")
    for name, count in sorted({**result.counts, **{f"clips {k}": n for k, n in result.clips.items()}}.items()):
        rows.add_row(name, str(count))
    console().print(rows)
    return result
