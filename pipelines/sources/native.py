"""The project's own JSONL and Parquet, and LoomVideo's folders of one JSON a sample."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.sources.base import Outcome, Place, Rejected, Root, build, checked, register
from loomvideo.pipelines.sources.samples import Sample, parse_sample
from loomvideo.pipelines.sources.tables import rows
from loomvideo.platform.errors import UserError

_FIELDS = [f.name for f in dataclasses.fields(Sample)]


def _is_sample_jsonl(place: Place) -> bool:
    if not place.file:
        return place.root.has("samples.jsonl")
    if not place.file.endswith(".jsonl"):
        return False
    with place.root.open(place.file) as opened:
        first = next((line for line in opened if line.strip()), "")
    return _has_sample_fields(first)


def _has_sample_fields(line: str) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and {"key", "task", "dataset", "target"} <= set(row)


@register("jsonl", _is_sample_jsonl)
def read_samples(place: Place) -> Iterator[Outcome]:
    """The project's own format, one sample a line, media paths relative to the file."""
    file = place.file or "samples.jsonl"
    if not place.root.has(file):
        raise UserError(f"{place.root.path(file)}: no such sample file")
    with place.root.open(file) as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            where = f"{place.root.path(file)}:{number}"
            yield _parsed(line, where, place.root)


def _parsed(line: str, where: str, root: Root) -> Outcome:
    try:
        return _located(parse_sample(line, where), root)
    except (UserError, TypeError) as error:
        problem = str(error).removeprefix(f"{where}: ")
        if "invalid JSON" in problem:
            return Rejected(where, "", "invalid_json", problem)
        row = json.loads(line)
        dataset = str(row.get("dataset") or "") if isinstance(row, dict) else ""
        if isinstance(row, dict) and not (row.get("caption") or row.get("instruction")):
            try:
                unfinished = dataclasses.replace(parse_sample(json.dumps(row | {"caption": "?"}), where), caption=None)
            except (UserError, TypeError):
                return Rejected(where, dataset, "invalid_sample", problem)
            return checked(_located(unfinished, root), where)
        return Rejected(where, dataset, "invalid_sample", problem)


def _located(sample: Sample, root: Root) -> Sample:
    return dataclasses.replace(
        sample,
        target=root.path(sample.target),
        source=root.path(sample.source) if sample.source else None,
        references=[root.path(path) for path in sample.references],
    )


def _is_sample_parquet(place: Place) -> bool:
    if not place.file.endswith(".parquet"):
        return False
    import pyarrow.parquet as pq

    with place.root.open(place.file, "rb") as opened:
        return {"key", "task", "dataset", "target"} <= set(pq.ParquetFile(opened).schema_arrow.names)


@register("parquet", _is_sample_parquet)
def read_sample_parquet(place: Place) -> Iterator[Outcome]:
    """The project's own format as Parquet: the fields of a sample as columns, `extra` as a struct or JSON text."""
    for file in place.files(".parquet"):
        for entry in rows(place, file, ""):
            if isinstance(entry, Rejected):
                yield entry
                continue
            where, row = entry
            values = {name: row[name] for name in _FIELDS if row.get(name) not in (None, "", [])}
            unknown = sorted(set(row) - set(_FIELDS))
            if unknown:
                raise UserError(f"{where}: unknown column {unknown[0]!r}; use format=table with a column map")
            if isinstance(values.get("extra"), str):
                values["extra"] = json.loads(values["extra"])
            yield _parsed(json.dumps(values), where, place.root)


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
        task: Of all files; default: told from each file's fields.
        licence: Of the dataset.
    """
    folder = _json_folder(place)
    base = Root(media) if media else place.root
    names = [name for name in place.root.names(folder) if re.fullmatch(r"\d+\.json", name)]
    if not names:
        raise UserError(f"{place.name}: no single_jsons/0.json, 1.json, …")
    for name in sorted(names, key=lambda n: int(n.partition(".")[0])):
        file = f"{folder}/{name}" if folder else name
        where = place.root.path(file)
        try:
            with place.root.open(file) as opened:
                row = json.load(opened)
        except json.JSONDecodeError as error:
            yield Rejected(where, dataset, "invalid_json", str(error))
            continue
        yield _loomvideo_sample(row, where, base, dataset, task, licence)


def _loomvideo_sample(row: Any, where: str, base: Root, dataset: str, task: str, licence: str) -> Outcome:
    if not isinstance(row, dict):
        return Rejected(where, dataset, "invalid_json", "expected an object")
    found = task or next((name for name, fields in _TEMPLATES if fields <= set(row)), "")
    if not found:
        return Rejected(where, dataset, "missing_field", f"no task has the fields {', '.join(sorted(row))}")

    def path(*names: str) -> str | None:
        value = next((row[name] for name in names if row.get(name)), None)
        return base.path(value) if value else None

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
        references=[base.path(p) for p in row.get("reference_image_paths") or []],
        instruction=None if is_text_task else row.get("instruction"),
        caption=row.get("text") or row.get("caption"),
        licence=licence,
        group=source or "",
        extra={k: v for k, v in row.items() if k not in known},
    )
