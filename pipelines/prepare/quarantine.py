"""The ledger of what was not written: list it, try it again, export it."""

import dataclasses
import io
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.job import CONFIG_FILE
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.pipelines.prepare.stages import STAGES
from loomvideo.pipelines.sources.samples import stored_sample, write_jsonl
from loomvideo.platform.config import load_config
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.commits import commits, read_all
from loomvideo.platform.shards.manifest import QUARANTINE_FILE
from loomvideo.platform.shards.storage import Storage


def ledger(url: str) -> list[Outcome]:
    """The losses of a dataset, each with its sample where that is known.

    Raises:
        UserError: if there is none.
    """
    storage = Storage(url)
    if not storage.exists(QUARANTINE_FILE):
        raise UserError(f"{url}: no {QUARANTINE_FILE}; run `loomvideo data prepare` first")
    table = pq.read_table(io.BytesIO(storage.read_bytes(QUARANTINE_FILE)))
    known = [field.name for field in dataclasses.fields(Outcome) if field.name in table.column_names]
    return [Outcome(**row) for row in table.select(known).to_pylist()]


@dataclass(frozen=True)
class ReasonCount:
    """How many samples a stage lost for a reason."""

    outcome: str
    stage: str
    reason: str
    samples: int


def by_reason(losses: list[Outcome]) -> list[ReasonCount]:
    """The losses counted, most frequent first."""
    counts = Counter((loss.outcome, loss.stage, loss.reason) for loss in losses)
    return [ReasonCount(*group, count) for group, count in counts.most_common()]


def retriable_work(url: str) -> set[str]:
    """Names of the units, of any stage, that miss samples which another attempt may write."""
    wanted = {loss.key for loss in ledger(url) if loss.retriable}
    storage, work = Storage(url), set()
    for stage in STAGES if wanted else ():
        found = [commit for some in commits(storage, stage.folder).values() for commit in some]
        results = read_all(storage, stage.folder, [commit.file for commit in found])
        work |= {commit.unit for commit, result in zip(found, results, strict=True) if wanted & stage.lost(result)}
    return work


def saved_config(url: str) -> PrepareConfig:
    """The configuration of the last prepare that worked on the dataset.

    Raises:
        UserError: if none did.
    """
    storage = Storage(url)
    if not storage.exists(CONFIG_FILE):
        raise UserError(f"{url}: no {CONFIG_FILE}; run `loomvideo data prepare` with its configuration")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(storage.read_bytes(CONFIG_FILE))
        return load_config(PrepareConfig, [f"output={url}"], file)


def export(url: str, path: Path, reason: str = "") -> int:
    """Write the ledger's samples as JSONL that prepare can read; returns how many.

    Args:
        url: The dataset.
        path: The path of the file to write; media paths in it are those of the input.
        reason: Only of this reason.
    """
    chosen = [loss for loss in ledger(url) if loss.sample and (not reason or loss.reason == reason)]
    write_jsonl((stored_sample(loss.sample) for loss in chosen), path)
    return len(chosen)
