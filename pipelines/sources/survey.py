"""What would be understood of a dataset, told before anything is read in full, decoded or spent."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec

from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.fragments import split_fragment
from loomvideo.pipelines.media.media_info import DecodeError, first_line
from loomvideo.pipelines.sources.base import Rejected, choose_format, open_source
from loomvideo.pipelines.sources.rows import rows
from loomvideo.pipelines.sources.samples import Sample, media_paths
from loomvideo.pipelines.sources.tables import ColumnMap, tables_of

_HEAD_ROWS = 50


@dataclass
class Survey:
    """What was understood.

    Attributes:
        place: The file or folder.
        format: Name of the format.
        help: What it reads.
        fields: ``(field, column, example)`` of a table.
        unused: Columns of a table that give no field; plain ones go to ``extra``.
        questions: What has to be said before anything is written, each with the key that says it.
        samples: Some samples, spread over those looked at.
        counts: Samples looked at, by task.
        rejected: Rows looked at that are no samples: reason to number and first case.
        complete: Whether all of the dataset was looked at.
    """

    place: str
    format: str
    help: str
    fields: list[tuple[str, str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, tuple[int, str]] = field(default_factory=dict)
    complete: bool = True


def survey(
    path: str, format: str, options: dict[str, Any], num_samples: int, num_rows: int, extract_to: str = ""
) -> Survey:
    """Look at the start of a dataset.

    Args:
        path: A file or folder, on disk or an fsspec URL.
        format: One of the formats, or `auto`.
        options: The options of the format.
        num_samples: Samples to show.
        num_rows: Rows, files or items to look at, at most.
        extract_to: Where media inside tables go.

    Raises:
        UserError: for a format or option that there is not, or a layout that fits none or several.
    """
    place, chosen = choose_format(path, format, str(options.get("encoding", "") or ""))
    found = Survey(place.name, chosen.name, chosen.help)
    if chosen.name in ("table", "openve"):
        _columns(found, place, ColumnMap(options.get("columns") or {}))
    outcomes = open_source(path, chosen.name, extract_to, **options)
    looked_at = list(itertools.islice(outcomes, num_rows + 1))
    found.complete = len(looked_at) <= num_rows
    samples: list[Sample] = []
    for outcome in looked_at[:num_rows]:
        sample = outcome.unfinished if isinstance(outcome, Rejected) else outcome
        if sample is not None:
            found.counts[sample.task if sample.text else f"{sample.task} without text"] += 1
            samples.append(sample)
        elif isinstance(outcome, Rejected):
            number, first = found.rejected.get(outcome.reason, (0, f"{outcome.where}: {outcome.detail}"))
            found.rejected[outcome.reason] = (number + 1, first)
    step = max(len(samples) / max(num_samples, 1), 1)
    found.samples = [samples[int(i * step)] for i in range(min(num_samples, len(samples)))]
    if len(samples) > 2 and len({sample.target for sample in samples}) == 1:
        found.questions.append(f"every sample has the target {samples[0].target}: set source_options.columns.target=…")
    return found


def _columns(found: Survey, place: Any, mapping: ColumnMap) -> None:
    files = tables_of(place)
    if not files:
        return
    head = list(itertools.islice(rows(place, files[0], ""), _HEAD_ROWS))
    kept = [entry[1] for entry in head if not isinstance(entry, Rejected)]
    merged: dict[str, Any] = {}
    for row in reversed(kept):
        merged |= {name: value for name, value in row.items() if value not in (None, "")}
    for name, column in mapping.described(merged):
        found.fields.append((name, column, _short(mapping.value(merged, name))))
    used = mapping.used(merged)
    found.unused = [str(name) for row in kept[:1] for name in row if name not in used]
    for name, columns in sorted(mapping.unclear(head).items()):
        found.questions.append(
            f"which column is the {name}: {' or '.join(columns)}? set source_options.columns.{name}={columns[0]}"
        )


def _short(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return f"{len(value['bytes'])} bytes ({value.get('path') or 'no name'})"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def looked_at_media(samples: Sequence[Sample]) -> dict[str, str]:
    """What each media path of samples holds, or why it cannot be used; remote files are only looked up."""
    decoder = IsolatedDecoder()
    found: dict[str, str] = {}
    try:
        for path in dict.fromkeys(path for sample in samples for path in media_paths(sample)):
            found[path] = _remote(path) if "://" in path else _local(decoder, path)
    finally:
        decoder.close()
    return found


def _remote(path: str) -> str:
    try:
        fs, inside = fsspec.url_to_fs(split_fragment(path)[0])
        return f"{fs.info(inside)['size']} bytes"
    except FileNotFoundError:
        return "missing_file: no such object"
    except Exception as error:  # of any store's client: it is shown beside the path, as `data prepare` would count it
        return f"download_failed: {first_line(error)}"


def _local(decoder: IsolatedDecoder, path: str) -> str:
    try:
        info = decoder.probe(path)
    except DecodeError as error:
        return f"{error.reason}: {str(error).removeprefix(path + ': ')}"
    if info.kind == "image":
        return f"picture {info.width}x{info.height}"
    return f"video {info.width}x{info.height}, {info.num_frames} frames at {info.fps:.4g} fps"
