"""Plain folders and archives without a table: pairs by name, WebDataset tars, and X2Edit's among them."""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath

from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Outcome,
    Place,
    Rejected,
    Root,
    build,
    register,
)
from loomvideo.pipelines.sources.fields import FieldError
from loomvideo.pipelines.sources.image_edits import is_gpt_image_edit
from loomvideo.pipelines.sources.tables import Extractor, default_extract_folder
from loomvideo.platform.errors import UserError

PAIR_WORDS = (("src", "tgt"), ("source", "target"), ("before", "after"), ("input", "output"), ("original", "edited"))
_MEDIA = VIDEO_SUFFIXES | IMAGE_SUFFIXES


def _role(stem: str) -> tuple[str, str] | None:
    """``(name, source or target)`` of a stem that ends in a pair's word."""
    for words in PAIR_WORDS:
        for word, role in zip(words, ("source", "target"), strict=True):
            for separator in "_-. ":
                if stem.lower().endswith(f"{separator}{word}") and len(stem) > len(word) + 1:
                    return stem[: -len(word) - 1], role
    return None


def _by_name(root: Root) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Sources and targets below a folder by their common name, and media that belong to no pair."""
    pairs: dict[str, dict[str, str]] = {}
    left = []
    folders = {name.lower(): name for name in root.names() if root.is_folder(name)}
    for source, target in PAIR_WORDS:
        if source in folders and target in folders:
            for role, folder in (("source", folders[source]), ("target", folders[target])):
                for name in root.names(folder):
                    if PurePosixPath(name).suffix.lower() in _MEDIA:
                        pairs.setdefault(PurePosixPath(name).stem, {})[role] = f"{folder}/{name}"
            return pairs, left
    for name in root.names():
        if PurePosixPath(name).suffix.lower() not in _MEDIA:
            continue
        found = _role(PurePosixPath(name).stem)
        if found is None:
            left.append(name)
        else:
            pairs.setdefault(found[0], {})[found[1]] = name
    return pairs, left


def _has_pairs(place: Place) -> bool:
    return (
        not place.file
        and not is_gpt_image_edit(place)
        and any(len(pair) == 2 for pair in _by_name(place.root)[0].values())
    )


@register("pairs", _has_pairs)
def read_pairs(
    place: Place, *, dataset: str = "pairs", licence: str = "", instruction: str = "", task: str = ""
) -> Iterator[Outcome]:
    """Pairs by name: `a_src.mp4` and `a_tgt.mp4` with `a.txt`, or equal names in `source/` and `target/`.

    Also `_source _target`, `_before _after`, `_input _output`, `_original _edited`.

    Args:
        place: The folder.
        dataset: Name.
        licence: The licence of all pairs.
        instruction: The instruction of pairs without a text file of their own.
        task: The task of all pairs; default: told from the target.
    """
    root = place.root
    pairs, left = _by_name(root)
    for name in left:
        yield Rejected(root.path(name), dataset, "unpaired", "its name ends in none of the words of a pair")
    for name, pair in sorted(pairs.items()):
        if len(pair) < 2:
            (there,) = pair.values()
            yield Rejected(root.path(there), dataset, "unpaired", f"no {'target' if 'source' in pair else 'source'}")
            continue
        text = " ".join(root.lines(f"{name}.txt")) if root.has(f"{name}.txt") else instruction
        yield build(root.path(name), dataset, task=task, source=root.path(pair["source"]),
                    target=root.path(pair["target"]), instruction=text, licence=licence, group=name)  # fmt: skip


def _is_webdataset(place: Place) -> bool:
    return bool(_tars(place)) and not place.root.has("index.parquet") and not _is_x2edit(place)


def _tars(place: Place) -> list[str]:
    return [name for name in place.files(".tar") if name.endswith(".tar")]


@register("webdataset", _is_webdataset)
def read_webdataset(
    place: Place, *, dataset: str = "webdataset", licence: str = "", extract: str = "", text: str = "caption"
) -> Iterator[Outcome]:
    """WebDataset tars: neighbouring members of one name: a picture or video, its `.txt` or `.json`; pairs by word.

    Args:
        place: A tar, or a folder of tars.
        dataset: Name.
        licence: The licence of the dataset.
        extract: Folder or URL for the media; workers that decode must reach it.
        text: Field of the `.json` that holds the caption; instructions are in `instruction` or `edit_prompt`.
    """
    extractor = Extractor(extract or default_extract_folder(dataset))
    for group in _all_groups(place, dataset):
        yield group if isinstance(group, Rejected) else _member_sample(*group, dataset, licence, text, extractor)


def _all_groups(place: Place, dataset: str) -> Iterator[tuple[str, str, dict[str, bytes]] | Rejected]:
    """``(where, name, members)`` of every group of every tar; a tar that is damaged costs what follows in it."""
    files = [place.file] if place.file else _tars(place)
    if not files:
        raise UserError(f"{place.name}: no .tar")
    for file in files:
        where = place.root.path(file)
        try:
            with place.root.open(file, "rb") as opened, tarfile.open(fileobj=opened, mode="r|*") as archive:
                for name, members in _groups(archive):
                    yield f"{where}:{name}", name, members
        except (tarfile.TarError, EOFError, zlib.error) as error:
            yield Rejected(where, dataset, "unreadable_table", str(error) or type(error).__name__)


def _groups(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Members with one name up to the first dot, which stand together, by what follows it."""
    current, members = "", {}
    for member in archive:
        if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        name = f"{folder}/{stem}" if folder else stem
        if name != current and members:
            yield current, members
            members = {}
        current = name
        opened = archive.extractfile(member)
        members[ending.lower()] = opened.read() if opened else b""
    if members:
        yield current, members


def _member_sample(
    where: str, name: str, members: dict[str, bytes], dataset: str, licence: str, text: str, extractor: Extractor
) -> Outcome:
    media = {ending: content for ending, content in members.items() if f".{ending.rpartition('.')[2]}" in _MEDIA}
    try:
        stated = fields.mapping(members.get("json", b"{}").decode("utf-8", "surrogateescape"), "json")
        words = members.get("txt") or members.get("caption") or members.get("cap") or b""
        caption = words.decode("utf-8", "surrogateescape") or stated.get(text) or stated.get("text")
        placed = {ending: extractor.write(content, f"x.{ending}") for ending, content in media.items()}
    except FieldError as error:
        return Rejected(where, dataset, error.reason, str(error))
    roles = {}
    for ending, path in placed.items():
        found = _role(f"x.{ending.rpartition('.')[0]}")
        roles[found[1] if found else "target"] = path
    if len(media) != len(roles):
        detail = f"{len(media)} pictures or videos ({', '.join(media)}); which is the target?"
        return Rejected(where, dataset, "unpaired" if media else "missing_media", detail)
    if "target" not in roles:
        return Rejected(where, dataset, "missing_media", "no picture or video")
    instruction = stated.get("instruction") or stated.get("edit_prompt")
    if "source" in roles and not instruction:
        instruction, caption = caption, None
    plain = {k: v for k, v in stated.items() if isinstance(v, (str, int, float, bool)) and k not in (text, "text")}
    return build(where, dataset, source=roles.get("source"), target=roles["target"], instruction=instruction,
                 caption=caption, licence=licence, group=name, extra=plain | {"source_id": name})  # fmt: skip


# What X2Edit's own loader takes for source, target and instruction, first come first.
_X2EDIT_PAIRS = (("1.0.jpg", "2.jpg"), ("1.jpg", "2.jpg"), ("jpg", "png"))
_X2EDIT_TEXTS = ("instruction", "instruction_en", "caption_en", "instruction_zh", "style_zh")
_X2EDIT_HEAD = 6


def _is_x2edit(place: Place) -> bool:
    """Whether the first samples of the first tar are pictures ``1.0.jpg`` and ``2.jpg`` of one name."""
    tars = _tars(place)
    if not tars:
        return False
    try:
        with place.root.open(tars[0], "rb") as opened, tarfile.open(fileobj=opened, mode="r|*") as archive:
            names = [PurePosixPath(member.name).name for member, _ in zip(archive, range(_X2EDIT_HEAD), strict=False)]
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        return False  # the reader of tars says what is wrong with it
    endings = {name.partition(".")[2].lstrip(".") for name in names}
    return any({*pair} <= endings for pair in _X2EDIT_PAIRS[:2])


@register("x2edit", _is_x2edit)
def read_x2edit(
    place: Place, *, dataset: str = "x2edit", licence: str = "Apache-2.0", extract: str = ""
) -> Iterator[Outcome]:
    """X2Edit: tars with `1.0.jpg` (source), `2.jpg` (target) and a `.json` with `instruction`, `task`, scores.

    Args:
        place: A tar, or a folder of tars.
        dataset: Name.
        licence: The licence of the dataset.
        extract: Folder or URL for the pictures; workers that decode must reach it.
    """
    extractor = Extractor(extract or default_extract_folder(dataset))
    for group in _all_groups(place, dataset):
        yield group if isinstance(group, Rejected) else _x2edit_sample(*group, dataset, licence, extractor)


def _x2edit_sample(
    where: str, name: str, members: dict[str, bytes], dataset: str, licence: str, extractor: Extractor
) -> Outcome:
    members = {ending.lstrip("."): content for ending, content in members.items()}
    pair = next((pair for pair in _X2EDIT_PAIRS if members.keys() >= {*pair}), None)
    if pair is None:
        return Rejected(where, dataset, "missing_media", f"no pair of pictures among {', '.join(sorted(members))}")
    try:
        stated = fields.mapping(members.get("json", b"{}").decode("utf-8", "surrogateescape"), "json")
        source, target = (extractor.write(members[ending], f"x.{ending}") for ending in pair)
    except FieldError as error:
        return Rejected(where, dataset, error.reason, str(error))
    text = next((stated[field] for field in _X2EDIT_TEXTS if stated.get(field)), "")
    instruction = next((one for one in text if one), "") if isinstance(text, list) else text
    plain = {k: v for k, v in stated.items() if isinstance(v, (str, int, float, bool)) and k not in _X2EDIT_TEXTS}
    return build(where, dataset, task="image_edit", source=source, target=target, instruction=instruction,
                 licence=licence, group=PurePosixPath(source).stem, extra=plain | {"source_id": name})  # fmt: skip
