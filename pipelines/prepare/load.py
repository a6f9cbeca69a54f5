"""One sample: files -> clips, decoded, resized and cropped. Needs a CPU and a decoder process, and no encoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loomvideo.model.buckets import resize_and_crop, resize_frames
from loomvideo.model.conditioning import prompts
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.files import content_hash, local_copies, resolve
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.geometry import Clips, pixel_fingerprints, plan_clips
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.shards.plan import digest
from loomvideo.platform.shards.sample import ShardSample

# Raise when the same pixels, words and encoders give other tensors than before.
TENSORS_VERSION = 1


@dataclass
class LoadedSample:
    """A sample ready to encode.

    Attributes:
        sample: What it was made from.
        clips: What was cut.
        fps: The frame rate of the clips; 0 for pictures.
        file_fps: The frame rate of the target file.
        fingerprints: Hash of everything that determines a member, by member.
        target: uint8 [frames, height, width, 3] of every window; empty when the member is taken from ``kept``.
        source: The same of the source.
        references: uint8 [height, width, 3] each.
        kept: Members of an earlier encoding that are still valid.
        kept_metadata: Metadata of that encoding.
    """

    sample: Sample
    clips: Clips
    fps: float
    file_fps: float
    fingerprints: dict[str, str]
    target: list[Tensor] = field(default_factory=list)
    source: list[Tensor] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    kept_metadata: dict[str, Any] = field(default_factory=dict)


class SampleLoader:
    """Decodes samples; owns one decoder process.

    Args:
        config: The configuration of the job.
        base: Folder that relative media paths start at.
        encoders: :attr:`SampleEncoder.computed_by`, for the members' fingerprints.
    """

    def __init__(self, config: PrepareConfig, base: str, encoders: dict[str, str]):
        self.config, self.base, self.encoders = config, base, encoders
        self.grid = model_size(config.model).grid
        self.decoder = IsolatedDecoder(config.workers.decode_timeout_s, config.decoder)
        self.decoder.start()

    def close(self) -> None:
        """End the decoder process."""
        self.decoder.close()

    def load(self, sample: Sample, previous: ShardSample | None = None) -> LoadedSample:
        """Probe, cut, decode and crop.

        Args:
            sample: What to load.
            previous: The sample as encoded before; members whose fingerprint still holds are kept.

        Raises:
            DecodeError: with a reason code.
            Filtered: if a rule leaves the sample out.
        """
        paths = {path: resolve(path, self.base) for path in _media(sample)}
        fps = float(sample.extra.get("fps", 24.0))
        with local_copies(list(paths.values())) as copies:
            local = {path: copies[full] for path, full in paths.items()}
            infos = {path: self.decoder.probe(name, fps) for path, name in local.items()}
            clips = plan_clips(
                sample,
                infos[sample.target],
                infos[sample.source] if sample.source else None,
                [infos[path] for path in sample.references],
                self.config.clips,
                self.config.seed,
                self.grid,
            )
            hashes = {path: content_hash(name) for path, name in local.items()}
            pixels = pixel_fingerprints(clips, hashes.__getitem__, sample)
            loaded = LoadedSample(
                sample=sample,
                clips=clips,
                fps=self.config.clips.fps if clips.num_frames > 1 else 0.0,
                file_fps=infos[sample.target].fps,
                fingerprints=self._fingerprints(sample, clips, pixels),
            )
            if previous is not None:
                before = previous.metadata.get("fingerprints", {})
                loaded.kept = {
                    member: tensors
                    for member, tensors in previous.tensors.items()
                    if before.get(member) == loaded.fingerprints.get(member)
                }
                loaded.kept_metadata = previous.metadata
            needs_media = "mllm" not in loaded.kept
            if "target" not in loaded.kept:
                loaded.target = self._windows(local[sample.target], clips, clips.target, fps)
            if sample.source and ("source" not in loaded.kept or needs_media):
                loaded.source = self._windows(local[sample.source], clips, clips.source, fps)
            if sample.references and ("refs" not in loaded.kept or needs_media):
                loaded.references = [
                    self._picture(local[path], bucket, fps)
                    for path, bucket in zip(sample.references, clips.reference_buckets, strict=True)
                ]
        return loaded

    def _fingerprints(self, sample: Sample, clips: Clips, pixels: dict[str, str]) -> dict[str, str]:
        prints = {member: digest(TENSORS_VERSION, self.encoders["codec"], value) for member, value in pixels.items()}
        kind = prompt_kind(sample)
        words = [prompts.compose(kind, sample.text, len(sample.references), variant) for variant in ("full", "visual")]
        words += [prompts.compose(kind, text, len(sample.references), "full") for text in sample.texts]
        media = (pixels.get("source"), pixels.get("refs"))
        options = self.config.features
        form = (options.mode, options.dtype, *((options.layers,) if options.layers else ()))
        prints["mllm"] = digest(TENSORS_VERSION, self.encoders["mllm"], words, media, len(clips.starts), *form)
        return prints

    def _windows(self, path: str, clips: Clips, windows: Sequence[Sequence[int]], fps: float) -> list[Tensor]:
        # Windows may overlap: every frame is decoded and resized once.
        wanted = sorted({index for window in windows for index in window})
        frames = torch.cat(list(self._resized(self.decoder.read(path, wanted, fps), clips)))
        position = {index: number for number, index in enumerate(wanted)}
        return [frames[[position[index] for index in window]] for window in windows]

    def _resized(self, chunks: Iterator[np.ndarray], clips: Clips) -> Iterator[Tensor]:
        for chunk in chunks:
            frames = torch.from_numpy(chunk)
            if clips.size is not None:
                frames = resize_frames(frames, clips.size[1], clips.size[0])
            yield resize_and_crop(frames, clips.bucket)

    def _picture(self, path: str, bucket: tuple[int, int], fps: float) -> Tensor:
        (chunk,) = self.decoder.read(path, [0], fps)
        return resize_and_crop(torch.from_numpy(chunk), bucket)[0]


def prompt_kind(sample: Sample) -> str:
    """How the MLLM is told the sample: a picture made from references has words of its own."""
    return "mi2i" if sample.task == "t2i" and sample.references else sample.task


def _media(sample: Sample) -> list[str]:
    return [path for path in (sample.target, sample.source, *sample.references) if path]
