"""``loomvideo data import``: what is understood of a dataset, shown before anything is written."""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.samples import Sample, media_paths
from loomvideo.pipelines.sources.survey import Survey, looked_at_media, survey
from loomvideo.platform.config import option
from loomvideo.platform.console import console, table
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.storage import Storage

SAMPLES_FILE = "samples.jsonl"
LEDGER_FILE = "import.parquet"
LEDGER_SCHEMA = pa.schema([(name, pa.string()) for name in ("where", "dataset", "reason", "detail")])


@dataclass
class ImportConfig:
    """Any dataset to a sample file."""

    input: str = option("???", "a dataset in any layout of docs/sources.md; a local path or URL")
    format: str = option("auto", "layout of the input; `auto` recognises it, and asks where several fit")
    source_options: dict[str, Any] = option({}, "options of the layout, for example {columns: {target: video}}")
    output: str = option("", "folder for samples.jsonl, import.parquet and media out of tables; empty only shows")
    samples: int = option(10, "samples shown")
    rows: int = option(1000, "rows looked at before anything is written")
    yes: bool = option(False, "write without asking")


def run(config: ImportConfig) -> None:
    """Show, ask, write.

    Raises:
        UserError: when something is unclear, or nothing is understood.
    """
    if config.samples < 1 or config.rows < config.samples:
        raise UserError(f"samples={config.samples} rows={config.rows}: show at least one, and look at as many rows")
    extract_to = f"{config.output.rstrip('/')}/extracted" if config.output else ""
    found = survey(config.input, config.format, config.source_options, config.samples, config.rows, extract_to)
    show(found)
    if found.questions:
        raise UserError("not clear:\n" + "\n".join(f"  {question}" for question in found.questions))
    if not found.samples:
        first = next((first for _, first in found.rejected.values()), "it is empty")
        raise UserError(f"input={config.input}: no sample in what was looked at; first: {first}")
    if not config.output:
        print("nothing written; with output=DIR the sample file for `data prepare`, `data cut` and `data caption`")
        return
    if not config.yes and not (sys.stdin.isatty() and typer.confirm(f"Write this to {config.output}?")):
        raise UserError("nothing written; add yes=true where nobody can be asked")
    counts = write(config, extract_to)
    rejected = sum(count for reason, count in counts.items() if reason)
    print(f"{config.output}/{SAMPLES_FILE}: {counts['']} samples; {rejected} rows rejected, see {LEDGER_FILE}")


def show(found: Survey) -> None:
    """Print what was understood."""
    out = console()
    out.print(f"{found.place}: format {found.format}: {found.help}", soft_wrap=True)
    if found.fields:
        columns = table("field", "column", "for example", title="columns")
        for row in found.fields:
            columns.add_row(*row)
        out.print(columns)
        if found.unused:
            out.print(f"no field, kept in `extra` where plain: {', '.join(found.unused)}", soft_wrap=True)
    media = looked_at_media(found.samples)
    for number, sample in enumerate(found.samples, 1):
        out.print(_sample_table(number, sample, media))
    looked_at = table("what", "rows", "first case", title="all of it" if found.complete else "its first rows")
    for task, count in sorted(found.counts.items()):
        looked_at.add_row(task, str(count), "")
    for reason, (count, first) in sorted(found.rejected.items()):
        looked_at.add_row(reason, str(count), first)
    out.print(looked_at)


def _sample_table(number: int, sample: Sample, media: dict[str, str]) -> Any:
    rows = table(title=f"{number}. {sample.key}: {sample.task}")
    for name in ("instruction", "caption", "licence", "group", "split"):
        value = getattr(sample, name)
        if value:
            rows.add_row(name, str(value))
    names = {sample.target: "target", **({sample.source: "source"} if sample.source else {})}
    for path in media_paths(sample):
        rows.add_row(names.get(path, "reference"), f"{path} ({media[path]})")
    return rows


def write(config: ImportConfig, extract_to: str) -> Counter[str]:
    """Write samples and ledger; returns rows by reason, samples under the empty one."""
    storage = Storage(config.output)
    counts: Counter[str] = Counter()
    rejected: list[dict[str, str]] = []
    with storage.staged(SAMPLES_FILE) as path, path.open("w", encoding="utf-8") as out:
        for outcome in open_source(config.input, config.format, extract_to, **config.source_options):
            sample = outcome.unfinished if isinstance(outcome, Rejected) else outcome
            if sample is not None:
                out.write(sample.to_json() + "\n")
            counts[outcome.reason if isinstance(outcome, Rejected) and sample is None else ""] += 1
            if sample is None:
                rejected.append({name: getattr(outcome, name) for name in LEDGER_SCHEMA.names})
    with storage.staged(LEDGER_FILE) as path:
        pq.write_table(pa.Table.from_pylist(rejected, LEDGER_SCHEMA), path)
    return counts
