"""Published editing sets: KIWI-Edit and RefVIE, Ditto-1M, OpenVE-3M, InsViE-1M."""

from collections.abc import Iterator
from typing import Any

from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import Outcome, Place, Rejected, Root, build, register
from loomvideo.pipelines.sources.rows import as_list, header, outcomes, rows
from loomvideo.pipelines.sources.tables import Extractor, default_extract_folder, embedded_bytes, read_table
from loomvideo.platform.errors import UserError

_KIWI_FOLDERS = ("image_edit_metadata", "video_edit_metadata", "refvie_477k")


def _kiwi_files(place: Place) -> list[str]:
    if place.file:
        return [place.file]
    nested = [f for folder in _KIWI_FOLDERS for f in place.files(".csv", ".parquet", folder=folder)]
    return nested or place.files(".csv", ".parquet")


def _is_kiwi(place: Place) -> bool:
    return not place.file and any(place.root.is_folder(folder) for folder in _KIWI_FOLDERS)


@register("kiwi", _is_kiwi)
def read_kiwi(
    place: Place, *, media: str = "", dataset: str = "kiwi-edit", licence: str = "", extract: str = ""
) -> Iterator[Outcome]:
    """KIWI-Edit: `image_edit_metadata/` and `video_edit_metadata/` CSV, RefVIE parquet with image bytes.

    Args:
        place: The folder with the metadata folders, or one CSV or parquet file.
        media: Folder that `src_video` and `tgt_video` start from; default: the dataset's folder.
        dataset: Name.
        licence: The licence of the dataset: the sets it is made of have several.
        extract: Folder or URL for the reference pictures of RefVIE.
    """
    base = Root(media) if media else place.root
    extractor = Extractor(extract or default_extract_folder(dataset))
    files = _kiwi_files(place)
    if not files:
        raise UserError(f"{place.name}: no CSV or parquet in {', '.join(_KIWI_FOLDERS)}")
    for file in files:
        yield from outcomes(place, file, dataset, _kiwi_sample, base, dataset, licence, extractor)


def _kiwi_sample(
    where: str, row: dict[str, Any], base: Root, dataset: str, licence: str, extractor: Extractor
) -> Outcome:
    for name in ("src_video", "tgt_video", "prompt"):
        if not row.get(name):
            return Rejected(where, dataset, "missing_field", f"no {name}")
    source, target = (str(fields.path(row[name], name)) for name in ("src_video", "tgt_video"))
    references = [base.path(path) for path in as_list(row.get("ref_image"))]
    pictures = row.get("ref_image_bytes")
    for picture in pictures if isinstance(pictures, list) else [pictures]:
        content = embedded_bytes(picture)
        if content:
            references.append(extractor.write(content))
    return build(
        where,
        dataset,
        source=base.path(source),
        target=base.path(target),
        references=references,
        instruction=row["prompt"],
        licence=licence,
        group=source,
        extra={"iid": row["iid"]} if row.get("iid") is not None else {},
    )


def _is_ditto(place: Place) -> bool:
    return not place.file and (place.root.is_folder("source_video_captions") or place.root.is_folder("videos/source"))


@register("ditto", _is_ditto)
def read_ditto(
    place: Place, *, media: str = "", dataset: str = "ditto-1m", licence: str = "CC-BY-NC-SA-4.0"
) -> Iterator[Outcome]:
    """Ditto-1M: JSON lists of `source_path, edited_path, instruction`, 20 fps videos below `videos/`.

    Args:
        place: The dataset's folder, or one of its training JSON files.
        media: Folder that paths start from; default: `videos/` of the dataset's folder where there is one.
        dataset: Name.
        licence: The licence of the dataset.
    """
    videos = place.root.path("videos") if place.root.is_folder("videos") else place.root.path()
    base = Root(media or videos)
    captions = _ditto_captions(place)
    folders = ["", *[n for n in place.root.names() if place.root.is_folder(n) and n.startswith("training")]]
    files = [place.file] if place.file else [f for folder in folders for f in place.files(".json", folder=folder)]
    if not files:
        raise UserError(f"{place.name}: no training JSON; name the file itself")
    for file in files:
        yield from outcomes(place, file, dataset, _ditto_sample, base, dataset, licence, captions)


def _ditto_sample(
    where: str, row: dict[str, Any], base: Root, dataset: str, licence: str, captions: dict[str, str]
) -> Outcome:
    missing = [n for n in ("source_path", "edited_path", "instruction") if not row.get(n)]
    if missing:
        return Rejected(where, dataset, "missing_field", f"no {missing[0]}")
    source, target = (str(fields.path(row[n], n)) for n in ("source_path", "edited_path"))
    return build(
        where,
        dataset,
        task="video_edit",
        source=base.path(source.removeprefix("videos/")),
        target=base.path(target.removeprefix("videos/")),
        instruction=row["instruction"],
        licence=licence,
        group=source,
        extra={"source_caption": row.get("source_caption") or captions.get(source, "")},
    )


def _ditto_captions(place: Place) -> dict[str, str]:
    if place.file:
        return {}
    captions = {}
    for file in place.files(".json", folder="source_video_captions"):
        for entry in rows(place, file, "ditto-1m"):
            if not isinstance(entry, Rejected) and entry[1].get("path"):
                captions[str(entry[1]["path"])] = str(entry[1].get("caption", ""))
    return captions


@register("openve", lambda place: False)
def read_openve(
    place: Place,
    *,
    columns: dict[str, Any] | None = None,
    media: str = "",
    dataset: str = "openve-3m",
    licence: str = "CC-BY-NC-4.0",
) -> Iterator[Outcome]:
    """OpenVE-3M style CSV, one file a category; its column names are not published, so map those that are not found.

    Args:
        place: A CSV, or the folder of the categories' CSV files.
        columns: ``source``, ``target`` and ``instruction`` where the usual names do not occur.
        media: Folder that paths start from.
        dataset: Name.
        licence: The licence of the dataset.
    """
    yield from read_table(place, columns=columns, media=media, dataset=dataset, task="video_edit", licence=licence)


@register("insvie", lambda place: False)
def read_insvie(
    place: Place, *, source: str = "", target: str = "", dataset: str = "insvie-1m", licence: str = "unknown"
) -> Iterator[Outcome]:
    """InsViE-1M: a CSV of video name, source caption, instruction, edit caption; the name in two folders, to be given.

    Its columns are taken by their place, as its own training code does, which also takes the folders from outside.

    Args:
        place: The CSV, or the folder with it.
        source: Folder of the unpacked source videos, from the CSV's folder.
        target: The same of the edited videos.
        dataset: Name.
        licence: The licence of the dataset.
    """
    for name, folder in (("source", source), ("target", target)):
        if not folder:
            raise UserError(
                f"source format insvie: set source_options.{name} to the folder that the {name} videos were unpacked to"
            )
    for file in place.files(".csv"):
        columns = header(place.root, file)[0]
        if len(columns) < _INSVIE_COLUMNS:
            raise UserError(f"{place.root.path(file)}: {len(columns)} columns; expected name, caption, instruction, …")
        yield from outcomes(place, file, dataset, _insvie_sample, columns, place.root, source, target, dataset,
                            licence)  # fmt: skip


_INSVIE_COLUMNS = 3


def _insvie_sample(
    where: str, row: dict[str, Any], columns: list[str], root: Root, source: str, target: str, dataset: str,
    licence: str,
) -> Outcome:  # fmt: skip
    name, caption, instruction, *rest = (row.get(column) for column in columns)
    if not name:
        return Rejected(where, dataset, "missing_field", f"no {columns[0]}")
    video = str(fields.path(name, columns[0]))
    told = {"source_caption": caption, "edit_caption": rest[0] if rest else None}
    return build(
        where,
        dataset,
        task="video_edit",
        source=root.path(source, video),
        target=root.path(target, video),
        instruction=instruction,
        licence=licence,
        group=video,
        extra={field: text for field, text in told.items() if text},
    )
