"""The review page: one self-contained HTML file with synced players, filters and figures.

It works opened from disk (films beside it) and inside MLflow's artifact frame, where scripts run but relative links do
not: the page then finds its server in its own address.
"""

import base64
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from loomvideo.pipelines.evaluation.aggregate import SuiteResult, sample_values
from loomvideo.pipelines.evaluation.published import published_scores
from loomvideo.pipelines.evaluation.results import SavedSuite, clean
from loomvideo.pipelines.evaluation.rows import MODEL, InputsRecord, Row
from loomvideo.pipelines.evaluation.stages import FILM, STRIP, THUMB
from loomvideo.pipelines.evaluation.store import Store
from loomvideo.pipelines.evaluation.table import headline_metrics, metric
from loomvideo.platform.errors import full_disk_named

TEMPLATE = Path(__file__).with_name("review.html")


@dataclass(frozen=True)
class OtherRun:
    """Another run shown beside this one."""

    label: str
    run_id: str
    saved: SavedSuite


def publish_media(store: Store, rows: Sequence[Row], folder: Path) -> None:
    """Link each shown sample's films and pictures into ``media/<key>/`` of the suite's folder."""
    for row in rows:
        if row["series"] != MODEL or row["failure"]:
            continue
        target = folder / "media" / row["key"]
        target.mkdir(parents=True, exist_ok=True)
        media, inputs = store.entry("media", row["media"]), store.entry("inputs", row["inputs"])
        files = [media / FILM, media / STRIP, media / THUMB, *inputs.glob("*.mp4"), *inputs.glob("*.png")]
        for source in files:
            _place(source, target / source.name.replace("video.mp4", "result.mp4"))


def _place(source: Path, target: Path) -> None:
    if target.exists():
        if target.samefile(source):
            return
        # The run was continued with other results.
        target.unlink()
    if source.stat().st_dev == target.parent.stat().st_dev:
        target.hardlink_to(source)
    else:
        shutil.copyfile(source, target)


def write_review_page(
    folder: Path,
    store: Store,
    result: SuiteResult,
    rows: Sequence[Row],
    run_name: str,
    run_id: str,
    subtitle: str,
    other: OtherRun | None = None,
) -> Path:
    """Write ``review.html`` into the suite's folder.

    Args:
        folder: The suite's folder, with ``media/`` from :func:`publish_media`.
        store: Where pictures for posters are.
        result: The suite's figures.
        rows: Finished rows.
        run_name: Shown in the title.
        run_id: MLflow run that holds ``media/``.
        subtitle: One line on model, judge and prompts.
        other: A run to show beside this one.
    """
    own = [row for row in rows if row["series"] == MODEL]
    theirs = other.saved.values() if other else {}
    their_rows = {row["key"]: row for row in other.saved.rows if row["series"] == MODEL} if other else {}
    values = {row["key"]: sample_values(row) for row in own}
    shown = [name for name in _ordered({n for v in values.values() for n in v}) if metric(name).floor is None]
    orders = []
    for name in shown:
        known = metric(name)
        if known.higher_is_better is None:
            continue
        sign = 1 if known.higher_is_better else -1
        label = known.label or name
        order = {"metric": f"worst:{name}", "value": name, "sign": sign, "change": False}
        orders.append(order | {"label": f"worst {label}"})
        if other:
            for kind, direction in (("regressed", sign), ("improved", -sign)):
                order = {"metric": f"{kind}:{name}", "value": name, "sign": direction, "change": True}
                orders.append(order | {"label": f"most {kind}: {label}"})
    content = {
        "suite": result.suite,
        "run_name": run_name,
        "run_id": run_id,
        "label": "this run",
        "subtitle": subtitle,
        "status": result.status,
        "status_detail": ", ".join(f"{n} {reason}" for reason, n in result.failures.items()),
        "figures": _figure_rows(result, other, headline=True),
        "more": _figure_rows(result, other, headline=False),
        "published": [p.as_dict() for p in published_scores(result.suite)],
        "radar": radar_spec(result, other),
        "other": {"label": other.label, "run_id": other.run_id} if other else None,
        "orders": orders,
        "default_order": orders[0]["metric"] if orders else "",
        "shown": shown,
        "better": {name: metric(name).higher_is_better for name in shown},
        "rows": [
            _row(row, values[row["key"]], theirs.get(row["key"], {}), store, run_id, other, their_rows) for row in own
        ],
    }
    # "</" would end the script element that holds the data.
    text = json.dumps(clean(content), ensure_ascii=False).replace("</", "<\\/")
    page = folder / "review.html"
    partial = page.with_name("review.html.tmp")
    with full_disk_named(page, partial):
        partial.write_text(TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text), encoding="utf-8")
        partial.replace(page)
    return page


def radar_spec(result: SuiteResult, other: OtherRun | None = None) -> dict[str, Any] | None:
    """Judge means by category (or by axis when there are too few categories), 1 to 5."""
    by_category = {f.category: f.value for f in result.figures if f.metric == "judge" and f.category}
    axes = {f.metric.removeprefix("judge/"): f.value for f in result.figures if _is_axis(f.metric) and not f.category}
    chosen = by_category if len(by_category) > 2 else axes
    if len(chosen) < 3:
        return None
    series: list[dict[str, Any]] = [{"name": "this run", "values": list(chosen.values())}]
    if other:
        figures = {f.category or f.metric.removeprefix("judge/"): f.value for f in other.saved.figures
                   if (f.metric == "judge" and f.category) or (_is_axis(f.metric) and not f.category)}  # fmt: skip
        series.append({"name": other.label, "values": [figures.get(name) for name in chosen]})
    return {"axes": list(chosen), "low": 1, "high": 5, "series": series}


def _is_axis(metric: str) -> bool:
    return metric.startswith("judge/") and not metric.endswith("_macro")


def _ordered(names: set[str]) -> list[str]:
    head = [m.name for m in headline_metrics() if m.name in names]
    axes = sorted(name for name in names if name.startswith("judge/"))
    return head[:1] + axes + head[1:] + sorted(names - set(head) - set(axes))


def _figure_rows(result: SuiteResult, other: OtherRun | None, headline: bool) -> list[dict[str, Any]]:
    identity = {(f.metric, f.category): f.value for f in result.identity}
    theirs = {(f.metric, f.category): f.value for f in other.saved.figures} if other else {}
    by_name = {(f.metric, f.category): f for f in result.figures}
    order = [(m.name, "") for m in headline_metrics() if (m.name, "") in by_name]
    if not headline:
        order = [key for key in by_name if key not in order]
    rows = []
    for name, category in order:
        f = by_name[name, category]
        label = f"{name} · {category}" if category else name
        values = {"value": f.value, "low": f.low, "high": f.high, "num_valid": f.num_valid, "num_failed": f.num_failed}
        compared = {"identity": identity.get((name, category)), "other": theirs.get((name, category))}
        rows.append({"label": label} | values | compared)
    return rows


def _row(
    row: Row,
    values: Mapping[str, float],
    other_values: Mapping[str, float],
    store: Store,
    run_id: str,
    other: OtherRun | None,
    their_rows: Mapping[str, Row],
) -> dict[str, Any]:
    judged = [j for j in row.get("judgements", ()) if j["parsed"]["reasoning"]]
    faults = list(row.get("defects", ()))
    if row["failure"]:
        faults.insert(0, f"{row['failure']}: {row.get('detail', '')}".strip(": "))
    faults += sorted({f"judge: {j['parsed']['failure']}" for j in row.get("judgements", ()) if j["parsed"]["failure"]})
    media = []
    if not row["failure"]:
        media = _media(row, store, run_id, other, their_rows.get(row["key"]))
    return {
        "key": row["key"],
        "category": row["item"]["category"],
        "text": row["item"]["text"],
        "seed": row["seed"],
        "fault": "; ".join(faults),
        "values": dict(values),
        "other_values": dict(other_values),
        "reasoning": judged[0]["parsed"]["reasoning"] if judged else "",
        "media": media,
    }


def _media(row: Row, store: Store, run_id: str, other: OtherRun | None, their_row: Row | None) -> list[dict[str, Any]]:
    inputs, media = store.entry("inputs", row["inputs"]), store.entry("media", row["media"])
    record: InputsRecord = store.kept("inputs", row["inputs"])
    base, film = f"media/{row['key']}", record["num_frames"] > 1
    entries = []

    def add(label: str, name: str, poster: Path, run: str = run_id, is_film: bool = film) -> None:
        entries.append(
            {"label": label, "path": f"{base}/{name}", "run": run, "film": is_film, "poster": _poster(poster)}
        )  # fmt: skip

    if "source" in record["has"]:
        add("source", "source.mp4" if film else "source.png", inputs / "source.png")
    for n in range(record["references"]):
        add("reference", f"reference{n}.png", inputs / f"reference{n}.png", is_film=False)
    if other and their_row and not their_row["failure"]:
        theirs = store.entry("media", their_row["media"]) / THUMB
        if theirs.is_file():
            add(other.label, "result.mp4" if film else THUMB, theirs, run=other.run_id)
    if "target" in record["has"]:
        add("target", "target.mp4" if film else "target.png", inputs / "target.png")
    # The result comes last: it leads the synced players.
    add("result", "result.mp4" if film else THUMB, media / THUMB)
    return entries


def _poster(path: Path) -> str:
    buffer = io.BytesIO()
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((200, 120))
    picture.save(buffer, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
