"""Charts as pictures, for what MLflow cannot draw: radars, and bars with intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from loomvideo.pipelines.evaluation.aggregate import Figure
from loomvideo.platform.errors import full_disk_named

COLORS = ("#185ca8", "#d9822b", "#6c7178")


def save_radar(spec: dict[str, Any], path: Path) -> None:
    """Draw the review page's radar: ``axes``, ``low``, ``high`` and ``series`` of names and values."""
    angles = np.linspace(0, 2 * np.pi, len(spec["axes"]), endpoint=False)
    canvas = Canvas(figsize=(6.4, 5.0), layout="constrained")
    axes = canvas.add_subplot(projection="polar")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    for series, color in zip(spec["series"], COLORS, strict=False):
        values = [spec["low"] if v is None or np.isnan(v) else v for v in series["values"]]
        axes.plot([*angles, angles[0]], [*values, values[0]], color=color, linewidth=2, label=series["name"])
        axes.fill([*angles, angles[0]], [*values, values[0]], color=color, alpha=0.12)
    axes.set_xticks(angles, spec["axes"], fontsize=9)
    axes.set_ylim(spec["low"], spec["high"])
    axes.tick_params(axis="y", labelsize=8, colors="#6c7178")
    axes.grid(color="#dee0e4")
    axes.spines["polar"].set_color("#dee0e4")
    if len(spec["series"]) > 1:
        axes.legend(loc="upper right", bbox_to_anchor=(1.25, 1.12), frameon=False, fontsize=9)
    _save(canvas, path)


def save_bars(figures: Sequence[Figure], identity: Sequence[Figure], title: str, path: Path) -> None:
    """Draw a metric's categories as points with 95 % intervals, beside what copying the source gets."""
    copies = {f.category: f.value for f in identity}
    ordered = sorted(figures, key=lambda f: (f.category == "", f.value))
    canvas = Canvas(figsize=(7.0, 0.42 * len(ordered) + 1.3), layout="constrained")
    axes = canvas.add_subplot()
    for y, f in enumerate(ordered):
        if not np.isnan(f.low):
            axes.plot([f.low, f.high], [y, y], color=COLORS[0], linewidth=2.5, solid_capstyle="round")
        axes.plot(f.value, y, "o", color=COLORS[0], markersize=7, label="this run" if y == 0 else None)
        copy = copies.get(f.category, float("nan"))
        if not np.isnan(copy):
            axes.plot(copy, y, "D", color=COLORS[2], markersize=5, label="source copied" if y == 0 else None)
    names = [f"{f.category or 'all'}  (n = {f.num_valid})" for f in ordered]
    axes.set_yticks(range(len(ordered)), names, fontsize=9)
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="x", color="#dee0e4")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, frameon=False, fontsize=9)
    _save(canvas, path)


def _save(canvas: Canvas, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(path, path):
        canvas.savefig(path, dpi=110, facecolor="white")
