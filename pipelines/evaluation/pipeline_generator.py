"""LoomVideo as the model under test, with fixed sampler settings: a loaded pipeline, or a checkpoint."""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from loomvideo.model import adapters
from loomvideo.model.code_version import kernels_version, sampler_version
from loomvideo.model.conditions import without_source
from loomvideo.model.fingerprints import folder_fingerprint
from loomvideo.model.guidance import Guidance
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline
from loomvideo.model.tasks import evaluation_wording
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class SamplerSettings:
    """How results are sampled.

    Attributes:
        steps: Denoising steps.
        edit_scale: Guidance scale of edits.
        generate_scale: Guidance scale of generation.
        visual_scale: Guidance scale of sources and references.
        negative_prompt: What the unconditional branch is told; None for the model size's own.
        prompts: How the MLLM is told: ``training``, or ``published`` as LoomVideo's own evaluation words samples.
    """

    steps: int = 50
    edit_scale: float = 2.5
    generate_scale: float = 5.0
    visual_scale: float = 1.5
    negative_prompt: str | None = None
    prompts: Literal["training", "published"] = "training"

    def wording(self, task: str) -> str:
        """The wording of a task's samples."""
        return evaluation_wording(task) if self.prompts == "published" else task

    def guidance(self, item: LoadedItem) -> Guidance:
        """The scales of an item."""
        media = item.source is not None or bool(item.references)
        scale = self.edit_scale if item.source is not None else self.generate_scale
        return Guidance(scale, self.visual_scale if media else None)


@dataclass(frozen=True)
class PipelineGenerator:
    """A :class:`~loomvideo.pipelines.evaluation.generators.SampleGenerator` around a loaded pipeline."""

    pipeline: LoomVideoPipeline
    settings: SamplerSettings
    fingerprint: str = "loaded"

    def generate(self, item: LoadedItem, seed: int, use_source: bool = True) -> np.ndarray:
        """See :class:`~loomvideo.pipelines.evaluation.generators.SampleGenerator`."""
        conditions = self.pipeline.encode(
            self.settings.wording(item.item.task),
            item.item.text,
            item.source,
            list(item.references),
            item.size,
            item.num_frames,
            self.settings.negative_prompt,
        )
        if not use_source:
            conditions = without_source(conditions)
        return self.pipeline.denoise(conditions, self.settings.steps, self.settings.guidance(item), seed)


@dataclass(frozen=True)
class ModelOptions:
    """A checkpoint and how results are sampled from it.

    Attributes:
        source: The checkpoint, and how it computes.
        sampler: How results are sampled.
    """

    source: ModelSource
    sampler: SamplerSettings = SamplerSettings()


@dataclass
class ModelGenerator:
    """Generates with :class:`~loomvideo.model.pipeline.LoomVideoPipeline`."""

    options: ModelOptions
    fingerprint: str

    @functools.cached_property
    def pipeline(self) -> LoomVideoPipeline:
        """The model, loaded where it is first used."""
        return load_pipeline(self.options.source)

    def generate(self, item: LoadedItem, seed: int, use_source: bool = True) -> np.ndarray:
        """See :class:`~loomvideo.pipelines.evaluation.generators.SampleGenerator`."""
        return PipelineGenerator(self.pipeline, self.options.sampler).generate(item, seed, use_source)


def model_fingerprint(options: ModelOptions) -> str:
    """Hash of the files of checkpoint, codec and MLLM, of settings that change results, and of the code.

    Raises:
        UserError: for files that are not there.
    """
    path = Path(options.source.weights)
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such file or folder")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    settings = dataclasses.asdict(options) | {"weights": digest.hexdigest()}
    settings |= {"sampler_version": sampler_version(), "kernels_version": kernels_version()}
    # The same files elsewhere are the same model.
    settings["source"] |= {"weights": "", "lora": adapters.fingerprints(options.source.lora)}
    for key in ("codec_folder", "mllm_folder"):
        if folder := settings["source"][key]:
            if not Path(folder).is_dir():
                raise UserError(f"generation.{key}={folder}: no such folder")
            settings["source"][key] = folder_fingerprint(folder)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]
