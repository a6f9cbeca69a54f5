"""VBench's official normalisation and totals, and the reading of its tool's result files.

The dimensions' networks run in VBench's own environment, whose pins conflict with training; its JSON results are read
here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class Dimension:
    """One dimension's official bounds and weight in its group."""

    low: float
    high: float
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462, 1.0),
    "background_consistency": Dimension(0.2615, 1.0),
    "temporal_flickering": Dimension(0.6293, 1.0),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "aesthetic_quality": Dimension(0.0, 1.0),
    "imaging_quality": Dimension(0.0, 1.0),
    "dynamic_degree": Dimension(0.0, 1.0, weight=0.5),
}
SEMANTIC = {
    "object_class": Dimension(0.0, 1.0),
    "multiple_objects": Dimension(0.0, 1.0),
    "human_action": Dimension(0.0, 1.0),
    "color": Dimension(0.0, 1.0),
    "spatial_relationship": Dimension(0.0, 1.0),
    "scene": Dimension(0.0, 0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(0.0, 0.364),
    "overall_consistency": Dimension(0.0, 0.364),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
LOOMVIDEO_DIMENSIONS = ("imaging_quality", "overall_consistency", "subject_consistency")


@dataclass(frozen=True)
class VBenchTotals:
    """Official scores, 0 to 1; ``missing`` dimensions count as 0, as in the official script."""

    total: float
    quality: float
    semantic: float
    missing: tuple[str, ...]


def official_totals(raw: Mapping[str, float]) -> VBenchTotals:
    """Total = (4 x quality + semantic) / 5 of the normalised dimensions.

    Args:
        raw: Raw mean of each dimension, 0 to 1, as the VBench tool prints it.
    """
    groups = []
    for group in (QUALITY, SEMANTIC):
        weighted = sum(
            (raw[name] - d.low) / (d.high - d.low) * d.weight for name, d in group.items() if name in raw
        )  # fmt: skip
        groups.append(weighted / sum(d.weight for d in group.values()))
    quality, semantic = groups
    total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    missing = tuple(name for name in (*QUALITY, *SEMANTIC) if name not in raw)
    return VBenchTotals(total, quality, semantic, missing)


def loomvideo_average(raw: Mapping[str, float]) -> float:
    """Mean of the three raw dimensions LoomVideo reports, in percent; not a VBench total.

    Raises:
        UserError: if one of the three is missing.
    """
    lacking = [name for name in LOOMVIDEO_DIMENSIONS if name not in raw]
    if lacking:
        raise UserError(f"VBench results: dimension {lacking[0]} is missing; run the VBench tool on it")
    return 100 * sum(raw[name] for name in LOOMVIDEO_DIMENSIONS) / len(LOOMVIDEO_DIMENSIONS)


def read_results(path: Path) -> dict[str, float]:
    """Raw dimension means from a ``*_eval_results.json`` of the VBench tool: ``{dimension: [mean, details]}``.

    Imaging quality is brought from the tool's 0..100 to 0..1 where an older release left it there.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a VBench result file: {error}") from error
    raw = {name: float(value[0] if isinstance(value, list) else value) for name, value in values.items()}
    unknown = [name for name in raw if name not in QUALITY and name not in SEMANTIC]
    if unknown:
        raise UserError(f"{path}: unknown VBench dimension {unknown[0]!r}")
    return {name: value / 100 if name == "imaging_quality" and value > 1 else value for name, value in raw.items()}
