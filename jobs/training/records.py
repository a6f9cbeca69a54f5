"""What a training run leaves in MLflow beside its curves: the datasets it was made from, and the model it made."""

import json
from collections import Counter
from typing import Any

from loomvideo.model.fingerprints import weights_fingerprint
from loomvideo.platform.registry import FINGERPRINT, WEIGHTS_FINGERPRINT
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.tracking import Tracker


def dataset_profile(dataset: ShardDataset) -> dict[str, Any]:
    """Counts that a person wants before the shards are opened: samples by task and split, and licences."""
    columns = {name: dataset.index.column(name).to_pylist() for name in ("task", "split", "licence")}
    counts = {name: dict(sorted(Counter(values).items())) for name, values in columns.items()}
    return {"samples": len(dataset), "tasks": counts["task"], "splits": counts["split"], "licences": counts["licence"]}


def record_datasets(tracker: Tracker, urls: list[str], datasets: list[ShardDataset]) -> None:
    """Tie every shard dataset to the run, with its digest, counts and licences."""
    for url, dataset in zip(urls, datasets, strict=True):
        name = url.rstrip("/").rsplit("/", 1)[-1]
        tracker.log_dataset(name, dataset.digest, url, "training", json.dumps(dataset_profile(dataset)))


def record_model(
    tracker: Tracker, folder: RunFolder, size: str, result: dict[str, Any], lineage: dict[str, str]
) -> None:
    """The run's LoggedModel: a record of the exported weights, which stay where they are.

    Args:
        tracker: Where the run is tracked.
        folder: The folder of the run.
        size: The model's size.
        result: What the job ended with, ``weights`` and ``steps`` among it.
        lineage: The run's tags on datasets and parents.
    """
    print_of = weights_fingerprint(result["weights"])
    tags = {
        FINGERPRINT: print_of,
        WEIGHTS_FINGERPRINT: print_of,
        "loomvideo.weights": result["weights"],
        "loomvideo.run": f"{folder.job}/{folder.name}",
        **lineage,
    }
    params = {"model": size, "steps": result["steps"]}
    tracker.log_model(f"{folder.job}-{folder.name}".replace(".", "-"), params, tags, result["steps"])
