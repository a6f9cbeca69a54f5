"""``report.html``: one self-contained page that shows what a dataset is and what was lost on the way."""

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from loomvideo.model.codec import Codec, build_codec
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.prepare.reasons import MEANINGS
from loomvideo.platform.shards.index import SCORE_PREFIX
from loomvideo.platform.shards.manifest import QUARANTINE_FILE
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.sample import ShardSample

REPORT_FILE = "report.html"
_FRAMES_SHOWN = 4
_THUMBNAIL_HEIGHT = 96
_BINS = 24
_EXAMPLES_PER_REASON = 3


def report_html(dataset: ShardDataset, codec: Codec | None, num_samples: int = 24, title: str = "") -> str:
    """The page.

    Args:
        dataset: A finished dataset.
        codec: Decodes latents for the contact sheets; None leaves pictures out.
        num_samples: Samples shown, spread over tasks.
        title: The title of the page.
    """
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
        _section("Samples", _sheets(dataset, codec, num_samples)),
    ]  # fmt: skip
    return _PAGE.format(title=html.escape(title or dataset.storage.url), body="\n".join(parts))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


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
    rows = pq.read_table(io.BytesIO(dataset.storage.read_bytes(QUARANTINE_FILE))).to_pylist()
    counts = Counter((row["outcome"], row["stage"], row["reason"]) for row in rows)
    table = []
    for (outcome, stage, reason), count in counts.most_common():
        examples = [row for row in rows if (row["outcome"], row["stage"], row["reason"]) == (outcome, stage, reason)]
        shown = "; ".join(
            f"{row['key']}: {(row['message'] or '').strip().splitlines()[-1][:160] if row['message'] else ''}"
            for row in examples[:_EXAMPLES_PER_REASON]
        )
        meaning = MEANINGS.get(reason, "")
        row = {"outcome": outcome, "stage": stage, "reason": reason, "meaning": meaning, "samples": count}
        table.append(row | {"examples": shown})
    return _table(table)


def _histograms(index) -> str:
    names = ["num_frames", "dit_tokens", "mllm_tokens", "num_bytes"]
    names += [name for name in index.column_names if name.startswith(SCORE_PREFIX)]
    figures = []
    for name in names:
        values = np.array([v for v in index.column(name).to_pylist() if v is not None], float)
        if len(values):
            figures.append(_histogram(name.removeprefix(SCORE_PREFIX), values))
    return f'<div class="grid">{"".join(figures)}</div>'


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


def _sheets(dataset: ShardDataset, codec: Codec | None, count: int) -> str:
    by_task: dict[str, list[int]] = {}
    for row, task in enumerate(dataset.index.column("task").to_pylist()):
        by_task.setdefault(task, []).append(row)
    chosen = []
    for rows in by_task.values():
        wanted = max(count // max(len(by_task), 1), 1)
        chosen += rows[:: max(len(rows) // wanted, 1)][:wanted]
    return "".join(_sheet(dataset.read(row, select=_latents_of_first_window), codec) for row in chosen)


def _latents_of_first_window(member: str, name: str) -> bool:
    return name == "mean.0" if member in ("target", "source") else member == "refs" and name.startswith("mean.")


def _sheet(sample: ShardSample, codec: Codec | None) -> str:
    metadata = sample.metadata
    strips = ""
    if codec is not None:
        for member in ("source", "target", "refs"):
            latents = list(sample.tensors.get(member, {}).values())
            if latents:
                pictures = "".join(_picture(frame) for latent in latents for frame in _frames(codec, latent))
                strips += f'<div class="strip"><label>{member}</label>{pictures}</div>'
    scores = ", ".join(f"{name} {value:.3g}" for name, value in metadata.get("scores", {}).items())
    reasons = ", ".join(metadata.get("reasons", []))
    details = json.dumps({k: metadata.get(k) for k in ("bucket", "num_frames", "windows", "licence", "group")})
    return (
        f"<article><h3>{html.escape(sample.key)} <em>{html.escape(metadata['task'])}, "
        f"{html.escape(metadata['split'])}</em></h3><p>{html.escape(metadata['text'])}</p>{strips}"
        f"<small>{html.escape(scores)} {html.escape(reasons)} {html.escape(details)}</small></article>"
    )


def _frames(codec: Codec, latent: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        video = codec.decode(latent[None].float())[0]
    chosen = sorted({round(i) for i in np.linspace(0, video.shape[1] - 1, _FRAMES_SHOWN)})
    frames = (video[:, chosen] * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(frames.permute(1, 2, 3, 0).numpy())


def _picture(frame: np.ndarray) -> str:
    from PIL import Image

    image = Image.fromarray(frame)
    image = image.resize((max(round(image.width * _THUMBNAIL_HEIGHT / image.height), 1), _THUMBNAIL_HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def report_codec(dataset: ShardDataset) -> Codec | None:
    """The codec that shows a dataset's latents, when it needs no weights."""
    name = dataset.manifest.config.get("model")
    if name is None or not model_size(name).codec.is_built_in:
        return None
    return build_codec(model_size(name).codec)


def write_report(dataset: ShardDataset, num_samples: int = 24) -> str:
    """Write ``report.html`` into the dataset folder; returns its path or URL."""
    page = report_html(dataset, report_codec(dataset), num_samples)
    dataset.storage.write_bytes(REPORT_FILE, page.encode())
    return f"{dataset.storage.url}/{REPORT_FILE}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.1rem; border-bottom: 1px solid #ccc; }}
h3 {{ font-size: .95rem; margin: 0; }} em {{ font-weight: normal; color: #777; }} th {{ white-space: nowrap; }}
table {{ border-collapse: collapse; margin: .5rem 0; }} td, th {{ padding: .15rem .6rem; text-align: left;
border-bottom: 1px solid #eee; vertical-align: top; }} td {{ overflow-wrap: break-word; }}
.grid {{ display: flex; flex-wrap: wrap; gap: 1rem; }} figure {{ margin: 0; width: 200px; }}
svg {{ width: 100%; background: #f6f6f6; }} rect {{ fill: #47a; }} small {{ color: #777; overflow-wrap: anywhere; }}
.bar {{ position: relative; background: #f6f6f6; margin: 2px 0; padding: 2px 6px; }}
.bar span {{ position: absolute; inset: 0 auto 0 0; background: #47a4; }}
article {{ border-top: 1px solid #eee; padding: .6rem 0; }} article p {{ margin: .2rem 0; }}
.strip {{ display: flex; gap: 2px; align-items: center; flex-wrap: wrap; }} .strip label {{ width: 4rem; color: #777; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
