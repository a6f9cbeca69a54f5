"""Is a dataset what its manifest says? Checksums, offsets, shapes, and a few samples made again from their files."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loomvideo.model.codec import LatentGrid
from loomvideo.model.sizes import model_size, with_folders
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.encode import SampleEncoder
from loomvideo.pipelines.prepare.load import SampleLoader
from loomvideo.pipelines.prepare.pools import Pool, map_on_actors
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.shards.layers import expanded
from loomvideo.platform.shards.manifest import ShardEntry, check_counts, shard_path
from loomvideo.platform.shards.quantize import restore
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.sample import ShardSample, member_file_name

_READ_BYTES = 1 << 22
# A latent decoded and compared with its frames: above what the embedded codec loses on noise, below any mix-up.
MIN_PSNR_DB = 12.0
MIN_COSINE = 0.98


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    where: str
    what: str


class ShardVerifier:
    """Checks one shard after another; a Ray actor.

    Args:
        url: The dataset folder.
    """

    def __init__(self, url: str):
        self.dataset = ShardDataset.open(url)
        self._grid = model_size(self.dataset.manifest.config["model"]).grid
        self._shards = {shard.name: shard for shard in self.dataset.manifest.shards}
        self._rows = _rows_by_shard(self.dataset)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """The problems of a shard, as JSON."""
        name = row["shard"]
        found = _verify_shard(self.dataset, self._shards[name], self._rows.get(name, []), self._grid)
        return {"shard": name, "problems": json.dumps([[problem.where, problem.what] for problem in found])}


def verify_on_actors(dataset: ShardDataset, url: str, pool: Pool) -> Iterator[Problem]:
    """:func:`verify` with the tars read by a pool of actors; problems come in the order of the shards.

    Args:
        dataset: The dataset.
        url: Its folder, as the actors reach it.
        pool: How many actors, and what each reserves.
    """
    yield from _verify_index(dataset)
    work = [{"shard": shard.name} for shard in dataset.manifest.shards]
    found = {row["shard"]: row["problems"] for row in map_on_actors(ShardVerifier, (url,), work, pool)}
    for row in work:
        for where, what in json.loads(found[row["shard"]]):
            yield Problem(where, what)


def verify(dataset: ShardDataset) -> Iterator[Problem]:
    """Check everything that needs no raw file: each tar is read once."""
    yield from _verify_index(dataset)
    grid = model_size(dataset.manifest.config["model"]).grid
    rows = _rows_by_shard(dataset)
    for shard in dataset.manifest.shards:
        yield from _verify_shard(dataset, shard, rows.get(shard.name, []), grid)


def _rows_by_shard(dataset: ShardDataset) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, shard in enumerate(dataset.index.column("shard").to_pylist()):
        rows.setdefault(shard, []).append(row)
    return rows


def _verify_index(dataset: ShardDataset) -> Iterator[Problem]:
    """What needs no tar."""
    manifest, index = dataset.manifest, dataset.index
    try:
        check_counts(manifest.counts)
    except RuntimeError as error:
        yield Problem("manifest.json", str(error))
    keys = index.column("key").to_pylist()
    if len(set(keys)) != len(keys):
        yield Problem("index.parquet", "keys repeat")
    splits: dict[str, str] = {}
    groups, names = index.column("group").to_pylist(), index.column("split").to_pylist()
    for group, split in zip(groups, names, strict=True):
        if group and splits.setdefault(group, split) != split:
            yield Problem("index.parquet", f"group {group!r} is in splits {splits[group]} and {split}")
    known = {shard.name for shard in manifest.shards}
    for name in sorted(set(index.column("shard").unique().to_pylist()) - known):
        yield Problem("index.parquet", f"shard {name} is not in the manifest")


def _verify_shard(dataset: ShardDataset, shard: ShardEntry, rows: list[int], grid: LatentGrid) -> Iterator[Problem]:
    storage, path = dataset.storage, shard_path(shard.name)
    size = storage.size(path)
    if size != shard.num_bytes:
        yield Problem(path, f"{'missing' if size is None else f'{size} bytes'}, the manifest says {shard.num_bytes}")
        return
    hasher = hashlib.sha256()
    with storage.fs.open(storage.full_path(path), "rb") as opened:
        while chunk := opened.read(_READ_BYTES):
            hasher.update(chunk)
        if hasher.hexdigest() != shard.sha256:
            yield Problem(path, "checksum differs from the manifest's")
            return
        opened.seek(0)
        with tarfile.open(fileobj=opened) as tar:
            found = {member.name: (member.offset_data, member.size) for member in tar}
    if len(rows) != shard.num_samples:
        yield Problem(path, f"{len(rows)} index rows, the manifest says {shard.num_samples}")
    for row in rows:
        place = dataset.index.slice(row, 1).to_pylist()[0]
        for member, offset, num_bytes in zip(
            place["members"], place["member_offsets"], place["member_bytes"], strict=True
        ):
            if found.get(member_file_name(place["key"], member)) != (offset, num_bytes):
                yield Problem(f"{path}:{place['key']}", f"member {member} is not where the index says")
                break
        else:
            for what in shape_problems(dataset.read(row), grid):
                yield Problem(f"{path}:{place['key']}", what)


def shape_problems(sample: ShardSample, grid: LatentGrid) -> Iterator[str]:
    """What of a sample's tensors contradicts its metadata or the rules of the format."""
    metadata, tensors = sample.metadata, sample.tensors
    width, height = metadata["bucket"]
    if grid.whole_frames(metadata["num_frames"]) != metadata["num_frames"]:
        yield f"{metadata['num_frames']} frames are not {grid.frames_rule}"
    shape = grid.latent_shape(metadata["num_frames"], width, height)
    for member in ("target", "source"):
        for name, tensor in tensors.get(member, {}).items():
            if tuple(tensor.shape[1:]) != shape:
                yield f"{member} {name} is {list(tensor.shape[1:])}, the bucket says {list(shape)}"
    windows = {f"mean.{w}" for w in range(metadata["num_windows"])}
    for member in ("target", *(("source",) if "source" in tensors else ())):
        if {name for name in tensors.get(member, {}) if name.startswith("mean.")} != windows:
            yield f"{member} does not have {metadata['num_windows']} windows"
    prefix = "full" if metadata.get("features", "stored") == "stored" else "input_ids"
    strides = [number * metadata.get("text_stride", 0) for number in range(len(metadata.get("texts", [""])))]
    for entry in sorted({entry + stride for entry in metadata["mllm_index"] for stride in strides}):
        if f"{prefix}.{entry}" not in tensors.get("mllm", {}):
            yield f"mllm has no {prefix}.{entry}"
    for member, part in tensors.items():
        for name, tensor in part.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                yield f"{member} {name} has values that are not finite"


def verify_content(dataset: ShardDataset, config: PrepareConfig, num_samples: int) -> Iterator[Problem | str]:
    """Make some samples again from their files: decoded latents against frames, features against new ones.

    Yields:
        A problem, or a line that says how close a sample is.
    """
    model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
    encoder = SampleEncoder(model, config.features, "cuda" if config.workers.gpus else "cpu", config.encoders)
    loader = SampleLoader(config, base_folder(config.input), encoder.computed_by)
    step = max(len(dataset) // num_samples, 1)
    try:
        for row in range(0, len(dataset), step)[:num_samples]:
            stored = dataset.read(row)
            loaded = loader.load(_sample(stored))
            again = encoder.encode(loaded, stored.metadata["split"])
            restored = restore(again.tensors["mllm"])
            if config.features.layers:
                restored = expanded(restored, config.features.layers, model.dit.num_layers)
            psnr_db = _psnr_db(encoder, stored, loaded.target[0])
            cosines = [
                float(torch.nn.functional.cosine_similarity(tensor.float(), new.float(), dim=-1).mean())
                for name, tensor in stored.tensors["mllm"].items()
                if tensor.is_floating_point() and (new := restored.get(name)) is not None
            ]
            cosine = min(cosines, default=1.0)
            line = f"{stored.key}: target {psnr_db:.1f} dB, features cosine {cosine:.4f}"
            if psnr_db < MIN_PSNR_DB or cosine < MIN_COSINE:
                yield Problem(stored.key, f"made again it differs: {line}")
            else:
                yield line
    finally:
        loader.close()


def _sample(stored: ShardSample) -> Sample:
    metadata = stored.metadata
    media = metadata["media"]
    return Sample(
        key=stored.key,
        task=metadata["task"],
        dataset=metadata["dataset"],
        target=media["target"],
        source=media["source"],
        references=media["references"],
        caption=metadata["text"],
        extra=metadata.get("extra", {}),
    )


def _psnr_db(encoder: SampleEncoder, stored: ShardSample, frames: torch.Tensor) -> float:
    latents = stored.tensors["target"]["mean.0"][None].to(encoder.device, encoder.dtype)
    with torch.no_grad():
        shown = encoder.codec.decode(latents)[0].float().cpu().permute(1, 2, 3, 0) * 127.5 + 127.5
    error = (shown - frames.float()).square().mean().clamp_min(1e-9)
    return float(10 * torch.log10(255**2 / error))
