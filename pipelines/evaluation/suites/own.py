"""Our own suites, from a JSONL file in the project's sample format: held-out samples, and the fashion suite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.evaluation.suites.items import EvalItem, SuiteManifest, build_manifest
from loomvideo.pipelines.sources.samples import Sample, read_jsonl
from loomvideo.platform.errors import UserError

FASHION_CATEGORIES = (
    "garment_text",
    "garment_reference",
    "background_swap",
    "model_swap",
    "outfit_video",
    "showcase",
)
# Edits of the sample dataset, by the kind that its generator records.
_KIND_CATEGORIES = {
    "recolour": "garment_text",
    "pattern": "garment_text",
    "ref_garment": "garment_reference",
    "ref_pattern": "garment_reference",
    "background": "background_swap",
    "ref_background": "background_swap",
}
_COLOUR_KINDS = ("recolour", "ref_garment")
_TASK_CATEGORIES = {"mi2v": "outfit_video", "t2v": "showcase"}
HELDOUT_FRACTION = 0.05


def sample(root: Path, heldout_fraction: float = HELDOUT_FRACTION) -> SuiteManifest:
    """The held-out samples of a dataset, a category a task; ``root`` is its folder or its JSONL file."""
    path = _samples_file(root)
    items = [_item("sample", s, s.task) for s in read_jsonl(path) if s.assigned_split(heldout_fraction) == "heldout"]
    if not items:
        raise UserError(f"{path}: no held-out samples; give some of them split=heldout")
    return build_manifest("sample", path.parent, items)


def fashion(root: Path) -> SuiteManifest:
    """The fashion suite: held-out samples with ``extra.fashion_task``, or with a known kind of edit of the sample data.

    Categories without a sample are listed as problems, since the suite's mean then leaves them out.
    """
    path = _samples_file(root)
    items = []
    for s in read_jsonl(path):
        if s.assigned_split(HELDOUT_FRACTION) != "heldout":
            continue
        category = s.extra.get("fashion_task")
        if category is not None and category not in FASHION_CATEGORIES:
            raise UserError(
                f"{path}: {s.key}: extra.fashion_task={category!r} is none of {', '.join(FASHION_CATEGORIES)}"
            )
        if category is None and s.dataset == "fashion-world":
            category = _KIND_CATEGORIES.get(_kind(s)) or _TASK_CATEGORIES.get(s.task)
        if category is not None:
            items.append(_item("fashion", s, category))
    if not items:
        raise UserError(f"{path}: no sample has extra.fashion_task; set it to one of {', '.join(FASHION_CATEGORIES)}")
    manifest = build_manifest("fashion", path.parent, items)
    absent = tuple(f"{c}: no samples" for c in FASHION_CATEGORIES if c not in manifest.counts())
    return SuiteManifest(manifest.suite, manifest.root, manifest.items, manifest.problems + absent)


def _item(suite: str, s: Sample, category: str) -> EvalItem:
    local = _kind(s) in _KIND_CATEGORIES or bool(s.extra.get("aligned"))
    return EvalItem(
        suite,
        s.key,
        s.task,
        category,
        s.text,
        s.source,
        tuple(s.references),
        s.target,
        s.extra.get("mask"),
        cluster=s.group or s.source or s.key,
        aligned=TASKS[s.task].needs_source and local,
        extra={"kind": _kind(s), "garment": _kind(s) in _COLOUR_KINDS} | asked_colours(s.extra) | _worn(s),
    )


def asked_colours(extra: Mapping[str, Any]) -> dict[str, str]:
    """The colour that an edit of a garment asks for, and that of its pattern, of a sample's ``extra``."""
    edit = extra.get("edit") or {}
    worn = [g for g in extra.get("garments", ()) if g.get("type") == edit.get("garment")]
    if edit.get("kind", "") not in _COLOUR_KINDS or not worn:
        return {}
    return {name: worn[0][name] for name in ("colour", "accent") if name in worn[0]}


def _worn(s: Sample) -> dict[str, list[dict[str, str]]]:
    """The garments that a caption names, where words are all that the model is told."""
    garments = s.extra.get("garments")
    return {"worn": garments} if s.dataset == "fashion-world" and garments and not TASKS[s.task].has_media else {}


def _kind(s: Sample) -> str:
    return (s.extra.get("edit") or {}).get("kind", "")


def _samples_file(root: Path) -> Path:
    path = root if root.suffix == ".jsonl" else root / "samples.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: not found; make it with `loomvideo data sample output={path.parent}`")
    return path
