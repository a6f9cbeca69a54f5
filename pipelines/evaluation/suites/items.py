"""The one manifest that every benchmark is converted to: one item a sample."""

import dataclasses
import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loomvideo.model.tasks import TASKS
from loomvideo.platform.errors import UserError, full_disk_named


@dataclass(frozen=True)
class EvalItem:
    """One benchmark sample.

    Media paths are absolute, or relative to the manifest's root.

    Attributes:
        suite: Benchmark name.
        key: Unique in the suite.
        task: A task of :data:`~loomvideo.model.tasks.TASKS`.
        category: The benchmark's own type of the sample.
        text: Instruction or prompt.
        source: Video or picture to edit.
        references: Reference pictures.
        target: Ground truth, where there is one.
        mask: Picture or video whose bright pixels are the region the edit may change.
        cluster: Samples that share it are not independent (the source, by default the key).
        aligned: Whether the result should match the source outside the edited region (preservation means something).
        extra: What the benchmark's scorer needs besides.
    """

    suite: str
    key: str
    task: str
    category: str
    text: str
    source: str | None = None
    references: tuple[str, ...] = ()
    target: str | None = None
    mask: str | None = None
    cluster: str = ""
    aligned: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The unit of resampling."""
        return self.cluster or self.source or self.key

    def media(self) -> list[str]:
        """Every input file of the item."""
        return [path for path in (self.source, *self.references, self.target, self.mask) if path]

    def to_json(self) -> str:
        """One JSON line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class SuiteManifest:
    """A converted benchmark.

    Attributes:
        suite: Benchmark name.
        root: Folder that relative media paths start from.
        items: The samples, in the benchmark's order.
        problems: Differences from the official counts, one line each.
    """

    suite: str
    root: Path
    items: tuple[EvalItem, ...]
    problems: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Hash of the items' text, inputs and order, by which runs can be compared."""
        content = "\n".join(item.to_json() for item in self.items)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def path(self, relative: str) -> Path:
        """A media file's path."""
        return self.root / relative

    def missing(self) -> list[str]:
        """Input files that are not on disk, one ``key: path`` a file."""
        return [f"{i.key}: {path}" for i in self.items for path in i.media() if not self.path(path).is_file()]

    def counts(self) -> dict[str, int]:
        """Items a category."""
        return dict(sorted(Counter(item.category for item in self.items).items()))

    def limited(self, limit: int) -> "SuiteManifest":
        """At most ``limit`` items, taken from the categories in turn so that small runs see them all."""
        if limit <= 0 or limit >= len(self.items):
            return self
        queues: dict[str, list[EvalItem]] = {}
        for item in self.items:
            queues.setdefault(item.category, []).append(item)
        turns = [(turn, order, item) for order, q in enumerate(queues.values()) for turn, item in enumerate(q)]
        chosen = {item.key for _, _, item in sorted(turns, key=lambda t: t[:2])[:limit]}
        return dataclasses.replace(self, items=tuple(item for item in self.items if item.key in chosen))

    def repeated(self, count_of: Callable[[EvalItem], int]) -> "SuiteManifest":
        """Several samples a prompt: keys end in ``-0``, ``-1``, …, which gives each a seed, and share their cluster."""
        items = []
        for item in self.items:
            count = count_of(item)
            if count == 1:
                items.append(item)
                continue
            for number in range(count):
                extra = item.extra | {"prompt_key": item.key, "number": number}
                key = f"{item.key}-{number}"
                items.append(dataclasses.replace(item, key=key, cluster=item.unit, extra=extra))
        return dataclasses.replace(self, items=tuple(items))

    def write(self, path: Path) -> None:
        """Write one JSON line an item, through a temporary name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        with full_disk_named(path, partial):
            partial.write_text("".join(item.to_json() + "\n" for item in self.items), encoding="utf-8")
            partial.replace(path)


def build_manifest(
    suite: str,
    root: Path,
    items: Iterable[EvalItem],
    total: int | None = None,
    categories: Mapping[str, int] | None = None,
) -> SuiteManifest:
    """Check items against each other and against the official counts.

    Args:
        suite: Benchmark name.
        root: Folder of the download.
        items: Converted samples.
        total: Official number of samples.
        categories: Official number of samples a category.

    Raises:
        UserError: for duplicate keys, an unknown task or an empty benchmark.
    """
    items = tuple(items)
    if not items:
        raise UserError(f"suite {suite}: no samples found under {root}")
    twice = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    if twice:
        raise UserError(f"suite {suite}: key {twice[0]!r} appears twice under {root}")
    for item in items:
        if item.task not in TASKS:
            raise UserError(f"suite {suite}: item {item.key}: task {item.task!r} is none of {', '.join(TASKS)}")
    problems = []
    if total is not None and len(items) != total:
        problems.append(f"{len(items)} samples, the official benchmark has {total}")
    found = Counter(item.category for item in items)
    for category, count in (categories or {}).items():
        if found[category] != count:
            problems.append(f"{category}: {found[category]} samples, the official benchmark has {count}")
    return SuiteManifest(suite, root, items, tuple(problems))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: if there is none, or it is a pipe or a device, which has no end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no file", str(path))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
