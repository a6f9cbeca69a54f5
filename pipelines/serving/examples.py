"""Examples to click on the page: held-out samples of a dataset, with their media."""

import mimetypes
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from loomvideo.model.tasks import EDIT, REQUESTED, TASKS
from loomvideo.pipelines.sources.samples import Sample, read_jsonl
from loomvideo.platform.errors import UserError

MAX_EXAMPLES = 9


@dataclass(frozen=True)
class ExampleMedia:
    """A file of an example."""

    content: bytes
    media_type: str


@dataclass(frozen=True)
class PageExample:
    """What a click fills the form with."""

    task: str
    prompt: str
    source: ExampleMedia | None
    references: tuple[ExampleMedia, ...]

    def describe(self) -> dict:
        """For the page; media are fetched by number."""
        return {
            "task": self.task,
            "prompt": self.prompt,
            "source": self.source.media_type if self.source else None,
            "references": len(self.references),
        }


def read_examples(
    path: str | Path, count: int = MAX_EXAMPLES, left_out: Collection[str] = ()
) -> tuple[PageExample, ...]:
    """The first held-out samples of every kind of edit and task, videos first.

    Args:
        path: A ``samples.jsonl`` with local media.
        count: Examples at most.
        left_out: Tasks of which none is shown.

    Raises:
        UserError: if the file is missing or none of its samples is held out.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"examples={path}: no such file; make it with `loomvideo data sample output={file.parent}`")
    heldout = [sample for sample in read_jsonl(file) if sample.split == "heldout" and sample.task not in left_out]
    if not heldout:
        raise UserError(f"examples={path}: no sample says split=heldout")
    seen: Counter[str] = Counter()
    ranked = []
    for index, sample in enumerate(sorted(heldout, key=lambda s: TASKS[s.task].is_image)):
        kind = f"{_requested(sample)} {(sample.extra.get('edit') or {}).get('kind', '')}"
        ranked.append((seen[kind], index, sample))
        seen[kind] += 1
    chosen = [sample for _, _, sample in sorted(ranked, key=lambda row: row[:2])[:count]]
    return tuple(_example(sample, file.parent) for sample in chosen)


def _requested(sample: Sample) -> str:
    return sample.task if sample.task in REQUESTED else EDIT


def _example(sample: Sample, folder: Path) -> PageExample:
    source = _media(folder / sample.source) if sample.source else None
    references = tuple(_media(folder / name) for name in sample.references)
    return PageExample(_requested(sample), sample.text, source, references)


def _media(path: Path) -> ExampleMedia:
    return ExampleMedia(path.read_bytes(), mimetypes.guess_type(path.name)[0] or "application/octet-stream")
