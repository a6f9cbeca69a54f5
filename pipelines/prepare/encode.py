"""One sample: files -> clips -> latents and MLLM features.

Loading (decode, resize, crop) needs CPUs and a decoder process; encoding needs the codec and the MLLM. A shard builder
runs the two side by side.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loomvideo.model.buckets import resize_and_crop, resize_frames
from loomvideo.model.codec import build_codec
from loomvideo.model.conditioning import prompts
from loomvideo.model.conditioning.inputs import MLLMInputs, build_inputs, read_processor_config
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.fingerprints import folder_fingerprint
from loomvideo.model.sizes import ModelSize, model_size
from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.files import content_hash, local_copies, resolve
from loomvideo.pipelines.prepare.config import FeatureOptions, PrepareConfig
from loomvideo.pipelines.prepare.features import FeatureError, keeps_states, stored_members, streamed_members
from loomvideo.pipelines.prepare.geometry import Clips, pixel_fingerprints, plan_clips
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.shards.plan import digest
from loomvideo.platform.shards.sample import ShardSample

logger = logging.getLogger(__name__)

# What is said of the mllm member; kept with it.
MLLM_METADATA = ("mllm_index", "mllm_tokens", "features", "feature_error")
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


class SampleEncoder:
    """The frozen codec and MLLM of a model size.

    Args:
        model: Which ones.
        features: How MLLM features are kept.
        device: Where they run.
    """

    def __init__(self, model: ModelSize, features: FeatureOptions, device: str = "cpu"):
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.features = features
        self.codec = build_codec(model.codec, self.device, dtype)
        self.dtype = dtype
        self.patch_size = tuple(model.dit.patch_size)
        self._model = model
        if model.mllm.kind == "qwen3_vl" and model.mllm.folder:
            # Its weights are read when the first states are asked for: `streamed`, and `text` with media, never do.
            folder = Path(model.mllm.folder)
            self.tokenizer, self.processor = MLLMTokenizer.from_pretrained(folder), read_processor_config(folder)
            self._mllm_fingerprint = f"{folder_fingerprint(folder)}-last{model.dit.num_layers}"
        else:
            self.tokenizer, self.processor = self.mllm.tokenizer, self.mllm.processor
            self._mllm_fingerprint = self.mllm.fingerprint

    @cached_property
    def mllm(self) -> FrozenMLLM:
        """The MLLM with its weights, loaded when first used."""
        return FrozenMLLM.of_size(self._model, self.device, self.dtype)

    @cached_property
    def error(self) -> FeatureError:
        """Measures what storing features in fewer bits or layers loses."""
        return FeatureError(self.mllm.hidden_size)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the codec's and the MLLM's weights."""
        return {"codec": self.codec.fingerprint, "mllm": self._mllm_fingerprint}

    @property
    def computed_by(self) -> dict[str, str]:
        """The same with the kind of device, for the members' fingerprints."""
        kind = "" if self.device.type == "cpu" else f"-{self.device.type}"
        return {name: fingerprint + kind for name, fingerprint in self.fingerprints.items()}

    @property
    def device_name(self) -> str:
        """The model of the GPU, or ``cpu``."""
        return "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def null_features(self) -> dict[str, Tensor]:
        """The dataset-wide tensors: features of the empty message, ``null`` [layers, tokens, dim]."""
        inputs = build_inputs("t2i", "", None, [], "null", self.tokenizer, self.processor)
        return {"null": self.mllm.encode([inputs])[0].to("cpu", torch.bfloat16)}

    @torch.no_grad()
    def encode(self, loaded: LoadedSample, split: str, assessed: dict[str, Any] | None = None) -> ShardSample:
        """Encode what is not kept, and describe the sample.

        Args:
            loaded: The sample.
            split: The split that its metadata states.
            assessed: What curation found, ``{"scores": {...}, "reasons": [...]}``, for its metadata.

        Raises:
            UserError: if the MLLM cannot be told the sample.
        """
        sample, clips = loaded.sample, loaded.clips
        tensors = dict(loaded.kept)
        if loaded.target and "target" not in tensors:
            tensors["target"] = self._moments(loaded.target)
        if loaded.source and "source" not in tensors:
            tensors["source"] = self._moments(loaded.source)
        if loaded.references and "refs" not in tensors:
            tensors["refs"] = self._moments([reference[None] for reference in loaded.references])
        if "mllm" in loaded.kept:
            mllm_metadata = {k: loaded.kept_metadata[k] for k in MLLM_METADATA if k in loaded.kept_metadata}
        else:
            tensors["mllm"], mllm_metadata = self._mllm_members(loaded)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors["target"].items() if name.startswith("mean.")}
        _, frames, height, width = shapes["mean.0"]
        metadata = {
            "key": sample.key,
            "task": sample.task,
            "dataset": sample.dataset,
            "text": sample.text,
            "split": split,
            "group": sample.group,
            "licence": sample.licence,
            "bucket": list(clips.bucket),
            "num_frames": clips.num_frames,
            "fps": loaded.fps,
            "source_fps": round(loaded.file_fps, 6),
            "num_windows": len(clips.starts),
            "windows": [round(start, 6) for start in clips.starts],
            "deterministic": not any(name.startswith("std.") for name in tensors["target"]),
            "latents": "normalised",
            "extra": sample.extra,
            "media": {"target": sample.target, "source": sample.source, "references": sample.references},
            "dit_tokens": self._tokens(frames, height, width) + sum(
                self._tokens(*tensor.shape[1:])
                for name, tensor in tensors.get("refs", {}).items()
                if name.startswith("mean.")
            ),
            **mllm_metadata,
            **(assessed or {}),
            "fingerprints": loaded.fingerprints,
        }  # fmt: skip
        return ShardSample(sample.key, metadata, tensors)

    def _tokens(self, frames: int, height: int, width: int) -> int:
        t, h, w = self.patch_size
        return (frames // t) * (height // h) * (width // w)

    def _moments(self, windows: Sequence[Tensor]) -> dict[str, Tensor]:
        """``mean.{w}`` and, unless all zero, ``std.{w}`` [C, f, h, w] in bf16; one clip at a time, for memory."""
        moments, deviations = {}, {}
        for number, frames in enumerate(windows):
            video = (frames.to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(self.dtype)
            mean, std = self.codec.encode(video)
            moments[f"mean.{number}"] = mean[0].to("cpu", torch.bfloat16)
            deviations[f"std.{number}"] = std[0].to("cpu", torch.bfloat16)
        return moments | (deviations if any(std.any() for std in deviations.values()) else {})

    def _mllm_members(self, loaded: LoadedSample) -> tuple[dict[str, Tensor], dict[str, Any]]:
        sample = loaded.sample
        # Without a source the message is the same for every window.
        sources = loaded.source if loaded.source else [None]
        has_media = bool(loaded.source or loaded.references)
        variants = ("full", "visual") if has_media else ("full",)
        inputs = {
            f"{variant}.{i}": self._inputs(sample, source, loaded.references, variant)
            for i, source in enumerate(sources)
            for variant in variants
        }
        keep = keeps_states(self.features.mode, has_media)
        metadata = {
            "mllm_index": list(range(len(sources))) if loaded.source else [0] * len(loaded.clips.starts),
            "mllm_tokens": max(entry.num_tokens for entry in inputs.values()),
            "features": "stored" if keep else "streamed",
        }
        if not keep:
            return streamed_members(inputs, self.processor), metadata
        states = dict(zip(inputs, self.mllm.encode(list(inputs.values())), strict=True))
        members = stored_members(states, self.features.dtype, self.features.layers)
        if self.features.dtype != "bf16" or self.features.layers:
            metadata["feature_error"] = self.error.measure(states, members, self.features.layers)
        return members, metadata

    def _inputs(
        self, sample: Sample, source: Tensor | None, references: list[Tensor], variant: prompts.Variant
    ) -> MLLMInputs:
        kind = prompt_kind(sample)
        return build_inputs(kind, sample.text, source, references, variant, self.tokenizer, self.processor)


def prompt_kind(sample: Sample) -> str:
    """How the MLLM is told the sample: a picture made from references has words of its own."""
    return "mi2i" if sample.task == "t2i" and sample.references else sample.task


def encoder_identity(model: ModelSize, on_gpu: bool) -> str:
    """A hash of the encoders and patches that a model size names, without loading them.

    Of weights in folders the content counts, not the path; where the driver cannot see the folder, nothing does.

    Args:
        model: The model size, with the folders of its codec and MLLM.
        on_gpu: Whether they run on GPUs: their bytes are not those of a CPU.
    """
    named = [replace(part, folder=_content(part.folder)) for part in (model.codec, model.mllm)]
    kind = ("cuda",) if on_gpu else ()
    # Stored token counts are in patches. The published patch is left out: what was prepared with it stays fresh.
    patch = () if model.dit.patch_size == (1, 2, 2) else (model.dit.patch_size,)
    return hashlib.sha256(repr((*named, model.dit.num_layers, *kind, *patch)).encode()).hexdigest()[:16]


def _content(folder: str) -> str:
    if not folder:
        return ""
    if not Path(folder).is_dir():
        logger.warning("%s: not on this machine, so weights that change in it are not noticed from here", folder)
        return "elsewhere"
    return folder_fingerprint(folder)


def _media(sample: Sample) -> list[str]:
    return [path for path in (sample.target, sample.source, *sample.references) if path]
