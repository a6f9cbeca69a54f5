"""``loomvideo evaluate prune``: what the store of results holds, and room made by what no run refers to."""

from pathlib import Path

from loomvideo.pipelines.evaluation.prune import prune
from loomvideo.platform.console import console, table
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
    done = "removed" if remove else "could be removed"
    usage = table("kind", "entries", "MB", done, "MB", title=str(folder), figures=True)
    usages = prune(folder, runs, days, remove)
    for u in usages:
        cells = (u.entries, f"{u.size_bytes / _MEGABYTE:.1f}", u.unused, f"{u.unused_bytes / _MEGABYTE:.1f}")
        usage.add_row(u.kind, *map(str, cells))
    out = console()
    out.print(usage)
    total, freed = (sum(getattr(u, name) for u in usages) / _MEGABYTE for name in ("size_bytes", "unused_bytes"))
    out.print(f"{total - freed:.1f} of {total:.1f} MB are in use", highlight=False)
