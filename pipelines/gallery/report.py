"""``report.html`` and the folder ``report/`` beside it: what a dataset is, what was lost, and a gallery of its rows.

The page itself has the same size for any number of rows; :mod:`~loomvideo.pipelines.gallery.parts` says what it loads
as it is looked at.
"""

import html
import json
import os
import re
import time
from collections.abc import Collection, Sequence
from importlib import resources
from typing import Any

from loomvideo.pipelines.gallery.overview import overview
from loomvideo.pipelines.gallery.parts import FOLDER, PART_NAME, GalleryWriter, read_rows, sampled, write_part
from loomvideo.pipelines.gallery.previews import Previews, Strip, encoded_strips, report_codec, roles
from loomvideo.pipelines.gallery.rows import gallery_rows, has_plan
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.media.media_info import DecodeError
from loomvideo.pipelines.prepare.curation.options import REASONS
from loomvideo.pipelines.prepare.job import CONFIG_FILE
from loomvideo.pipelines.prepare.quarantine import saved_config
from loomvideo.pipelines.prepare.reasons import MEANINGS
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.time_limits import REPORT_STRIP

REPORT_FILE = "report.html"
# A strip of a large file takes a second or more: `prepare` must not end minutes later than its shards.
STRIPS_OF_PREPARE = 48
STRIP_SECONDS = 60.0


def write_report(dataset: ShardDataset, num_strips: int = STRIPS_OF_PREPARE, seconds: float = STRIP_SECONDS) -> str:
    """Write the report into the dataset folder; returns the page's path or URL.

    Args:
        dataset: A finished dataset.
        num_strips: Samples of which strips of frames are made, spread over outcomes, reasons and tasks.
        seconds: No strip is begun after so many.
    """
    storage = dataset.storage
    # Written last: a page that is there has all its parts.
    storage.delete(REPORT_FILE)
    writer = GalleryWriter(storage)
    writer.add_all(gallery_rows(dataset))
    facts = writer.finish()
    base, known = media_base(storage), MEANINGS | REASONS
    strips = _write_strips(dataset, base, sampled(writer.codes(), num_strips), seconds)
    facts |= {
        "digest": dataset.digest[:16],
        "base": _reached_from(storage, base),
        "strips": len(strips),
        "texts": has_plan(storage) or not len(dataset),
        "meanings": {reason: known[reason] for reason, _ in facts["facets"]["reason"] if reason in known},
    }
    write_part(storage, "strips", json.dumps(strips, separators=(",", ":")).encode())
    made = {_strip_name(row, role) for row, known in strips.items() for role in known}
    _delete_parts(storage, {*writer.files, "strips.js", *made})
    storage.write_bytes(REPORT_FILE, page(storage.url, overview(dataset), facts).encode())
    return f"{storage.url}/{REPORT_FILE}"


def is_current(dataset: ShardDataset) -> bool:
    """Whether the folder has a report of the dataset as it is."""
    storage = dataset.storage
    return (
        storage.exists(REPORT_FILE) and f'"digest":"{dataset.digest[:16]}"' in storage.read_bytes(REPORT_FILE).decode()
    )


def remove_report(storage: Storage) -> None:
    """Delete the page and its parts: they name, and show, samples that may be taken down."""
    storage.delete(REPORT_FILE)
    _delete_parts(storage, ())


def _delete_parts(storage: Storage, kept: Collection[str]) -> None:
    for name in storage.names(FOLDER):
        if PART_NAME.fullmatch(name) and name not in kept:
            storage.delete(f"{FOLDER}/{name}")


def _strip_name(row: int | str, role: str) -> str:
    return f"strip-{row}-{role}.jpg"


def media_base(storage: Storage) -> str:
    """Folder or URL that the dataset's relative media paths start at; empty where that is not known."""
    return base_folder(saved_config(storage.url).input) if storage.exists(CONFIG_FILE) else ""


def _reached_from(storage: Storage, base: str) -> str | None:
    """That folder as a browser reaches it from the page; None where it does not."""
    if base.startswith(("http:", "https:")):
        return base
    if not base or "://" in base or not storage.is_local:
        return None
    return os.path.relpath(base, storage.root)


def _write_strips(dataset: ShardDataset, base: str, rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Strips of some rows, and ``{row: {role: [frames, width, height] or why there is none}}``."""
    found: dict[str, Any] = {}
    if not rows:
        return found
    storage, codec, until = dataset.storage, report_codec(dataset), time.monotonic() + seconds
    previews = Previews(base, REPORT_STRIP.here())

    def keep(number: int, role: str, strip: Strip) -> None:
        storage.write_bytes(f"{FOLDER}/{_strip_name(number, role)}", strip.jpeg)
        found[str(number)][role] = [strip.frames, strip.width, strip.height]

    try:
        for number, row in read_rows(storage, rows):
            if time.monotonic() > until:
                break
            found[str(number)] = {}
            for role, path in roles(row).items():
                try:
                    keep(number, role, previews.strip(path))
                except DecodeError as error:
                    found[str(number)][role] = error.reason
            if codec is not None and number < len(dataset):
                for role, strip in encoded_strips(dataset, number, codec):
                    keep(number, role, strip)
    finally:
        previews.close()
    return found


def page(title: str, overview: str, facts: dict[str, Any]) -> str:
    """The page.

    Args:
        title: Its title.
        overview: HTML of the sections on the dataset as a whole.
        facts: What the gallery must know at first, see :meth:`GalleryWriter.finish`.
    """
    values = {
        "title": html.escape(title),
        "overview": overview,
        # No text in it may end the script element that holds it.
        "facts": json.dumps(facts, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = resources.files("loomvideo.pipelines.gallery").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match.group(1)], template)
