"""Files beside ours with which other readers open a dataset: wids' shard list and Energon's dataset description.

Energon's own index (``.nv-meta/index.sqlite`` and a list of offsets beside every tar) is its to write: run
``energon prepare --tar-index-only`` on the folder.
"""

import json

from loomvideo.platform.shards.manifest import Manifest
from loomvideo.platform.shards.storage import Storage

WIDS_FILE = "wids.json"
ENERGON_FOLDER = ".nv-meta"
_ENERGON_SPLITS = {"train": "train", "heldout": "val"}


def write_interop(storage: Storage, manifest: Manifest) -> None:
    """Write ``wids.json``, and ``dataset.yaml``, ``split.yaml`` and ``.info.json`` in ``.nv-meta``."""
    storage.write_bytes(WIDS_FILE, wids_index(manifest).encode())
    storage.write_bytes(f"{ENERGON_FOLDER}/dataset.yaml", _DATASET_YAML.encode())
    storage.write_bytes(f"{ENERGON_FOLDER}/split.yaml", energon_split(manifest).encode())
    storage.write_bytes(f"{ENERGON_FOLDER}/.info.json", energon_info(manifest).encode())


def wids_index(manifest: Manifest) -> str:
    """The shard list of wids."""
    counts = _samples_in_tars(manifest)
    shards = [
        {"url": shard.path, "nsamples": counts[shard.path], "filesize": shard.num_bytes} for shard in manifest.shards
    ]
    return json.dumps({"wids_version": 1, "name": "loomvideo", "shardlist": shards}, indent=1) + "\n"


def energon_info(manifest: Manifest) -> str:
    """Energon's number of samples a tar."""
    return json.dumps({"shard_counts": _samples_in_tars(manifest)}, indent=1) + "\n"


def _samples_in_tars(manifest: Manifest) -> dict[str, int]:
    """What lies in the tars, removed samples too."""
    removed = manifest.removed_by_shard
    return {shard.path: shard.num_samples + len(removed.get(shard.name, ())) for shard in manifest.shards}


def energon_split(manifest: Manifest) -> str:
    """Energon's split parts, with removed samples excluded. JSON is YAML."""
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for shard in manifest.shards:
        parts[_ENERGON_SPLITS.get(shard.split, "test")].append(shard.path)
    paths = {shard.name: shard.path for shard in manifest.shards}
    exclude = [f"{paths[name]}/{key}" for name, keys in sorted(manifest.removed_by_shard.items()) for key in keys]
    return json.dumps({"split_parts": parts, "exclude": exclude}, indent=1) + "\n"


_DATASET_YAML = """\
__module__: megatron.energon
__class__: CrudeWebdataset
subflavors:
  format: loomvideo-shards-v1
"""
