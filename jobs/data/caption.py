"""``loomvideo data caption``: texts for a dataset, with progress, a sample file and a ledger."""

import contextlib
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from loomvideo.pipelines.captions.dataset import (
    CaptionDatasetConfig,
    CaptionedDataset,
    ask_actors,
    ask_server,
    caption_dataset,
)
from loomvideo.pipelines.captions.ray_llm import ask_ray_llm
from loomvideo.platform.console import bars, console, table
from loomvideo.platform.shards.storage import Storage

SAMPLES_FILE = "samples.jsonl"
LEDGER_FILE = "captions.parquet"
LEDGER_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "dataset", "status", "model", "digest", "detail")]
    + [("written", pa.bool_())]
)


def run(config: CaptionDatasetConfig) -> None:
    """Make the texts, write the files, print the accounts."""
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(bars())
        task = bar.add_task("texts", total=None)
        ask = ask_server
        config.captions.check()
        if config.captions.backend in ("transformers", "vllm"):
            from loomvideo.platform.ray_session import ray_session

            stack.enter_context(ray_session())
            ask = (ask_actors if config.captions.backend == "transformers" else ask_ray_llm)(config.workers)
        result = caption_dataset(
            config,
            ask,
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda cost: bar.console.print(f"{cost} (estimated; answers in {config.captions.cache} cost nothing)"),
        )
    write(result, Storage(config.output))
    counts = Counter((row["status"], row["written"]) for row in result.ledger)
    title = f"{config.output}: {len(result.samples)} of {len(result.ledger)} samples have a text"
    accounts = table("status", "samples", "written", title=title)
    for (status, written), count in sorted(counts.items(), key=lambda item: -item[1]):
        accounts.add_row(status, str(count), "yes" if written else "no")
    console().print(accounts)


def write(result: CaptionedDataset, storage: Storage) -> None:
    """Write the ledger, then the samples: when they are there, all is."""
    with storage.staged(LEDGER_FILE) as path:
        pq.write_table(pa.Table.from_pylist(result.ledger, LEDGER_SCHEMA), path)
    storage.write_bytes(SAMPLES_FILE, "".join(sample.to_json() + "\n" for sample in result.samples).encode())
