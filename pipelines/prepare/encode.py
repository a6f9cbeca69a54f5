"""One loaded sample: clips -> latents and MLLM features."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loomvideo.model.codec import CodecExecution, build_codec
from loomvideo.model.conditioning import prompts
from loomvideo.model.conditioning.inputs import MLLMInputs, build_inputs, read_processor_config
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditioning.random_weights import RECIPE_VERSION
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.fingerprints import folder_fingerprint
from loomvideo.model.sizes import ModelSize
from loomvideo.pipelines.prepare.config import EncoderOptions, FeatureOptions
from loomvideo.pipelines.prepare.features import FeatureError, keeps_states, stored_members, streamed_members
from loomvideo.pipelines.prepare.load import LoadedSample, prompt_kind
from loomvideo.pipelines.prepare.pixels import CopiedClips, PixelCopier
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.sample import TEXTS_SCORE, ShardSample

logger = logging.getLogger(__name__)

# What is said of the mllm member; kept with it.
MLLM_METADATA = ("mllm_index", "mllm_tokens", "features", "feature_error", "texts", "text_stride")
# Pixels of clips that go to the codec together: those of the longest published clip alone, and so its memory.
_TOGETHER_PIXELS = 121 * 640 * 640


@dataclass
class ReadyBatch:
    """Samples with all that a host does for them before they are encoded.

    Attributes:
        asked: What the MLLM is asked of each, nothing where its member is kept, or why it cannot be.
        windows: Clips of the samples without an error, by number and member.
        copies: Those clips on their way to the device.
    """

    asked: list[dict[str, MLLMInputs] | UserError]
    windows: dict[tuple[int, str], Sequence[Tensor]]
    copies: list[CopiedClips]


class SampleEncoder:
    """The frozen codec and MLLM of a model size.

    Args:
        model: Which ones.
        features: How MLLM features are kept.
        device: Where they run.
        options: How they compute.
    """

    def __init__(
        self,
        model: ModelSize,
        features: FeatureOptions,
        device: str = "cpu",
        options: EncoderOptions | None = None,
    ):
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.features = features
        self.options = options or EncoderOptions()
        self._execution = CodecExecution(self.options.channels_last, self.options.compile)
        self.codec = build_codec(model.codec, self.device, dtype, self._execution)
        self.pixels = PixelCopier(self.device)
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
        mllm = FrozenMLLM.of_size(self._model, self.device, self.dtype)
        if self.options.packed:
            mllm.pack_prompts()
        return mllm

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
        """The same with the kind of device and how they compute, for the members' fingerprints."""
        kind = "" if self.device.type == "cpu" else f"-{self.device.type}"
        how = {"codec": self._execution.name, "mllm": "-packed" if self.options.packed else ""}
        return {name: fingerprint + kind + how[name] for name, fingerprint in self.fingerprints.items()}

    @property
    def device_name(self) -> str:
        """The model of the GPU, or ``cpu``."""
        return "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def null_features(self) -> dict[str, Tensor]:
        """The dataset-wide tensors: features of the empty message, ``null`` [layers, tokens, dim]."""
        inputs = build_inputs("t2i", "", None, [], "null", self.tokenizer, self.processor)
        return {"null": self.mllm.encode([inputs])[0].to("cpu", torch.bfloat16)}

    def encode(
        self,
        loaded: LoadedSample,
        split: str,
        assessed: dict[str, Any] | None = None,
        ready: ReadyBatch | None = None,
    ) -> ShardSample:
        """Encode what is not kept, and describe the sample.

        Args:
            loaded: The sample.
            split: The split that its metadata states.
            assessed: What curation found, ``{"scores": {...}, "reasons": [...]}``, for its metadata.
            ready: What :meth:`ready` gave for it, by default made now.

        Raises:
            UserError: if the MLLM cannot be told the sample.
        """
        (encoded,) = self.encode_together([(loaded, assessed)], split, ready)
        if isinstance(encoded, UserError):
            raise encoded
        return encoded

    def ready(self, batch: Sequence[LoadedSample]) -> ReadyBatch:
        """Do what a host does for samples that are encoded together, and begin to copy their pixels.

        It may be done while others are encoded, in another thread.
        """
        asked: list[dict[str, MLLMInputs] | UserError] = []
        for loaded in batch:
            try:
                asked.append({} if "mllm" in loaded.kept else self._mllm_inputs(loaded))
            except UserError as error:
                asked.append(error)
        windows: dict[tuple[int, str], Sequence[Tensor]] = {}
        for number, loaded in enumerate(batch):
            if isinstance(asked[number], UserError):
                continue
            pictures = [reference[None] for reference in loaded.references]
            members = {"target": loaded.target, "source": loaded.source, "refs": pictures}
            windows |= {(number, name): part for name, part in members.items() if part and name not in loaded.kept}
        clips = [clip for part in windows.values() for clip in part]
        # The clips of a sample alone go one by one, as they always did: its bytes stay what they were.
        alone = len(batch) - sum(isinstance(inputs, UserError) for inputs in asked) < 2
        return ReadyBatch(asked, windows, [self.pixels.copy(clips, some) for some in _of_one_shape(clips, alone)])

    @torch.no_grad()
    def encode_together(
        self,
        batch: Sequence[tuple[LoadedSample, dict[str, Any] | None]],
        split: str,
        ready: ReadyBatch | None = None,
    ) -> list[ShardSample | UserError]:
        """Encode several samples: clips of one shape together, and prompts of similar length.

        On the same device the same batch makes the same bytes; another batch makes the same values up to rounding.

        Args:
            batch: The samples, each with what curation found.
            split: The split that their metadata states.
            ready: What :meth:`ready` gave for them, by default made now.

        Returns:
            The samples, and an error for each that the MLLM cannot be told.
        """
        ready = ready or self.ready([loaded for loaded, _ in batch])
        found: list[ShardSample | UserError] = list(ready.asked)
        valid = [number for number, inputs in enumerate(ready.asked) if not isinstance(inputs, UserError)]
        tensors = self._latents([loaded for loaded, _ in batch], ready)
        texts = self._mllm_members([(batch[number][0], ready.asked[number]) for number in valid])
        for number, (members, metadata) in zip(valid, texts, strict=True):
            loaded, assessed = batch[number]
            found[number] = self._described(loaded, tensors[number] | members, metadata, split, assessed)
        return found

    def _described(
        self,
        loaded: LoadedSample,
        tensors: dict[str, dict[str, Tensor]],
        mllm_metadata: dict[str, Any],
        split: str,
        assessed: dict[str, Any] | None,
    ) -> ShardSample:
        sample, clips = loaded.sample, loaded.clips
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
        if sample.texts:
            # A column of the index, so that a loader knows what to read; none in datasets without other wordings.
            metadata["scores"] = {**metadata.get("scores", {}), TEXTS_SCORE: 1 + len(sample.texts)}
        return ShardSample(sample.key, metadata, tensors)

    def _tokens(self, frames: int, height: int, width: int) -> int:
        t, h, w = self.patch_size
        return (frames // t) * (height // h) * (width // w)

    def _latents(self, batch: Sequence[LoadedSample], ready: ReadyBatch) -> list[dict[str, dict[str, Tensor]]]:
        """The latent members of each sample, kept ones among them."""
        found = [{name: part for name, part in loaded.kept.items() if name != "mllm"} for loaded in batch]
        if ready.windows:
            moments = iter(self._moments(ready.copies))
            for (number, name), part in ready.windows.items():
                found[number][name] = _member([next(moments) for _ in part])
        return found

    def _moments(self, copies: Sequence[CopiedClips]) -> list[tuple[Tensor, Tensor]]:
        """Mean and deviation [C, f, h, w] in bf16 of each clip, in the order of their numbers."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for clips in copies:
            mean, std = self.codec.encode(self.pixels.video(clips, self.dtype))
            pairs = zip(mean.to("cpu", torch.bfloat16), std.to("cpu", torch.bfloat16), strict=True)
            found |= dict(zip(clips.numbers, pairs, strict=True))
        return [found[number] for number in range(len(found))]

    def _mllm_inputs(self, loaded: LoadedSample) -> dict[str, MLLMInputs]:
        # Without a source the message is the same for every window.
        sources = loaded.source if loaded.source else [None]
        variants = ("full", "visual") if _has_media(loaded) else ("full",)
        sample = loaded.sample
        inputs = {
            f"{variant}.{i}": self._inputs(sample, sample.text, source, loaded.references, variant)
            for i, source in enumerate(sources)
            for variant in variants
        }
        # What is said of pictures without a text is the same for every wording.
        return inputs | {
            f"full.{i + number * len(sources)}": self._inputs(sample, text, source, loaded.references, "full")
            for number, text in enumerate(sample.texts, 1)
            for i, source in enumerate(sources)
        }

    def _mllm_members(
        self, batch: Sequence[tuple[LoadedSample, dict[str, MLLMInputs]]]
    ) -> list[tuple[dict[str, dict[str, Tensor]], dict[str, Any]]]:
        """The MLLM's member of each sample, and its metadata; of no inputs it is kept."""
        wanted = [inputs for loaded, inputs in batch if keeps_states(self.features.mode, _has_media(loaded))]
        prompts_of = [entry for inputs in wanted for entry in inputs.values()]
        states = iter(self.mllm.encode(prompts_of)) if prompts_of else iter(())
        found = []
        for loaded, inputs in batch:
            if not inputs:
                metadata = {k: loaded.kept_metadata[k] for k in MLLM_METADATA if k in loaded.kept_metadata}
                found.append(({"mllm": loaded.kept["mllm"]}, metadata))
                continue
            keep = keeps_states(self.features.mode, _has_media(loaded))
            windows = len(loaded.clips.starts)
            metadata = {
                "mllm_index": list(range(len(loaded.source))) if loaded.source else [0] * windows,
                "mllm_tokens": max(entry.num_tokens for entry in inputs.values()),
                "features": "stored" if keep else "streamed",
            }
            stride = len(loaded.source) or 1
            if loaded.sample.texts:
                metadata |= {"texts": [loaded.sample.text, *loaded.sample.texts], "text_stride": stride}
            if keep:
                member, error = self._stored({name: next(states) for name in inputs})
                found.append(({"mllm": member}, metadata | error))
            else:
                found.append(({"mllm": streamed_members(inputs, self.processor, stride)}, metadata))
        return found

    def _stored(self, states: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        members = stored_members(states, self.features.dtype, self.features.layers)
        if self.features.dtype == "bf16" and not self.features.layers:
            return members, {}
        return members, {"feature_error": self.error.measure(states, members, self.features.layers)}

    def _inputs(
        self, sample: Sample, text: str, source: Tensor | None, references: list[Tensor], variant: prompts.Variant
    ) -> MLLMInputs:
        kind = prompt_kind(sample)
        return build_inputs(kind, text, source, references, variant, self.tokenizer, self.processor)


def _of_one_shape(clips: Sequence[Tensor], alone: bool) -> list[list[int]]:
    """Numbers of clips that go to the codec together: one by one, or as many of a shape as memory allows."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, frames in enumerate(clips):
        shapes.setdefault(tuple(frames.shape), []).append(number)
    groups = []
    for shape, numbers in shapes.items():
        size = 1 if alone else max(_TOGETHER_PIXELS // math.prod(shape[:3]), 1)
        groups += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return groups


def _member(moments: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """``mean.{w}`` and, unless all are zero, ``std.{w}``."""
    means = {f"mean.{number}": mean for number, (mean, _) in enumerate(moments)}
    deviations = {f"std.{number}": std for number, (_, std) in enumerate(moments)}
    return means | (deviations if any(std.any() for std in deviations.values()) else {})


def _has_media(loaded: LoadedSample) -> bool:
    return bool(loaded.sample.source or loaded.sample.references)


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
    # Weights that are made and not read have no content to look at, only the version of what makes them.
    made = () if model.mllm.kind == "qwen3_vl" else (RECIPE_VERSION,)
    return hashlib.sha256(repr((*named, model.dit.num_layers, *kind, *patch, *made)).encode()).hexdigest()[:16]


def _content(folder: str) -> str:
    if not folder:
        return ""
    if not Path(folder).is_dir():
        logger.warning("%s: not on this machine, so weights that change in it are not noticed from here", folder)
        return "elsewhere"
    return folder_fingerprint(folder)
