"""Fashion catalogues: DeepFashion-MultiModal, and a shop's own product feed."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import Outcome, Place, Rejected, Root, build, is_video, register
from loomvideo.pipelines.sources.fashion import GarmentShot, samples_of
from loomvideo.pipelines.sources.rows import as_list, header, outcomes, plain_name, table_files
from loomvideo.platform.errors import UserError

# labels/*.txt: one line a picture, its name and a class number for each attribute.
_FABRICS = ("denim", "cotton", "leather", "furry", "knitted", "chiffon", "other")
_PATTERNS = ("floral", "graphic", "striped", "pure color", "lattice", "other", "color block")
_LABELS = {
    "labels/texture/fabric_ann.txt": ("fabric", _FABRICS),
    "labels/fabric_ann.txt": ("fabric", _FABRICS),
    "labels/texture/pattern_ann.txt": ("pattern", _PATTERNS),
    "labels/pattern_ann.txt": ("pattern", _PATTERNS),
}
_PARTS = ("upper", "lower", "outer")
_FILE_NAME = re.compile(r"(?P<sex>WOMEN|MEN)-(?P<category>.+?)-(?P<item>id_\d+)-(?P<take>\d+)_(?P<view>.+)\.\w+$")


def _is_deepfashion(place: Place) -> bool:
    return not place.file and place.root.has("captions.json") and place.root.is_folder("images")


@register("deepfashion_mm", _is_deepfashion)
def read_deepfashion(
    place: Place,
    *,
    dataset: str = "deepfashion-multimodal",
    licence: str = "DeepFashion (non-commercial)",
    views: bool = True,
) -> Iterator[Outcome]:
    """DeepFashion-MultiModal: `images/`, `captions.json`, `labels/`; captions, and pairs of views of one item.

    Args:
        place: The dataset's folder.
        dataset: Name.
        licence: The licence of the dataset.
        views: Also make `image_edit` samples between two views of one take (front to side, back…).
    """
    root = place.root
    captions = root.json("captions.json")
    if not isinstance(captions, dict):
        raise UserError(f"{root.path('captions.json')}: expected an object of file names and captions")
    labels = _labels(root)
    takes: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name in root.names("images"):
        where = root.path(f"images/{name}")
        match = _FILE_NAME.match(name)
        if match is None:
            yield Rejected(where, dataset, "invalid_field", "name is not SEX-Category-id_NNNNNNNN-NN_view")
            continue
        # Item numbers start again in every category.
        group = f"{match['sex']}-{match['category']}-{match['item']}"
        takes[group, match["take"]].append((match["view"], where))
        if name in captions:
            extra = {"category": match["category"], "view": match["view"]} | labels.get(name, {})
            yield build(where, dataset, task="t2i", target=where, caption=captions[name], licence=licence, group=group,
                        extra=extra)  # fmt: skip
        elif not views:
            yield Rejected(where, dataset, "missing_field", "no caption")
    if views:
        for (group, _), shown in takes.items():
            yield from _view_pairs(group, shown, dataset, licence)


def _view_pairs(group: str, shown: list[tuple[str, str]], dataset: str, licence: str) -> Iterator[Outcome]:
    by_view = {re.sub(r"^\d+_", "", view): path for view, path in shown}
    front = by_view.get("front")
    for view, path in by_view.items():
        if front is None or view in ("front", "additional", "flat"):
            continue
        yield build(path, dataset, task="image_edit", source=front, target=path, licence=licence, group=group,
                    instruction=f"Show the person from the {view}.", extra={"view": view})  # fmt: skip
    if front and "flat" in by_view:
        shot = GarmentShot(front, group, group, "garment", by_view["flat"], on_model=front)
        yield from samples_of(shot, dataset, licence)


def _labels(root: Root) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for file, (name, words) in _LABELS.items():
        if not root.has(file):
            continue
        for line in root.lines(file):
            picture, *numbers = line.split()
            for part, number in zip(_PARTS, numbers, strict=False):
                if number.isdigit() and int(number) < len(words):
                    found[picture][f"{part}_{name}"] = words[int(number)]
    return found


def _is_feed(place: Place) -> bool:
    suffix = plain_name(place.file)
    if suffix.endswith(".csv"):
        head = " ".join(header(place.root, place.file)[0])
    elif suffix.endswith(".jsonl"):
        with place.root.open(place.file) as opened:
            head = opened.readline()
    else:
        return False
    return "sku" in head and ("image_paths" in head or "video_path" in head)


@register("product_feed", _is_feed)
def read_product_feed(
    place: Place,
    *,
    columns: dict[str, str] | None = None,
    media: str = "",
    dataset: str = "products",
    licence: str = "own",
    uses: list[str] | None = None,
    flat_lay: str = "first",
    separator: str = "|",
) -> Iterator[Outcome]:
    """A shop's feed: `sku, image_paths, video_path, title, attributes`, CSV, JSONL or Parquet, grouped by SKU.

    Args:
        place: The feed.
        columns: ``{sku, image_paths, video_path, title, attributes, flat_lay, split}: column`` where names differ.
        media: Folder that paths start from; default: the feed's.
        dataset: Name.
        licence: The licence of the feed.
        uses: Which tasks to make, see docs/sources.md; default: those with captions too.
        flat_lay: Which of `image_paths` shows the garment alone: `first`, `last` or `none`; a column `flat_lay` wins.
        separator: Between paths in one cell.
    """
    if flat_lay not in ("first", "last", "none"):
        raise UserError(f"source format product_feed: flat_lay={flat_lay} must be first, last or none")
    names = {n: n for n in ("sku", "image_paths", "video_path", "title", "attributes", "flat_lay", "split")}
    unknown = sorted(set(columns or {}) - set(names))
    if unknown:
        raise UserError(f"columns.{unknown[0]}: no such field of a product feed; fields: {', '.join(names)}")
    names |= columns or {}
    base = Root(media) if media else place.root
    for file in table_files(place):
        options = (names, base, dataset, licence, uses, flat_lay, separator)
        yield from outcomes(place, file, dataset, _product, *options)


def _product(
    where: str,
    row: dict[str, Any],
    names: dict[str, str],
    base: Root,
    dataset: str,
    licence: str,
    uses: Sequence[str] | None,
    flat_lay: str,
    separator: str,
) -> Iterator[Outcome]:
    cells = {field: row.get(column) for field, column in names.items()}
    sku = fields.name(cells["sku"], "sku")
    if not sku:
        yield Rejected(where, dataset, "missing_field", "no sku")
        return
    attributes = fields.mapping(cells["attributes"], "attributes")
    pictures = [base.path(p) for p in as_list(cells["image_paths"], separator) if not is_video(p)]
    flat, clip = (fields.path(cells[name], name) for name in ("flat_lay", "video_path"))
    garment = base.path(flat) if flat else None
    if garment is None and pictures and flat_lay != "none":
        garment = pictures.pop(0 if flat_lay == "first" else -1)
    video = base.path(clip) if clip else None
    title = fields.text(cells["title"], "title") or ""
    category = str(attributes.get("category") or attributes.get("type") or "garment")
    extra = {"sku": sku, "title": title, "attributes": attributes}
    wanted = uses or ("wear", "t2i_ref", "t2i", "mi2v", "animate", "t2v")
    if not (pictures or video):
        detail = "a product needs a picture on a model or a video beside its flat-lay"
        yield Rejected(where, dataset, "unpaired", detail)
        return
    for number, picture in enumerate(pictures or [None]):
        shot = GarmentShot(
            where, f"{sku}-{number}", sku, category, garment, on_model=picture, video=video if number == 0 else None,
            caption=title, split=cells["split"], extra=extra,
        )  # fmt: skip
        yield from samples_of(shot, dataset, licence, wanted)
