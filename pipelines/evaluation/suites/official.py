"""Converters from the official downloads of public benchmarks to our manifest.

Each takes the folder of the download as its authors lay it out, and checks the official counts. Nothing of the
benchmarks is shipped here: texts, media and rubrics stay in the user's own copy.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from loomvideo.pipelines.evaluation.suites.items import EvalItem, SuiteManifest, build_manifest
from loomvideo.platform.errors import UserError

GENEVAL_COUNTS = {
    "position": 100,
    "color_attr": 100,
    "two_object": 99,
    "colors": 94,
    "single_object": 80,
    "counting": 80,
}
IMGEDIT_COUNTS = {
    "extract": 117,
    "style": 100,
    "add": 95,
    "adjust": 94,
    "background": 94,
    "replace": 92,
    "remove": 86,
    "action": 36,
    "compose": 23,
}
VBENCH_COUNTS = {
    "subject_consistency": 72,
    "background_consistency": 86,
    "temporal_flickering": 75,
    "motion_smoothness": 72,
    "dynamic_degree": 72,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "object_class": 79,
    "multiple_objects": 82,
    "human_action": 100,
    "color": 85,
    "spatial_relationship": 84,
    "scene": 86,
    "appearance_style": 90,
    "temporal_style": 100,
    "overall_consistency": 93,
}
VBENCH_SUBSET = ("imaging_quality", "overall_consistency", "subject_consistency")
OPENVE_TYPES = (
    "global_style",
    "background_change",
    "local_change",
    "local_remove",
    "local_add",
    "subtitle_edit",
    "creative_edit",
    "camera_edit",
)
OPENVE_ALIGNED = ("background_change", "local_change", "local_remove", "local_add", "subtitle_edit")
TIV2V_COUNTS = {"local_change": 73, "local_add": 71, "back_change": 66}
MI2V_COUNTS = {"1subject": 130, "2subject": 120, "3subject": 70}


def geneval(root: Path) -> SuiteManifest:
    """GenEval: ``evaluation_metadata.jsonl``, one text-to-image prompt a line."""
    path = _find(root, "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
    items = []
    for index, line in enumerate(_lines(path)):
        row = _row(json.loads(line), path, index, "tag", "prompt", "include")
        items.append(EvalItem("geneval", f"{index:05d}", "t2i", row["tag"], row["prompt"], extra={"metadata": row}))
    return build_manifest("geneval", path.parent, items, total=553, categories=GENEVAL_COUNTS)


def imgedit(root: Path) -> SuiteManifest:
    """ImgEdit-Bench, basic part: ``basic_edit.json`` and the pictures it names by ``id``."""
    path = _find(root, "basic_edit.json", "Basic/basic_edit.json")
    pictures = _picture_folder(path.parent)
    items = []
    for key, value in json.loads(path.read_text(encoding="utf-8")).items():
        row = _row(value, path, key, "id", "prompt", "edit_type")
        # The file says "alter" where the paper and the rubrics of some releases say "adjust".
        category = "adjust" if row["edit_type"] == "alter" else row["edit_type"]
        aligned = category in ("add", "remove", "replace", "adjust", "background")
        source = f"{pictures}{row['id']}"
        items.append(
            EvalItem("imgedit", key, "image_edit", category, row["prompt"], source, cluster=source, aligned=aligned)
        )
    return build_manifest("imgedit", path.parent, items, total=737, categories=IMGEDIT_COUNTS)


def vbench(root: Path, subset: bool = False) -> SuiteManifest:
    """VBench: ``VBench_full_info.json``; ``subset`` keeps the prompts of the three dimensions LoomVideo reports.

    A prompt serves several dimensions; its first one is its category and all are in ``extra["dimensions"]``.
    """
    path = _find(root, "VBench_full_info.json", "vbench/VBench_full_info.json")
    items, counts = [], dict.fromkeys(VBENCH_COUNTS, 0)
    for index, value in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        row = _row(value, path, index, "prompt_en", "dimension")
        for dimension in row["dimension"]:
            if dimension not in VBENCH_COUNTS:
                raise UserError(f"{path}: row {index}: unknown dimension {dimension!r}")
            counts[dimension] += 1
        dimensions = [d for d in row["dimension"] if not subset or d in VBENCH_SUBSET]
        if dimensions:
            extra = {"dimensions": dimensions, "auxiliary_info": row.get("auxiliary_info", {})}
            items.append(EvalItem("vbench", f"{index:04d}", "t2v", dimensions[0], row["prompt_en"], extra=extra))
    manifest = build_manifest("vbench", path.parent, items, total=165 if subset else 946)
    problems = [
        f"{name}: {counts[name]} prompts, the official benchmark has {official}"
        for name, official in VBENCH_COUNTS.items()
        if counts[name] != official
    ]
    return SuiteManifest(manifest.suite, manifest.root, manifest.items, manifest.problems + tuple(problems))


def vbench_subset(root: Path) -> SuiteManifest:
    """The 165 VBench prompts of imaging quality, overall consistency and subject consistency."""
    return vbench(root, subset=True)


def openve(root: Path) -> SuiteManifest:
    """OpenVE-Bench: ``benchmark_videos.csv`` with ``edited_type, prompt, original_video``."""
    path = _find(root, "benchmark_videos.csv")
    items = []
    for index, row in enumerate(_csv(path, "edited_type", "prompt", "original_video")):
        category, source = row["edited_type"], row["original_video"]
        if category not in OPENVE_TYPES:
            raise UserError(f"{path}: row {index + 2}: edited_type {category!r} is none of {', '.join(OPENVE_TYPES)}")
        aligned = category in OPENVE_ALIGNED
        items.append(
            EvalItem(
                "openve", f"{index:04d}", "video_edit", category, row["prompt"], source, cluster=source, aligned=aligned
            )
        )
    return build_manifest("openve", path.parent, items, total=431)


def refvie(root: Path) -> SuiteManifest:
    """RefVIE-Bench: ``refvie_bench.yaml``, a list of ``src_video, ref_img, instruction, edit_type``."""
    path = _find(root, "refvie_bench.yaml")
    items = []
    for index, value in enumerate(yaml.safe_load(path.read_text(encoding="utf-8"))):
        row = _row(value, path, index, "src_video", "ref_img", "instruction", "edit_type")
        if row["edit_type"] not in ("subject", "background"):
            raise UserError(f"{path}: row {index}: edit_type {row['edit_type']!r} is neither subject nor background")
        source = row["src_video"]
        items.append(
            EvalItem(
                "refvie", f"{index:04d}", "ref_edit", row["edit_type"], row["instruction"], source,
                references=(row["ref_img"],), cluster=source, aligned=True,
            )
        )  # fmt: skip
    return build_manifest("refvie", path.parent, items, total=120)


def ivbench_tiv2v(root: Path) -> SuiteManifest:
    """IntelligentVBench TIV2V: ``TIV2V.csv``; media paths start at the folder that holds ``IntelligentVBench/``."""
    path = _find(root, "TIV2V.csv", "csvs/TIV2V.csv")
    items = []
    for row in _csv(path, "edited_type", "index", "condition_video", "condition_image", "prompt"):
        source = row["condition_video"]
        items.append(
            EvalItem(
                "ivbench_tiv2v", row["index"], "ref_edit", row["edited_type"], row["prompt"], source,
                references=(row["condition_image"],), cluster=source, aligned=True,
            )
        )  # fmt: skip
    return build_manifest("ivbench_tiv2v", _ivbench_root(root), items, total=210, categories=TIV2V_COUNTS)


def ivbench_mi2v(root: Path) -> SuiteManifest:
    """IntelligentVBench compositional MI2V: three CSV files for one, two and three subjects.

    ``extra["with_background"]`` says whether the last reference is a background, which changes the rubric.
    """
    items = []
    for count in (1, 2, 3):
        path = _find(root, f"Compositional_MI2V_subject{count}.csv", f"csvs/Compositional_MI2V_subject{count}.csv")
        for row in _csv(path, "index", "subject_img_1", "prompt"):
            subjects = [row[name] for name in ("subject_img_1", "subject_img_2", "subject_img_3") if row.get(name)]
            background = row.get("background_img") or ""
            key = f"subject{count}-{row['index']}"
            extra = {"index": row["index"], "subjects": len(subjects), "with_background": bool(background)}
            references = (*subjects, background) if background else tuple(subjects)
            items.append(
                EvalItem(
                    "ivbench_mi2v", key, "mi2v", f"{count}subject", row["prompt"],
                    references=references, cluster=subjects[0], extra=extra,
                )
            )  # fmt: skip
    return build_manifest("ivbench_mi2v", _ivbench_root(root), items, total=320, categories=MI2V_COUNTS)


def _find(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    raise UserError(f"{root}: no {names[0]} here; give the folder of the official download")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        yield from (line for line in stream if line.strip())


def _row(value: Any, path: Path, where: int | str, *fields: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: row {where}: expected an object")
    lacking = [name for name in fields if name not in value]
    if lacking:
        raise UserError(f"{path}: row {where}: field {lacking[0]!r} is missing")
    return value


def _csv(path: Path, *fields: str) -> Iterator[dict[str, str]]:
    # utf-8-sig: the official files come with and without a byte order mark.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        lacking = [name for name in fields if name not in (reader.fieldnames or [])]
        if lacking:
            raise UserError(f"{path}: column {lacking[0]!r} is missing")
        yield from reader


def _picture_folder(folder: Path) -> str:
    """Where ImgEdit's pictures are: beside the JSON, or in the folder its archive unpacks to."""
    for name in ("", "singleturn/", "Benchmark/singleturn/", "../singleturn/"):
        if (folder / name / "animal").is_dir():
            return name
    return ""


def _ivbench_root(root: Path) -> Path:
    for folder in (root, *root.parents[:2]):
        if (folder / "IntelligentVBench").is_dir():
            return folder
    return root
