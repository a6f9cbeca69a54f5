"""The project's own JSONL and Parquet, and LoomVideo's folders of one JSON a sample."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import Outcome, Place, Rejected, Root, build, checked, register
from loomvideo.pipelines.sources.fields import FieldError
from loomvideo.pipelines.sources.rows import parquet_columns, plain_name, rows, shaped
from loomvideo.pipelines.sources.samples import Sample, sample_fields
from loomvideo.platform.errors import UserError

_NAMES = ("samples.jsonl", "samples.jsonl.gz", "samples.json")
_FIELDS = [f.name for f in dataclasses.fields(Sample)]


_SUFFIXES = (".jsonl", ".ndjson", ".json")


def _is_sample_jsonl(place: Place) -> bool:
    if not place.file:
        return any(place.root.has(name) for name in _NAMES)
    if not plain_name(place.file).endswith(_SUFFIXES):
        return False
    first = next((entry for entry in rows(place, place.file, "") if not isinstance(entry, Rejected)), None)
    return first is not None and {"key", "task", "dataset", "target"} <= set(first[1])


@register("jsonl", _is_sample_jsonl)
def read_samples(place: Place) -> Iterator[Outcome]:
    """The project's own format, one sample a line or a JSON list of samples, media paths relative to the file."""
    file = place.file or next((name for name in _NAMES if place.root.has(name)), _NAMES[0])
    if not place.root.has(file):
        raise UserError(f"{place.root.path(file)}: no such sample file")
    for entry in rows(place, file, ""):
        yield entry if isinstance(entry, Rejected) else _outcome(*entry, place.root)


def _outcome(where: str, row: dict[str, Any], root: Root) -> Outcome:
    dataset = row.get("dataset") if isinstance(row.get("dataset"), str) else ""
    try:
        sample = Sample(**_located(sample_fields(row), root))
    except FieldError as error:
        return Rejected(where, dataset, error.reason, str(error))
    return checked(sample, where)


def _located(values: dict[str, Any], root: Root) -> dict[str, Any]:
    for name in ("target", "source"):
        if name in values:
            values[name] = root.path(values[name])
    if "references" in values:
        values["references"] = [root.path(path) for path in values["references"]]
    return values


def _is_sample_parquet(place: Place) -> bool:
    if not place.file.endswith(".parquet"):
        return False
    return {"key", "task", "dataset", "target"} <= set(parquet_columns(place, place.file))


@register("parquet", _is_sample_parquet)
def read_sample_parquet(place: Place) -> Iterator[Outcome]:
    """The project's own format as Parquet: the fields of a sample as columns, `extra` as a struct or JSON text."""
    for file in place.files(".parquet"):
        for entry in rows(place, file, ""):
            if isinstance(entry, Rejected):
                yield entry
                continue
            where, row = entry
            unknown = sorted(set(row) - set(_FIELDS))
            if unknown:
                raise UserError(f"{where}: unknown column {unknown[0]!r}; use format=table with a column map")
            yield _outcome(where, row, place.root)


# Task by the fields that only its template has, most telling first.
_TEMPLATES: tuple[tuple[str, frozenset[str]], ...] = (
    ("ref_edit", frozenset(("source_video_path", "reference_image_paths", "target_video_path"))),
    ("video_edit", frozenset(("source_video_path", "target_video_path"))),
    ("image_edit", frozenset(("source_image_path", "target_image_path"))),
    ("mi2v", frozenset(("reference_image_paths", "target_video_path"))),
    ("t2i", frozenset(("caption", "image_path"))),
    ("t2v", frozenset(("text", "path"))),
)


def _json_folder(place: Place) -> str:
    return "single_jsons" if place.root.is_folder("single_jsons") else ""


def _is_loomvideo(place: Place) -> bool:
    return not place.file and any(re.fullmatch(r"\d+\.json", n) for n in place.root.names(_json_folder(place))[:50])


@register("loomvideo", _is_loomvideo)
def read_loomvideo(
    place: Place, *, media: str = "", dataset: str = "loomvideo", task: str = "", licence: str = ""
) -> Iterator[Outcome]:
    """LoomVideo's folders `single_jsons/{N}.json`, all six task templates.

    Args:
        place: The folder, or the folder above ``single_jsons``.
        media: Folder that paths start from; default: the folder above ``single_jsons``.
        dataset: Name.
        task: The task of all files; default: told from each file's fields.
        licence: The licence of the dataset.
    """
    folder = _json_folder(place)
    base = Root(media) if media else place.root
    names = [name for name in place.root.names(folder) if re.fullmatch(r"\d+\.json", name)]
    if not names:
        raise UserError(f"{place.name}: no single_jsons/0.json, 1.json, …")
    for name in sorted(names, key=lambda n: int(n.partition(".")[0])):
        file = f"{folder}/{name}" if folder else name
        where = place.root.path(file)
        for entry in rows(place, file, dataset):
            if isinstance(entry, Rejected):
                yield entry
            else:
                yield from shaped(where, dataset, _loomvideo_sample, entry[1], where, base, dataset, task, licence)


def _loomvideo_sample(row: dict[str, Any], where: str, base: Root, dataset: str, task: str, licence: str) -> Outcome:
    found = task or next((name for name, fields in _TEMPLATES if fields <= set(row)), "")
    if not found:
        return Rejected(where, dataset, "missing_field", f"no task has the fields {', '.join(sorted(row))}")

    def path(*names: str) -> str | None:
        field, value = next(((name, row[name]) for name in names if row.get(name)), ("", None))
        given = fields.path(value, field)
        return base.path(given) if given else None

    known = {
        "source_video_path", "source_image_path", "target_video_path", "target_image_path", "path", "image_path",
        "reference_image_paths", "instruction", "text", "caption", "save_path",
    }  # fmt: skip
    source = path("source_video_path", "source_image_path")
    is_text_task = found in TASKS and not TASKS[found].has_media
    return build(
        where,
        dataset,
        task=found,
        target=path("target_video_path", "target_image_path", "path", "image_path"),
        source=source,
        references=[base.path(p) for p in fields.paths(row.get("reference_image_paths"), "reference_image_paths")],
        instruction=None if is_text_task else row.get("instruction"),
        caption=row.get("text") or row.get("caption"),
        licence=licence,
        group=source or "",
        extra={k: v for k, v in row.items() if k not in known},
    )
