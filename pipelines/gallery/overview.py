"""The report's sections on the dataset as a whole: what it is, its accounts, what was lost and why, distributions."""

import html
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loomvideo.pipelines.prepare.curation.options import REASONS
from loomvideo.pipelines.prepare.reasons import MEANINGS
from loomvideo.platform.shards.index import SCORE_PREFIX
from loomvideo.platform.shards.manifest import QUARANTINE_FILE
from loomvideo.platform.shards.reader import ShardDataset

_BINS = 24
_EXAMPLES_PER_REASON = 3


class _Markup(str):
    """Text that is HTML already."""


def overview(dataset: ShardDataset) -> str:
    """What the dataset is, in sections of HTML."""
    manifest, index = dataset.manifest, dataset.index
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    facts = {
        "samples": len(dataset),
        "shards": len(manifest.shards),
        "megabytes": f"{num_bytes / 1e6:.1f}",
        "digest": dataset.digest[:16],
        **{f"{name} encoder": value for name, value in manifest.encoders.items()},
        "features": f"{manifest.features.get('mode', '')} {manifest.features.get('dtype', '')}",
    }
    error = manifest.features.get("error") or {}
    if error.get("tokens"):
        worst = max(error["layers"])
        facts["feature error"] = f"{worst:.4f} relative in the worst layer, {error['embedder']:.4f} behind an embedder"
    parts = [
        _section("Dataset", _table([facts])),
        _section("Accounts", _funnel(manifest.counts)),
        _section("Losses", _losses(dataset)),
        _section("Content", _table(_groups(index, ["split", "task"])) + _table(_groups(index, ["width", "height"]))
                 + _table(_groups(index, ["licence"]))),
        _section("Distributions", _histograms(index)),
    ]  # fmt: skip
    return "\n".join(parts)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return value if isinstance(value, _Markup) else html.escape(str(value))


def _groups(index, columns: list[str]) -> list[dict[str, Any]]:
    found = index.group_by(columns).aggregate([([], "count_all"), ("num_bytes", "sum")])
    rows = sorted(found.to_pylist(), key=lambda row: tuple(str(row[c]) for c in columns))
    return [
        {**{c: row[c] for c in columns}, "samples": row["count_all"], "MB": f"{row['num_bytes_sum'] / 1e6:.1f}"}
        for row in rows
    ]


def _funnel(counts: dict[str, dict[str, int]]) -> str:
    rows = []
    total: Counter[str] = Counter()
    for name, count in counts.items():
        total.update(count)
        rows.append({"dataset": name, **count})
    rows.append({"dataset": "all", **{name: total[name] for name in rows[0] if name != "dataset"}} if rows else {})
    bars = ""
    for name in ("inputs", "written", "filtered", "duplicates", "quarantined", "removed"):
        if total[name]:
            width = 100 * total[name] / max(total["inputs"], 1)
            bars += f'<div class="bar"><span style="width:{width:.1f}%"></span>{name} {total[name]}</div>'
    return bars + _table(rows)


def _losses(dataset: ShardDataset) -> str:
    if not dataset.storage.exists(QUARANTINE_FILE):
        return "<p>none</p>"
    columns = ["outcome", "stage", "reason", "key", "message"]
    ledger = pq.read_table(pa.BufferReader(dataset.storage.read_bytes(QUARANTINE_FILE)), columns=columns)
    kinds = ledger.group_by(columns[:3]).aggregate([([], "count_all")]).sort_by([("count_all", "descending")])
    table = []
    for kind in kinds.to_pylist():
        same = [pc.equal(ledger[name], kind[name]) for name in columns[:3]]
        rows = ledger.filter(pc.and_(pc.and_(same[0], same[1]), same[2])).slice(0, _EXAMPLES_PER_REASON).to_pylist()
        shown = "; ".join(
            f"{row['key']}: {(row['message'] or '').strip().splitlines()[-1][:160] if row['message'] else ''}"
            for row in rows
        )
        reason = kind["reason"]
        link = _Markup(f'<a href="#reason={html.escape(quote(reason))}">{html.escape(reason)}</a>')
        row = {
            "outcome": kind["outcome"],
            "stage": kind["stage"],
            "reason": link,
            "meaning": (MEANINGS | REASONS).get(reason, ""),
        }
        table.append(row | {"samples": kind["count_all"], "examples": shown})
    return _table(table)


def _histograms(index: pa.Table) -> str:
    names = ["num_frames", "dit_tokens", "mllm_tokens", "num_bytes"]
    names += [name for name in index.column_names if name.startswith(SCORE_PREFIX)]
    figures = []
    for name in names:
        values = index.column(name).drop_null().to_numpy().astype(float)
        if len(values):
            figures.append(_histogram(name.removeprefix(SCORE_PREFIX), values))
    return f'<div class="figures">{"".join(figures)}</div>'


def _histogram(name: str, values: np.ndarray) -> str:
    counts, edges = np.histogram(values, bins=_BINS)
    top = max(int(counts.max()), 1)
    bars = "".join(
        f'<rect x="{8 * i}" y="{60 - 60 * c / top:.1f}" width="7" height="{60 * c / top:.1f}">'
        f"<title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {c}</title></rect>"
        for i, c in enumerate(counts.tolist())
    )
    low, middle, high = values.min(), np.median(values), values.max()
    return (
        f'<figure><figcaption>{html.escape(name)}</figcaption><svg viewBox="0 0 {8 * _BINS} 60">{bars}</svg>'
        f"<small>{low:.4g} … median {middle:.4g} … {high:.4g}</small></figure>"
    )
