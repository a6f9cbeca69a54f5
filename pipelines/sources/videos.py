"""Published sets of captioned videos and of subjects in videos: OpenVid-1M, Koala-36M, Phantom-Data, OpenS2V-5M."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlparse

from loomvideo.pipelines.media.fragments import Fragment, with_fragment
from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import VIDEO_SUFFIXES, Outcome, Place, Rejected, Root, build, register
from loomvideo.pipelines.sources.rows import as_list, header, outcomes, table_files
from loomvideo.platform.errors import UserError


class VideoFolder:
    """Local videos by name without suffix, searched in a folder and the folders in it."""

    def __init__(self, root: Root):
        """List the folder."""
        self._paths: dict[str, str] = {}
        for folder in ["", *[name for name in root.names() if root.is_folder(name)]]:
            for name in root.names(folder):
                if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES:
                    self._paths.setdefault(
                        PurePosixPath(name).stem, root.path(folder, name) if folder else root.path(name)
                    )

    def find(self, *stems: str) -> str | None:
        """Path of the first name that exists."""
        return next((self._paths[stem] for stem in stems if stem in self._paths), None)


def _video_root(place: Place, videos: str) -> Root:
    if videos:
        return Root(videos)
    folder = next((name for name in ("videos", "video", "clips") if place.root.is_folder(name)), "")
    return Root(place.root.path(folder)) if folder else place.root


def _header(place: Place) -> set[str]:
    """Column names of the first table that the place shows."""
    files = place.files(".csv", ".parquet", ".json") or place.files(".csv", folder="data/train")
    if not files or not files[0].endswith(".csv"):
        return set()
    return set(header(place.root, files[0])[0])


def _openvid_files(place: Place) -> list[str]:
    return [place.file] if place.file else place.files(".csv", folder="data/train") or place.files(".csv")


@register("openvid", lambda place: {"video", "caption", "temporal consistency score"} <= _header(place))
def read_openvid(
    place: Place, *, videos: str = "", dataset: str = "openvid-1m", licence: str = "CC-BY-4.0 (videos: their owners')"
) -> Iterator[Outcome]:
    """OpenVid-1M: `data/train/*.csv` and the unpacked videos.

    Args:
        place: The dataset's folder or one CSV.
        videos: Folder of the videos; default: `videos/`, `video/` or `clips/` beside the table.
        dataset: Name.
        licence: The licence of the dataset.
    """
    files = _openvid_files(place)
    if not files:
        raise UserError(f"{place.name}: no data/train/*.csv")
    base = _video_root(place, videos)
    for file in files:
        yield from outcomes(place, file, dataset, _openvid_sample, base, dataset, licence)


def _openvid_sample(where: str, row: dict[str, Any], base: Root, dataset: str, licence: str) -> Outcome:
    video = fields.path(row.get("video"), "video")
    if not video:
        return Rejected(where, dataset, "missing_field", "no video")
    # {YouTube id}_{part}_{first}to{last}.mp4: clips of one video stay in one split.
    group = re.sub(r"_\d+_\d+to\d+$", "", PurePosixPath(video).stem)
    scores = {k.replace(" ", "_"): _number(v) for k, v in row.items() if k not in ("video", "caption")}
    return build(where, dataset, task="t2v", target=base.path(video), caption=row.get("caption"), licence=licence,
                 group=group, extra=scores)  # fmt: skip


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


_PANDA = {"videoID", "timestamp", "caption", "matching_score"}


@register("panda70m", lambda place: _header(place) >= _PANDA)
def read_panda(
    place: Place, *, videos: str = "", dataset: str = "panda-70m", licence: str = "research (videos: their owners')"
) -> Iterator[Outcome]:
    """Panda-70M CSV with local whole videos (`videoID.mp4`): a sample for each of a row's clips.

    Args:
        place: A CSV or the folder of the CSVs.
        videos: Folder of the videos; default: `videos/`, `video/` or `clips/` beside the table.
        dataset: Name.
        licence: The licence of the dataset.
    """
    folder = VideoFolder(_video_root(place, videos))
    for file in [place.file] if place.file else place.files(".csv"):
        yield from outcomes(place, file, dataset, _panda_samples, folder, dataset, licence)


def _panda_samples(
    where: str, row: dict[str, Any], folder: VideoFolder, dataset: str, licence: str
) -> Iterator[Outcome]:
    video_id = fields.name(row.get("videoID"), "videoID") or ""
    whole = folder.find(video_id)
    if whole is None:
        yield Rejected(where, dataset, "missing_media", f"no video {video_id!r}")
        return
    names = ("timestamp", "caption", "matching_score")
    columns = [_literal_list(row.get(name), name) for name in names]
    if len({len(column) for column in columns}) != 1:
        found = ", ".join(f"{len(column)} in {name}" for column, name in zip(columns, names, strict=True))
        raise fields.FieldError("timestamp", f"the lists differ in length: {found}")
    for number, (times, caption, score) in enumerate(zip(*columns, strict=True)):
        start, end = (seconds(str(time)) for time in times)
        target = with_fragment(whole, Fragment(seconds=(start, end)))
        yield build(f"{where}#{number}", dataset, task="t2v", target=target, caption=caption, licence=licence,
                    group=video_id, extra={"matching_score": score})  # fmt: skip


def _literal_list(value: Any, field: str) -> list[Any]:
    """A list, or the Python text of one, which is what the published CSV holds."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise fields.FieldError(field, "is no list") from error
    if not isinstance(value, list):
        raise fields.FieldError(field, f"expected a list, found {type(value).__name__}")
    return value


def _is_koala(place: Place) -> bool:
    columns = _header(place)
    return {"videoID", "timestamp", "caption"} <= columns and not columns >= _PANDA


@register("koala36m", _is_koala)
def read_koala(
    place: Place, *, videos: str = "", dataset: str = "koala-36m", licence: str = "research (videos: their owners')"
) -> Iterator[Outcome]:
    """Koala-36M CSV with local videos: clips already cut (`videoID.mp4`), or whole videos named by YouTube id.

    Args:
        place: A CSV or the folder of the CSVs.
        videos: Folder of the videos; default: `videos/`, `video/` or `clips/` beside the table.
        dataset: Name.
        licence: The licence of the dataset.
    """
    folder = VideoFolder(_video_root(place, videos))
    for file in [place.file] if place.file else place.files(".csv"):
        yield from outcomes(place, file, dataset, _koala_sample, folder, dataset, licence)


def _koala_sample(where: str, row: dict[str, Any], folder: VideoFolder, dataset: str, licence: str) -> Outcome:
    clip_id = str(row.get("videoID") or "")
    video_id = re.sub(r"_\d+$", "", clip_id)
    youtube = parse_qs(urlparse(str(row.get("url") or "")).query).get("v", [video_id])[0]
    target = folder.find(clip_id)
    if target is None:
        whole = folder.find(video_id, youtube)
        if whole is None:
            return Rejected(where, dataset, "missing_media", f"neither {clip_id} nor {youtube} among the videos")
        try:
            start, end = (seconds(part) for part in as_list(row.get("timestamp"), ","))
        except ValueError:
            return Rejected(where, dataset, "invalid_field", f"timestamp {row.get('timestamp')!r}")
        target = with_fragment(whole, Fragment(seconds=(start, end)))
    scores = {k: _number(v) for k, v in row.items() if k.endswith("score")}
    return build(where, dataset, task="t2v", target=target, caption=row.get("caption"), licence=licence,
                 group=youtube, extra=scores)  # fmt: skip


def seconds(text: str) -> float:
    """Seconds of ``1:02:03.5``, ``02:03.5`` or ``3.5``.

    Raises:
        ValueError: for anything else.
    """
    total = 0.0
    for part in text.strip().split(":"):
        total = total * 60 + float(part)
    return total


@register("phantom", lambda place: place.file.endswith("_filtered.parquet"))
def read_phantom(
    place: Place, *, videos: str = "", dataset: str = "phantom-data", licence: str = "research (videos: their owners')"
) -> Iterator[Outcome]:
    """Phantom-Data: subjects of one video as references for another, cut out of Koala-36M's local clips.

    Args:
        place: The `…_merged_filtered.parquet` (or JSONL with the same fields), or its folder.
        videos: Folder of Koala-36M's clips, named by `vid`; default: `videos/`, `video/` or `clips/` beside the table.
        dataset: Name.
        licence: The licence of the dataset.
    """
    folder = VideoFolder(_video_root(place, videos))
    for file in table_files(place):
        yield from outcomes(place, file, dataset, _phantom_sample, folder, dataset, licence)


def _phantom_sample(where: str, row: dict[str, Any], folder: VideoFolder, dataset: str, licence: str) -> Outcome:
    vid = str(row.get("vid") or "")
    target = folder.find(vid)
    if target is None:
        return Rejected(where, dataset, "missing_media", f"no video {vid!r}")
    pairs = row.get("cross_pair")
    try:
        pairs = json.loads(pairs) if isinstance(pairs, str) else dict(pairs or {})
    except (json.JSONDecodeError, ValueError, TypeError):
        return Rejected(where, dataset, "invalid_field", "cross_pair is no mapping")
    references, phrases = [], []
    for phrase, pair in pairs.items():
        results = (pair or {}).get("refer_result") or []
        result = next((r for r in results if isinstance(r, dict) and r.get("bbox")), None)
        if result is None:
            continue
        other = str(result.get("vid") or vid)
        video = folder.find(other)
        if video is None:
            return Rejected(where, dataset, "missing_media", f"no reference video {other!r}")
        try:
            references.append(with_fragment(video, _phantom_fragment(result)))
        except (KeyError, TypeError, ValueError) as error:
            return Rejected(where, dataset, "invalid_field", f"refer_result of {phrase!r}: {error}")
        phrases.append(phrase)
    if not references:
        return Rejected(where, dataset, "unpaired", "no reference with a box")
    return build(where, dataset, task="mi2v", target=target, references=references, caption=row.get("video_caption"),
                 licence=licence, group=re.sub(r"_\d+$", "", vid), extra={"subjects": phrases})  # fmt: skip


def _phantom_fragment(result: dict[str, Any]) -> Fragment:
    """The box in its frame; boxes are shares of the frame, or pixels of it at a longer side of 768."""
    box = result["bbox"]
    x0, y0, x1, y1 = (float(box[name]) for name in ("x_min", "y_min", "x_max", "y_max"))
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"empty box {x0:g},{y0:g},{x1:g},{y1:g}")
    at = float(result.get("frame_idx", 0))
    if max(x1, y1) <= 1.0:
        return Fragment(at=at, box=(100 * x0, 100 * y0, 100 * (x1 - x0), 100 * (y1 - y0)))
    return Fragment(at=at, box=(x0, y0, x1 - x0, y1 - y0), box_unit="pixel", side=768)


def _is_opens2v(place: Place) -> bool:
    if not place.file.endswith(".json"):
        return False
    with place.root.open(place.file) as opened:
        head = opened.read(20000)
    return '"metadata"' in head and '"annotation"' in head


@register("opens2v", _is_opens2v)
def read_opens2v(
    place: Place, *, videos: str = "", dataset: str = "opens2v-5m", licence: str = "CC-BY-4.0", max_references: int = 3
) -> Iterator[Outcome]:
    """OpenS2V-5M JSON keyed by clip: the annotated subjects of a frame are references for the video.

    Args:
        place: A JSON file or the folder of the JSON files.
        videos: Folder that `metadata.path` starts from; default: `videos/`, `video/` or `clips/` beside the file.
        dataset: Name.
        licence: The licence of the dataset.
        max_references: The most references of a sample, the largest boxes first.
    """
    base = _video_root(place, videos)
    for file in [place.file] if place.file else place.files(".json"):
        yield from outcomes(place, file, dataset, _opens2v_sample, base, dataset, licence, max_references)


def _opens2v_sample(
    where: str, row: dict[str, Any], base: Root, dataset: str, licence: str, max_references: int
) -> Outcome:
    metadata = row.get("metadata") or {}
    if not metadata.get("path"):
        return Rejected(where, dataset, "missing_field", "no metadata.path")
    video = base.path(metadata["path"])
    target = video
    cut, crop = metadata.get("cut"), metadata.get("crop")
    try:
        if cut:
            target = with_fragment(target, Fragment(frames=(int(cut[0]), int(cut[1]))))
        if crop:
            x0, x1, y0, y1 = (float(v) for v in crop)
            target = with_fragment(target, Fragment(box=(x0, y0, x1 - x0, y1 - y0), box_unit="pixel"))
        frame = ((row.get("annotation") or {}).get("ann_frame_data")) or {}
        index = int(frame.get("ann_frame_idx", 0))
        boxes = [(a["class_name"], [float(v) for v in a["bbox"]]) for a in frame.get("annotations") or []]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        return Rejected(where, dataset, "invalid_field", f"cut, crop or annotation: {error}")
    boxes = [(name, b) for name, b in boxes if b[2] > b[0] and b[3] > b[1]]
    boxes.sort(key=lambda item: -(item[1][2] - item[1][0]) * (item[1][3] - item[1][1]))
    chosen = boxes[:max_references]
    references = [
        with_fragment(video, Fragment(frame=index, box=(b[0], b[1], b[2] - b[0], b[3] - b[1]), box_unit="pixel"))
        for _, b in chosen
    ]
    captions = as_list(metadata.get("cap"), "\n")
    return build(
        where,
        dataset,
        task="mi2v" if references else "t2v",
        target=target,
        references=references,
        caption=captions[0] if captions else metadata.get("face_cap_qwen"),
        licence=licence,
        group=str(metadata["path"]),
        extra={"subjects": [name for name, _ in chosen]}
        | {k: metadata[k] for k in ("aesthetic", "tech", "motion", "fps") if k in metadata},
    )
