"""Published sets of edited pictures with tables of their own: GPT-Image-Edit-1.5M and SEED-Data-Edit."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import Outcome, Place, Rejected, Root, build, register
from loomvideo.pipelines.sources.rows import outcomes
from loomvideo.platform.errors import UserError

_GPT_MEMBERS = ("input", "output", "metadata")
_GPT_SETS = ("hqedit", "omniedit", "ultraedit")
_SEED_PARTS = (
    "",
    "auto_editing/openimages",
    "auto_editing/unsplash",
    "SEED-Data-Edit-Part1-Openimages/auto_editing/openimages",
    "SEED-Data-Edit-Part1-Unsplash/auto_editing/unsplash",
)


def _gpt_tasks(root: Root) -> list[str]:
    """Folders with `input/`, `output/` and `metadata/`: this one, or one and two levels below, as published."""
    if all(root.is_folder(name) for name in _GPT_MEMBERS):
        return [""]
    outer = "gpt-edit/" if root.is_folder("gpt-edit") else ""
    sets = [f"{outer}{name}/" for name in _GPT_SETS if root.is_folder(f"{outer}{name}")] or [""]
    tasks = [f"{prefix}{name}" for prefix in sets for name in root.names(prefix.rstrip("/"))]
    return [task for task in tasks if all(root.is_folder(f"{task}/{name}") for name in _GPT_MEMBERS)]


def is_gpt_image_edit(place: Place) -> bool:
    """Whether a folder has the layout of GPT-Image-Edit."""
    return not place.file and bool(_gpt_tasks(place.root))


@register("gpt_image_edit", is_gpt_image_edit)
def read_gpt_image_edit(
    place: Place, *, media: str = "", dataset: str = "gpt-image-edit", licence: str = "CC-BY-4.0"
) -> Iterator[Outcome]:
    """GPT-Image-Edit-1.5M: `{hqedit,omniedit,ultraedit}/{task}/` with `input/`, `output/`, `metadata/*.json`.

    Args:
        place: The dataset's folder, that of one of its sets or tasks, or one metadata file.
        media: Folder that `input` and `output` start from; default: the one that holds `metadata/`.
        dataset: Name.
        licence: The licence of the dataset.
    """
    if place.file:
        # Rows name `input/…`, beside the folder that the file lies in.
        yield from outcomes(place, place.file, dataset, _gpt_sample, Root(media or place.root.path("..")), dataset,
                            licence)  # fmt: skip
        return
    tasks = _gpt_tasks(place.root)
    if not tasks:
        raise UserError(f"{place.name}: no folder with input/, output/ and metadata/ in it, nor below {_GPT_SETS}")
    for task in tasks:
        base = Root(media or place.root.path(task))
        for file in place.files(".json", folder=f"{task}/metadata".removeprefix("/")):
            yield from outcomes(place, file, dataset, _gpt_sample, base, dataset, licence)


def _gpt_sample(where: str, row: dict[str, Any], base: Root, dataset: str, licence: str) -> Outcome:
    missing = [name for name in ("input", "output", "instruction") if not row.get(name)]
    if missing:
        return Rejected(where, dataset, "missing_field", f"no {missing[0]}")
    source, target = (str(fields.path(row[name], name)) for name in ("input", "output"))
    kept = ("dataset_source", "task", "instruction_type", "input_description", "instruction_original")
    named = {name: row[name] for name in kept if row.get(name)}
    return build(
        where,
        dataset,
        task="image_edit",
        source=base.path(source),
        target=base.path(target),
        instruction=row["instruction"],
        licence=licence,
        # Tasks of one set share input pictures, by their names.
        group=f"{row.get('dataset_source', '')}/{PurePosixPath(source).name}",
        extra=named | ({"source_id": row["id"]} if row.get("id") else {}),
    )


def _seed_parts(root: Root) -> list[str]:
    """Folders with `annotations/` and `images/`."""
    found = [part for part in _SEED_PARTS if all(root.is_folder(_in(part, name)) for name in ("annotations", "images"))]
    return [part for part in found if any(name.endswith(".jsonl") for name in root.names(_in(part, "annotations")))]


def _in(part: str, name: str) -> str:
    return f"{part}/{name}".removeprefix("/")


@register("seed_data_edit", lambda place: not place.file and bool(_seed_parts(place.root)))
def read_seed_data_edit(
    place: Place,
    *,
    annotations: str = "annotations",
    dataset: str = "seed-data-edit",
    licence: str = "CC-BY-NC-4.0",
) -> Iterator[Outcome]:
    """SEED-Data-Edit, Part 1: `annotations/*.jsonl` of `source_image, target_image, instruction` beside `images/`.

    Parts 2 and 3 are read where their rows have the same three fields; others are rejected, naming the one they lack.

    Args:
        place: The folder of both parts, of one, or of `annotations/` and `images/`, with the archives unpacked.
        annotations: The folder of the rows: `annotations_GPT4V` has some of them in other words.
        dataset: Name.
        licence: The licence of the dataset.
    """
    parts = [] if place.file else _seed_parts(place.root)
    if not parts:
        raise UserError(f"{place.name}: no annotations/*.jsonl beside images/; unpack the archives and name the folder")
    for part in parts:
        base = Root(place.root.path(_in(part, "images")))
        files = place.files(".jsonl", folder=_in(part, annotations))
        if not files:
            raise UserError(f"{place.root.path(_in(part, annotations))}: no .jsonl; set annotations to its folder")
        for file in files:
            yield from outcomes(place, file, dataset, _seed_sample, base, dataset, licence)


def _seed_sample(where: str, row: dict[str, Any], base: Root, dataset: str, licence: str) -> Outcome:
    missing = [name for name in ("source_image", "target_image", "instruction") if not row.get(name)]
    if missing:
        return Rejected(where, dataset, "missing_field", f"no {missing[0]}")
    source, target = (str(fields.path(row[name], name)) for name in ("source_image", "target_image"))
    return build(
        where,
        dataset,
        task="image_edit",
        source=base.path(source),
        target=base.path(target),
        instruction=row["instruction"],
        licence=licence,
        group=source,
    )
