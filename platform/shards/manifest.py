"""``manifest.json``: what a dataset is made of, and the proof that nothing is missing."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from loomvideo.platform.errors import UserError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.parquet"
QUARANTINE_FILE = "quarantine.parquet"
SHARED_FILE = "shared.safetensors"
SHARD_FOLDER = "shards"


@dataclass(frozen=True)
class ShardEntry:
    """One finished tar."""

    name: str
    split: str
    sha256: str
    num_bytes: int
    num_samples: int

    @property
    def path(self) -> str:
        """File name inside the dataset folder."""
        return shard_path(self.name)


@dataclass(frozen=True)
class Manifest:
    """The dataset's table of contents; holds no times or paths, so equal content makes an equal file.

    Attributes:
        shards: Every tar with its checksum.
        config: The resolved configuration that made the dataset.
        encoders: Fingerprints of the codec and the MLLM.
        devices: Models of the GPUs that encoded it, or ``cpu``.
        features: How MLLM features are kept: mode, dtype, stored layers (empty: all) of num_layers, measured error.
        counts: ``{dataset: {inputs, written, filtered, duplicates, quarantined}}``.
        inputs: Digest and number of the input samples.
        recipe: Digest over input, configuration, encoders and code version: equal means up to date.
        shared_sha256: Checksum of the dataset-wide tensors, empty without any.
        index_sha256: Checksum of the index; empty in datasets from before it was kept.
        removed: ``[shard, key]`` of samples that are hidden and still lie in their tar.
    """

    shards: list[ShardEntry]
    config: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    features: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, str] = field(default_factory=dict)
    shared_sha256: str = ""
    index_sha256: str = ""
    removed: list[list[str]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """Names the dataset's content: a hash over the checksums of all shards and shared tensors."""
        lines = [f"{shard.name} {shard.sha256}" for shard in sorted(self.shards, key=lambda s: s.name)]
        gone = [f"removed {shard} {key}" for shard, key in self.removed]
        return hashlib.sha256("\n".join([*lines, self.shared_sha256, *gone]).encode()).hexdigest()

    @property
    def removed_by_shard(self) -> dict[str, list[str]]:
        """Keys of hidden samples, by shard."""
        found: dict[str, list[str]] = {}
        for shard, key in self.removed:
            found.setdefault(shard, []).append(key)
        return found

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    def to_json(self) -> str:
        """The file's text, the digest included for readers."""
        return json.dumps({**dataclasses.asdict(self), "digest": self.digest}, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes, where: str) -> "Manifest":
        """Parse a manifest.

        Raises:
            UserError: naming ``where`` if it is not a manifest of a version this code reads.
        """
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version == FORMAT_VERSION:
                return _parsed(values)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{where}: not a dataset manifest; prepare the dataset again") from error
        raise UserError(f"{where}: shard format {version}, this version reads {FORMAT_VERSION}; prepare it again")


def _parsed(values: dict[str, Any]) -> Manifest:
    """A manifest whose digest is the one it names.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: if it is none.
    """
    named = values.pop("digest", None)
    shards = [ShardEntry(**shard) for shard in values.pop("shards")]
    if not all(isinstance(shard.num_samples, int) and isinstance(shard.num_bytes, int) for shard in shards):
        raise ValueError("sizes of shards are whole numbers")
    manifest = Manifest(shards=shards, **values)
    for name in ("config", "encoders", "features", "counts", "inputs", "recipe"):
        if not isinstance(getattr(manifest, name), dict):
            raise ValueError(f"{name} is no object")
    if named is not None and manifest.digest != named:
        raise ValueError("its digest is another")
    return manifest


def shard_name(split: str, number: int) -> str:
    """``train-000003``."""
    return f"{split}-{number:06d}"


def shard_path(name: str) -> str:
    """``shards/train-000003.tar``."""
    return f"{SHARD_FOLDER}/{name}.tar"


def check_counts(counts: dict[str, dict[str, int]]) -> None:
    """Check that every input sample is accounted for, per dataset.

    Raises:
        RuntimeError: naming the dataset and the difference.
    """
    for dataset, count in counts.items():
        accounted = sum(value for name, value in count.items() if name != "inputs")
        if accounted != count["inputs"]:
            parts = " + ".join(f"{value} {name}" for name, value in count.items() if name != "inputs")
            raise RuntimeError(f"dataset {dataset!r}: {count['inputs']} inputs but {parts} = {accounted}")
