"""``loomvideo data inspect``: what a dataset holds, in a page of text."""

import json

import pyarrow.compute as pc
from rich.console import Console

from loomvideo.platform.console import table_of
from loomvideo.platform.shards.reader import ShardDataset

HEADERS = {
    "num_frames": "frames",
    "count_all": "samples",
    "num_bytes_mean": "bytes each",
    "dit_tokens_mean": "DiT tokens",
    "mllm_tokens_mean": "MLLM tokens",
}
"""Of aggregated index columns; means are over samples."""


def inspect_dataset(url: str, console: Console) -> None:
    """Print counts, sizes, tasks, buckets and one sample's members."""
    dataset = ShardDataset.open(url)
    manifest, index = dataset.manifest, dataset.index
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    console.print(
        f"{url}: {len(dataset)} samples in {len(manifest.shards)} shards, {num_bytes / 1e6:.1f} MB, "
        f"digest {dataset.digest[:16]}",
        soft_wrap=True,
    )
    for name, value in {"encoders": manifest.encoders, "features": manifest.features}.items():
        console.print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in value.items()), soft_wrap=True)
    _table(console, "accounts", [{"dataset": name, **count} for name, count in manifest.counts.items()])
    measures = [([], "count_all"), ("num_bytes", "mean"), ("dit_tokens", "mean"), ("mllm_tokens", "mean")]
    for title, keys in (("tasks", ["split", "task"]), ("buckets", ["width", "height", "num_frames"])):
        groups = index.group_by(keys).aggregate(measures).sort_by([(key, "ascending") for key in keys]).to_pylist()
        _table(console, title, [{HEADERS.get(name, name): value for name, value in row.items()} for row in groups])
    if len(dataset):
        _print_sample(dataset, console)


def _print_sample(dataset: ShardDataset, console: Console) -> None:
    # The sample with most members says most about the format.
    row = pc.list_value_length(dataset.index.column("members")).to_pylist()
    row = row.index(max(row))
    sample = dataset.read(row)
    members = [
        {"member": member, "tensor": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[-1]}
        for member, tensors in sorted(sample.tensors.items())
        for name, tensor in sorted(tensors.items())
    ]
    _table(console, f"sample {sample.key}", members)
    console.print(json.dumps(sample.metadata, indent=1, ensure_ascii=False), soft_wrap=True, markup=False)
    shared = dataset.shared()
    _table(console, "shared tensors", [{"tensor": name, "shape": list(t.shape)} for name, t in shared.items()])


def _table(console: Console, title: str, rows: list[dict]) -> None:
    if rows:
        console.print(table_of(rows, title))
