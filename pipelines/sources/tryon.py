"""Try-on sets in their own layouts: VITON-HD, DressCode, ViViD, VVT, Eevee."""

import posixpath
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from loomvideo.pipelines.media.fragments import Fragment, with_fragment
from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import Components, Outcome, Place, Rejected, Root, register
from loomvideo.pipelines.sources.fashion import CATEGORY_WORDS, GarmentShot, samples_of
from loomvideo.pipelines.sources.rows import outcomes, rows
from loomvideo.platform.errors import UserError

BODY_PARTS = ("dresses", "upper_body", "lower_body")


def _existing(root: Root, *candidates: str) -> str | None:
    """Path of the first file or folder that exists."""
    return next((root.path(c) for c in candidates if root.has(c)), None)


def _pairs(root: Root, file: str) -> list[tuple[str, list[str]]]:
    return [(f"{root.path(file)}:{n}", line.split()) for n, line in enumerate(root.lines(file), 1)]


def _is_viton(place: Place) -> bool:
    return not place.file and any(place.root.is_folder(f"{s}/cloth") for s in ("train", "test"))


@register("viton_hd", _is_viton)
def read_viton_hd(
    place: Place,
    *,
    uses: list[str] | None = None,
    dataset: str = "viton-hd",
    licence: str = "CC-BY-NC-4.0",
    category: str = "top",
) -> Iterator[Outcome]:
    """VITON-HD: `{train,test}/{image,cloth,agnostic-v3.2}` and `{train,test}_pairs.txt`.

    The test list pairs a person with another garment, of which no picture exists; the garment of the same name is
    taken, and the listed one kept in `extra.unpaired_garment`.

    Args:
        place: The dataset's folder.
        uses: Which tasks to make, see docs/sources.md.
        dataset: Name.
        licence: The licence of the dataset.
        category: Word for the garments.
    """
    root = place.root
    for part, split in (("train", "train"), ("test", "heldout")):
        listing = f"{part}_pairs.txt"
        if not root.has(listing):
            continue
        for where, words in _pairs(root, listing):
            if len(words) != 2:
                yield Rejected(where, dataset, "invalid_field", "expected `person.jpg garment.jpg`")
                continue
            image, listed = words
            person, garment = f"{part}/image/{image}", f"{part}/cloth/{image}"
            missing = next((path for path in (person, garment) if not root.has(path)), None)
            if missing:
                yield Rejected(where, dataset, "missing_media", f"no {missing}")
                continue
            stem = PurePosixPath(image).stem
            agnostic = _existing(root, f"{part}/agnostic-v3.2/{image}", f"{part}/agnostic-v3.2/{stem}.png")
            extra = {"unpaired_garment": root.path(f"{part}/cloth/{listed}")} if listed != image else {}
            shot = GarmentShot(where, f"{part}/{stem}", stem.partition("_")[0], category, root.path(garment), (),
                               root.path(person), agnostic, split=split, extra=extra)  # fmt: skip
            yield from samples_of(shot, dataset, licence, uses)


def _is_dresscode(place: Place) -> bool:
    return not place.file and any(
        place.root.is_folder(f"{p}/images") and place.root.has(f"{p}/train_pairs.txt") for p in BODY_PARTS
    )


@register("dresscode", _is_dresscode)
def read_dresscode(
    place: Place,
    *,
    uses: list[str] | None = None,
    dataset: str = "dresscode",
    licence: str = "DressCode (no private companies)",
) -> Iterator[Outcome]:
    """DressCode: `{dresses,upper_body,lower_body}/images/*_0.jpg` (model) and `*_1.jpg` (garment), pair lists.

    Args:
        place: The dataset's folder.
        uses: Which tasks to make, see docs/sources.md.
        dataset: Name.
        licence: The licence of the dataset.
    """
    root = place.root
    for part in BODY_PARTS:
        for listing, split in (("train_pairs.txt", "train"), ("test_pairs_paired.txt", "heldout")):
            if not root.has(f"{part}/{listing}"):
                continue
            for where, words in _pairs(root, f"{part}/{listing}"):
                if len(words) != 2:
                    yield Rejected(where, dataset, "invalid_field", "expected `model_0.jpg garment_1.jpg`")
                    continue
                model, garment = (f"{part}/images/{name}" for name in words)
                missing = next((path for path in (model, garment) if not root.has(path)), None)
                if missing:
                    yield Rejected(where, dataset, "missing_media", f"no {missing}")
                    continue
                number = PurePosixPath(words[0]).stem.rpartition("_")[0]
                word = CATEGORY_WORDS[part]
                shot = GarmentShot(where, f"{part}/{number}", number, word, root.path(garment), (), root.path(model),
                                   split=split)  # fmt: skip
                yield from samples_of(shot, dataset, licence, uses)


def _is_vivid(place: Place) -> bool:
    root = place.root
    if place.file:
        return False
    flat = root.is_folder("cloth") and root.is_folder("videos")
    return flat or any(root.is_folder(f"{p}/videos") and root.is_folder(f"{p}/images") for p in BODY_PARTS)


@register("vivid", _is_vivid)
def read_vivid(
    place: Place,
    *,
    uses: list[str] | None = None,
    dataset: str = "vivid",
    licence: str = "research",
    listing: str = "",
    front_only: bool = False,
) -> Iterator[Outcome]:
    """ViViD in both layouts: flat `videos/ cloth/ agnostic/`, or `{dresses,…}/{videos,images}` with a JSONL.

    Args:
        place: The dataset's folder.
        uses: Which tasks to make, see docs/sources.md.
        dataset: Name.
        licence: The licence of the dataset.
        listing: JSONL with `video, image, front_seqs, subdir`; default: all in the folder, else equal names.
        front_only: Cut videos to the frames that show the front, where the JSONL says which.
    """
    root = place.root
    if root.is_folder("cloth") and root.is_folder("videos"):
        yield from _vivid_flat(root, uses, dataset, licence)
        return
    listings = [listing] if listing else [n for n in root.names() if n.endswith(".jsonl")]
    if not listings:
        for part in BODY_PARTS:
            yield from _vivid_by_name(root, part, uses, dataset, licence)
    for file in listings:
        split = "heldout" if "test" in file else None
        yield from outcomes(place, file, dataset, _vivid_row, root, split, front_only, uses, dataset, licence)


def _vivid_row(
    where: str,
    row: dict[str, Any],
    root: Root,
    split: str | None,
    front_only: bool,
    uses: Sequence[str] | None,
    dataset: str,
    licence: str,
) -> Iterator[Outcome]:
    part, video, image = (fields.path(row.get(name), name) for name in ("subdir", "video", "image"))
    if not (part and video and image):
        yield Rejected(where, dataset, "missing_field", "needs video, image and subdir")
        return
    span = _front_span(row.get("front_seqs"))
    extra = {"front_frames": span} if span else {}
    fragment = Fragment(frames=(span[0], span[1])) if span and front_only else None
    yield from _vivid_shot(root, where, part, video, image, fragment, split, extra, uses, dataset, licence)


def _front_span(value: Any) -> list[int] | None:
    """The longest of the published `[[first, end], …]`; one `[first, end]` is taken as well."""
    if not value:
        return None
    spans = value if isinstance(value[0], (list, tuple)) else [value]
    first, end = max(((int(span[0]), int(span[1])) for span in spans), key=lambda span: span[1] - span[0])
    if end <= first:
        raise fields.FieldError("front_seqs", f"[{first}, {end}] holds no frame")
    return [first, end]


def _vivid_shot(
    root: Root,
    where: str,
    part: str,
    video: str,
    image: str,
    fragment: Fragment | None,
    split: str | None,
    extra: dict,
    uses: Sequence[str] | None,
    dataset: str,
    licence: str,
) -> Iterator[Outcome]:
    paths = [f"{part}/videos/{video}", f"{part}/images/{image}"]
    missing = next((path for path in paths if not root.has(path)), None)
    if missing:
        yield Rejected(where, dataset, "missing_media", f"no {missing}")
        return
    shown, agnostic = root.path(paths[0]), _existing(root, f"{part}/agnostic/{video}")
    if fragment:
        shown = with_fragment(shown, fragment)
        agnostic = with_fragment(agnostic, fragment) if agnostic else None
    stem = PurePosixPath(video).stem
    mask = _existing(root, f"{part}/agnostic_mask_smoothed/{video}", f"{part}/agnostic_mask/{video}")
    shot = GarmentShot(where, f"{part}/{stem}", stem.partition("_")[0], CATEGORY_WORDS.get(part, "garment"),
                       root.path(paths[1]), video=shown, agnostic_video=agnostic, split=split,
                       extra=extra | ({"mask": mask} if mask else {}))  # fmt: skip
    yield from samples_of(shot, dataset, licence, uses)


def _vivid_by_name(root: Root, part: str, uses: Sequence[str] | None, dataset: str, licence: str) -> Iterator[Outcome]:
    # A video `x_detail.mp4` or `x.mp4` shows the garment of the picture whose name starts with x.
    images = {PurePosixPath(n).stem.partition("_")[0]: n for n in reversed(root.names(f"{part}/images"))}
    for video in root.names(f"{part}/videos"):
        where = root.path(f"{part}/videos/{video}")
        image = images.get(PurePosixPath(video).stem.partition("_")[0])
        if image is None:
            yield Rejected(where, dataset, "unpaired", f"no picture of its name in {part}/images")
            continue
        yield from _vivid_shot(root, where, part, video, image, None, None, {}, uses, dataset, licence)


def _vivid_flat(root: Root, uses: Sequence[str] | None, dataset: str, licence: str) -> Iterator[Outcome]:
    cloths = {PurePosixPath(name).stem.removeprefix("cloth"): name for name in root.names("cloth")}
    for video in root.names("videos"):
        where = root.path(f"videos/{video}")
        stem = PurePosixPath(video).stem
        number = stem.removeprefix("video")
        if number not in cloths:
            yield Rejected(where, dataset, "unpaired", f"no cloth/cloth{number}.*")
            continue
        mask = _existing(root, f"agnostic_mask/{video}")
        shot = GarmentShot(where, stem, stem, "garment", root.path("cloth", cloths[number]), video=where,
                           agnostic_video=_existing(root, f"agnostic/{video}"),
                           extra={"mask": mask} if mask else {})  # fmt: skip
        yield from samples_of(shot, dataset, licence, uses)


def _is_vvt(place: Place) -> bool:
    return not place.file and place.root.is_folder("lip_clothes_person")


@register("vvt", _is_vvt)
def read_vvt(
    place: Place,
    *,
    uses: list[str] | None = None,
    dataset: str = "vvt",
    licence: str = "research",
) -> Iterator[Outcome]:
    """VVT: folders of frames `{train,test}_frames/PERSON/*.png`, garments in `lip_clothes_person/PERSON/`.

    A person and the garments that the test list shows on them form one group.

    Args:
        place: The dataset's folder.
        uses: Which tasks to make, see docs/sources.md.
        dataset: Name.
        licence: The licence of the dataset.
    """
    root = place.root
    groups = Components()
    listing = "test_person_clothes_pose_tuple.txt"
    unpaired: dict[str, str] = {}
    for where, words in _pairs(root, listing) if root.has(listing) else []:
        if len(words) < 2:
            yield Rejected(where, dataset, "invalid_field", "expected `person clothes pose`")
            continue
        groups.join(words[0], words[1])
        if words[0] != words[1]:
            unpaired[words[0]] = words[1]
    for part, split in (("train", "train"), ("test", "heldout")):
        for person in root.names(f"{part}_frames"):
            where = root.path(f"{part}_frames/{person}")
            pictures = root.names(f"lip_clothes_person/{person}")
            garment = next((n for n in pictures if PurePosixPath(n).stem.endswith("cloth_front")), None)
            if garment is None:
                yield Rejected(where, dataset, "unpaired", f"no lip_clothes_person/{person}/*cloth_front.jpg")
                continue
            mask = _existing(root, f"{part}_agn_mask_new/{person}")
            extra = ({"mask": mask} if mask else {}) | (
                {"unpaired_garment": unpaired[person]} if person in unpaired else {}
            )
            shot = GarmentShot(where, person, groups.find(person), "top",
                               root.path(f"lip_clothes_person/{person}/{garment}"), video=where, split=split,
                               extra=extra)  # fmt: skip
            yield from samples_of(shot, dataset, licence, uses)


def _is_eevee(place: Place) -> bool:
    if place.file:
        return False
    root = place.root
    for part in BODY_PARTS:
        item = next((n for n in root.names(part) if root.is_folder(f"{part}/{n}")), None)
        if item and any(root.has(f"{part}/{item}/{n}") for n in ("garment.png", "in.png")):
            return True
    return False


@register("eevee", _is_eevee)
def read_eevee(
    place: Place,
    *,
    uses: list[str] | None = None,
    dataset: str = "eevee",
    licence: str = "research",
    shots: str = "all",
) -> Iterator[Outcome]:
    """Eevee: `{dresses,lower_body,upper_body}/00030/` with garment pictures, person, two videos (full, close-up).

    Args:
        place: The dataset's folder.
        uses: Which tasks to make, see docs/sources.md.
        dataset: Name.
        licence: The licence of the dataset.
        shots: `all`, `full` (video_0) or `close` (video_1).
    """
    numbers = {"all": (0, 1), "full": (0,), "close": (1,)}.get(shots)
    if numbers is None:
        raise UserError(f"source format eevee: shots={shots} must be all, full or close")
    root = place.root
    splits = {}
    for name in root.names():
        if name.endswith(("_train.csv", "_test.csv")):
            for entry in rows(place, name, dataset):
                if not isinstance(entry, Rejected):
                    person = posixpath.basename(str(entry[1].get("Person", "")).rstrip("/"))
                    splits[person] = "train" if name.endswith("_train.csv") else "heldout"
    for part in BODY_PARTS:
        for item in (n for n in root.names(part) if root.is_folder(f"{part}/{n}")):
            folder = f"{part}/{item}"
            # The published loader and the published files use different names.
            garment = _existing(root, f"{folder}/garment.png", f"{folder}/in.png", f"{folder}/garment.jpg")
            caption = next((n for n in ("garment_caption.txt", "caption.txt") if root.has(f"{folder}/{n}")), None)
            words = " ".join(root.lines(f"{folder}/{caption}")) if caption else ""
            detail = _existing(root, f"{folder}/garment_detail.png")
            for number in numbers:
                video = _existing(root, f"{folder}/video_{number}.mp4")
                if video is None and number == 1:
                    continue
                mask = _existing(root, f"{folder}/video_{number}_mask.mp4",
                                 f"{folder}/video_{number}_agnostic_mask.mp4")  # fmt: skip
                shot = GarmentShot(
                    root.path(folder), f"{folder}/video_{number}", item, CATEGORY_WORDS[part], garment,
                    (detail,) if detail else (),
                    _existing(root, f"{folder}/person.png") if number == numbers[0] else None,
                    _existing(root, f"{folder}/person_agnostic.png") if number == numbers[0] else None,
                    video, _existing(root, f"{folder}/video_{number}_agnostic.mp4"), split=splits.get(item),
                    extra={"garment_caption": words} | ({"mask": mask} if mask else {}),
                )  # fmt: skip
                yield from samples_of(shot, dataset, licence, uses)
