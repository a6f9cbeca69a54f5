"""What an evaluation store holds, and what of it no run refers to."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("inputs", "results", "media", "metrics")
ANSWERS = "answers"
_REFERENCES = {"inputs": ("inputs",), "result": ("results",), "media": ("media",), "measured": ("metrics",),
               "features": ("metrics",)}  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """One kind of entries.

    Attributes:
        kind: Folder of the store.
        entries: How many there are.
        size_bytes: Bytes on disk.
        unused: How many no run refers to.
        unused_bytes: Bytes on disk that nothing refers to.
    """

    kind: str
    entries: int
    size_bytes: int
    unused: int
    unused_bytes: int


def referenced(runs: Path) -> set[tuple[str, str]]:
    """``(kind, key)`` of every entry that a finished evaluation under ``runs`` refers to."""
    found = set()
    for path in runs.glob("evaluate/*/suites/*/rows.jsonl"):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                for field, kinds in _REFERENCES.items():
                    found |= {(kind, row[field]) for kind in kinds if row.get(field)}
    return found


def prune(store: Path, runs: Path, days: float = 0.0, remove: bool = True) -> list[Usage]:
    """Remove entries that no run refers to and that are older than ``days``; answers, which were paid for, stay.

    Args:
        store: Folder of the store.
        runs: Folder of all runs.
        days: Younger entries stay: a run that is under way has not written its rows yet.
        remove: False only counts.
    """
    used = referenced(runs)
    before = time.time() - days * 86_400
    usages = []
    for kind in KINDS:
        entries = size = unused = unused_bytes = 0
        for entry in _entries(store / kind):
            taken = _size(entry)
            entries, size = entries + 1, size + taken
            partial = entry.name.startswith(".")
            if (partial or (kind, entry.name) not in used) and entry.stat().st_mtime <= before:
                unused, unused_bytes = unused + 1, unused_bytes + taken
                if remove:
                    shutil.rmtree(entry)
        usages.append(Usage(kind, entries, size, unused, unused_bytes))
    answers = list((store / ANSWERS).glob("*/*.json"))
    usages.append(Usage(ANSWERS, len(answers), sum(file.stat().st_size for file in answers), 0, 0))
    return usages


def _entries(folder: Path) -> Iterator[Path]:
    for shelf in sorted(folder.iterdir()) if folder.is_dir() else ():
        yield from sorted(shelf.iterdir())


def _size(entry: Path) -> int:
    files: Iterable[Path] = entry.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
