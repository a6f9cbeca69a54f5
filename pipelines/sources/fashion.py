"""How pictures and videos of garments become tasks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loomvideo.pipelines.sources.base import Outcome, Rejected, build
from loomvideo.platform.errors import UserError

CATEGORY_WORDS = {
    "dresses": "dress",
    "upper_body": "top",
    "lower_body": "bottoms",
    "tops": "top",
    "pants": "trousers",
}


@dataclass(frozen=True)
class GarmentShot:
    """What a fashion set holds of one garment on one person; absent media are None.

    Attributes:
        where: What messages call it.
        name: Unique in the dataset.
        group: SKU, person, or both joined: what must not be split.
        category: A singular noun: "dress".
        garment: Flat-lay or packshot.
        details: More pictures of the garment alone.
        on_model: Picture of a person who wears it.
        agnostic: That picture with the garment's area blanked.
        video: Video, or folder of frames, of a person who wears it.
        agnostic_video: That video with the garment's area blanked.
        caption: Words for the person or the garment.
    """

    where: str
    name: str
    group: str
    category: str = "garment"
    garment: str | None = None
    details: tuple[str, ...] = ()
    on_model: str | None = None
    agnostic: str | None = None
    video: str | None = None
    agnostic_video: str | None = None
    caption: str = ""
    split: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def _try_on_image(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.agnostic and shot.garment and shot.on_model):
        return None
    return {
        "task": "image_edit", "source": shot.agnostic, "references": [shot.garment], "target": shot.on_model,
        "instruction": f"Dress the person in the {shot.category} of the reference image.",
    }  # fmt: skip


def _wear(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.garment and shot.on_model):
        return None
    return {
        "task": "image_edit", "source": shot.garment, "target": shot.on_model,
        "instruction": f"Show this {shot.category} worn by a person.",
    }  # fmt: skip


def _flat_lay(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.garment and shot.on_model):
        return None
    return {
        "task": "image_edit", "source": shot.on_model, "target": shot.garment,
        "instruction": f"Show the {shot.category} alone as a product picture.",
    }  # fmt: skip


def _picture_with_references(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.garment and shot.on_model):
        return None
    caption = shot.caption or f"A person wearing the {shot.category} of the reference image."
    return {"task": "t2i", "references": [shot.garment, *shot.details], "target": shot.on_model, "caption": caption}


def _picture(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.on_model and shot.caption):
        return None
    return {"task": "t2i", "target": shot.on_model, "caption": shot.caption}


def _try_on_video(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.agnostic_video and shot.garment and shot.video):
        return None
    return {
        "task": "ref_edit", "source": shot.agnostic_video, "references": [shot.garment], "target": shot.video,
        "instruction": f"Dress the person in the {shot.category} of the reference image.",
    }  # fmt: skip


def _video_with_references(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.garment and shot.video):
        return None
    references = [shot.garment, *shot.details]
    caption = shot.caption or f"A person wearing the {shot.category} of the reference image."
    return {"task": "mi2v", "references": references, "target": shot.video, "caption": caption}


def _animate(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.garment and shot.on_model and shot.video):
        return None
    caption = f"The person of the second image wears the {shot.category} of the first image and moves."
    return {"task": "mi2v", "references": [shot.garment, shot.on_model], "target": shot.video, "caption": caption}


def _video(shot: GarmentShot) -> dict[str, Any] | None:
    if not (shot.video and shot.caption):
        return None
    return {"task": "t2v", "target": shot.video, "caption": shot.caption}


USES: dict[str, Callable[[GarmentShot], dict[str, Any] | None]] = {
    "try_on_image": _try_on_image,
    "wear": _wear,
    "flat_lay": _flat_lay,
    "t2i_ref": _picture_with_references,
    "t2i": _picture,
    "try_on_video": _try_on_video,
    "mi2v": _video_with_references,
    "animate": _animate,
    "t2v": _video,
}
DEFAULT_USES = ("try_on_image", "wear", "t2i_ref", "try_on_video", "mi2v")


def samples_of(shot: GarmentShot, dataset: str, licence: str, uses: Sequence[str] | None = None) -> Iterator[Outcome]:
    """A sample for each wanted use that the shot has the media for.

    Args:
        shot: What there is.
        dataset: Name.
        licence: The licence of the dataset.
        uses: Names in ``USES``; default: ``DEFAULT_USES``.

    Raises:
        UserError: for an unknown use.
    """
    for use in uses or DEFAULT_USES:
        if use not in USES:
            raise UserError(f"uses: {use!r} is none of {', '.join(USES)}")
    made = 0
    for use in uses or DEFAULT_USES:
        fields = USES[use](shot)
        if fields is not None:
            made += 1
            extra = {"use": use, "category": shot.category, "shot": shot.name} | shot.extra
            yield build(shot.where, dataset, licence=licence, group=shot.group, split=shot.split, extra=extra, **fields)
    if not made:
        have = [n for n in ("garment", "on_model", "agnostic", "video", "agnostic_video") if getattr(shot, n)]
        detail = f"{', '.join(have) or 'nothing'} is not enough for any of {', '.join(uses or DEFAULT_USES)}"
        yield Rejected(shot.where, dataset, "unpaired", detail)
