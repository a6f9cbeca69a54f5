"""What a round of generated samples keeps: begun, filled prompt by prompt, finished, and read back for training.

A round is a folder: ``begun.json`` with all that decides its results; ``results/DATASET/KEY.safetensors`` and ``.json``
for every prompt, each written when it is whole, so that a round that was interrupted goes on; then ``index.parquet``
with a row a result, and at last ``round.json`` with the lineage: datasets, policy, settings, counts of failures.
Sources, references and MLLM states stay in the shards they came from.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.reading import ReadingConfig, ReadTally
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.recipe import RemoteDataset

BEGUN_FILE, ROUND_FILE, INDEX_FILE = "begun.json", "round.json", "index.parquet"
KEPT_COLUMNS = (
    "task", "width", "height", "num_frames", "dit_tokens", "mllm_tokens", "num_bytes", "members", "licence"
)  # fmt: skip


def round_name(number: int) -> str:
    """The name of a round's folder, and of the dataset that it is."""
    return f"round-{number:04d}"


@dataclass(frozen=True)
class Prompt:
    """A row of a dataset that is asked in a round."""

    dataset: int
    row: int
    key: str

    def results(self, folder: Path) -> Path:
        """Where a round keeps its latents; two datasets may have a key in common."""
        return folder / "results" / str(self.dataset) / f"{self.key}.safetensors"


def begin_round(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what decides a round's results, or hold a round that goes on to what it was begun with.

    Args:
        folder: The round.
        settings: Plain values by their names.

    Raises:
        UserError: naming what differs: half of the results would be of other settings than the lineage says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, now = folder / BEGUN_FILE, json.loads(json.dumps(settings))
    if not note.is_file():
        partial = note.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(partial, note)
        return
    begun = json.loads(note.read_text())
    changed = [name for name in sorted({*begun, *now}) if begun.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{name}={begun.get(name)} (now {now.get(name)})" for name in changed[:3])
        raise UserError(
            f"{folder}: was begun with {told}; go on with these, or remove the folder, and the round is made from its "
            "beginning"
        )


def finish_round(
    folder: Path,
    number: int,
    facts: Sequence[dict[str, Any]],
    datasets: Sequence[Any],
    urls: Sequence[str],
    lineage: Mapping[str, Any],
    watched: Sequence[str],
) -> dict[str, Any]:
    """Write the index and the lineage of a round whose results are all there; returns its summary.

    Raises:
        UserError: if no result was scored.
    """
    rows, asked = [], Counter(fact["prompt"]["key"] for fact in facts)
    for fact in facts:
        prompt = fact["prompt"]
        parent = datasets[prompt["dataset"]].index.slice(prompt["row"], 1).to_pylist()[0]
        key = prompt["key"] if asked[prompt["key"]] == 1 else f"{prompt['key']}-d{prompt['dataset']}"
        for repeat, (score, reward) in enumerate(zip(fact["scores"], fact["rewards"], strict=True)):
            kept = {name: parent[name] for name in KEPT_COLUMNS if name in parent}
            rows.append(
                kept | {
                    "key": f"{key}-r{number}-{repeat}"[-80:],
                    "dataset": round_name(number),
                    "split": "train" if reward is not None else "failed",
                    "num_windows": 1,
                    "parent_dataset": prompt["dataset"],
                    "parent_row": prompt["row"],
                    "parent_key": prompt["key"],
                    "window": fact["window"],
                    "repeat": repeat,
                    "reward": reward,
                    "total": score["total"],
                    "failure": score["failure"],
                    "floored": ",".join(score["floored"]),
                    "metrics": json.dumps(score["metrics"], sort_keys=True),
                }
            )  # fmt: skip
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / INDEX_FILE)
    scored = [score for fact in facts for score in fact["scores"] if score["total"] is not None]
    failures = Counter(score["failure"] for fact in facts for score in fact["scores"] if score["failure"])
    summary = {
        "round": number,
        "results": len(rows),
        "used": sum(row["reward"] is not None for row in rows),
        "failures": dict(failures),
        "floored": sum(bool(score["floored"]) for score in scored),
        "reward": _mean([score["total"] for score in scored]),
        "rewards": {n: _mean([s["rewards"][n] for s in scored]) for n in (scored[0]["rewards"] if scored else {})},
        "watched": {n: _mean([s["metrics"][n] for s in scored if n in s["metrics"]]) for n in watched},
        "datasets": {url: dataset.digest for url, dataset in zip(urls, datasets, strict=True)},
        "index_sha256": hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest(),
        **lineage,
    }
    if not summary["used"]:
        raise UserError(
            f"{folder}: no result of round {number} could be scored and compared: {dict(failures)}; when whoever "
            "scores is back, run again: what failed so is made again, all else is kept"
        )
    partial = folder / f"{ROUND_FILE}.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, folder / ROUND_FILE)
    return summary


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


class RoundDataset:
    """A finished round as the training loop reads it: conditioning from the shards, targets from the round.

    Args:
        folder: The round's folder.
        open_parent: Opens a dataset of the run by URL.

    Raises:
        UserError: for a round of an earlier version.
    """

    def __init__(self, folder: str | Path, open_parent: Callable[[str], Any] = ShardDataset.open):
        self.folder, self._open_parent = Path(folder), open_parent
        if any((self.folder / "results").glob("*.json")):
            raise UserError(
                f"{self.folder}: made by an earlier version, which kept the results of all datasets together; remove "
                "the round, and it is made again"
            )
        self.facts = json.loads((self.folder / ROUND_FILE).read_text())
        self.index = pq.read_table(self.folder / INDEX_FILE)

    @property
    def digest(self) -> str:
        """Names the content: prompts, results' places and scores."""
        return f"round-{self.facts['round']}-{self.facts['index_sha256'][:16]}"

    @cached_property
    def _parents(self) -> list[Any]:
        return [self._open_parent(url) for url in self.facts["datasets"]]

    def tally(self) -> ReadTally:
        """What this process has asked of object stores for the conditioning so far."""
        return sum((parent.tally() for parent in self._parents if isinstance(parent, RemoteDataset)), ReadTally())

    def read(self, row: int, select: Callable[[str, str], bool] | None = None) -> ShardSample:
        """The parent's sample of the round's window with the generated latents as its target."""
        place = self.index.slice(row, 1).to_pylist()[0]
        window = place["window"]
        sample = self._parents[place["parent_dataset"]].read(place["parent_row"])
        prompt = Prompt(place["parent_dataset"], place["parent_row"], place["parent_key"])
        with safe_open(prompt.results(self.folder), framework="pt") as file:
            made = file.get_tensor(str(place["repeat"]))
        tensors = dict(sample.tensors)
        tensors["target"] = {"mean.0": made}
        if "source" in tensors:
            tensors["source"] = {
                f"{kind}.0": tensors["source"][f"{kind}.{window}"]
                for kind in ("mean", "std")
                if f"{kind}.{window}" in tensors["source"]
            }
        metadata = sample.metadata | {"num_windows": 1, "mllm_index": [sample.metadata["mllm_index"][window]]}
        # The results were made for the first wording.
        metadata.pop("texts", None)
        return ShardSample(place["key"], metadata, tensors)


def is_finished(folder: Path) -> bool:
    """Whether a round is whole."""
    return (folder / ROUND_FILE).is_file()


def open_round_or_shards(url: str, reading: ReadingConfig | None = None) -> Any:
    """A round's folder as a :class:`RoundDataset`, anything else as shards, object stores asked as ``reading`` says."""
    open_parent = partial(ShardDataset.open, reading=reading)
    return RoundDataset(url, open_parent) if "://" not in url and is_finished(Path(url)) else open_parent(url)
