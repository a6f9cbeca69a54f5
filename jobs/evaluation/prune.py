"""``loomvideo evaluate prune``: what the store of results holds, and room made by what no run refers to."""

from pathlib import Path

from rich.table import Table

from loomvideo.jobs.evaluation.setup import wide_console
from loomvideo.pipelines.evaluation.prune import prune
from loomvideo.platform.errors import UserError

_MEGABYTE = 1e6


def run_prune(runs: Path, store: str, days: float, remove: bool) -> None:
    """Print what each kind takes, and remove what no finished run refers to.

    Raises:
        UserError: if there is no store.
    """
    folder = Path(store) if store else runs / "evaluation-store"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such store of results; name it with --store, or its runs with --runs")
    table = Table(title=str(folder), title_justify="left", box=None, padding=(0, 2, 0, 0))
    done = "removed" if remove else "could be removed"
    for header in ("kind", "entries", "MB", done, "MB"):
        table.add_column(header, justify="left" if header == "kind" else "right")
    usages = prune(folder, runs, days, remove)
    for u in usages:
        cells = (u.entries, f"{u.size_bytes / _MEGABYTE:.1f}", u.unused, f"{u.unused_bytes / _MEGABYTE:.1f}")
        table.add_row(u.kind, *map(str, cells))
    console = wide_console()
    console.print(table)
    total, freed = (sum(getattr(u, name) for u in usages) / _MEGABYTE for name in ("size_bytes", "unused_bytes"))
    console.print(f"{total - freed:.1f} of {total:.1f} MB are in use", highlight=False)
