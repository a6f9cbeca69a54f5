"""LoomVideo as the model under test: a checkpoint with its sampler settings."""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loomvideo.model import adapters
from loomvideo.model.code_version import kernels_version, sampler_version
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.pipeline_generator import PipelineGenerator, SamplerSettings
from loomvideo.platform.errors import UserError


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
        """See :class:`~loomvideo.pipelines.evaluation.generators.Generator`."""
        return PipelineGenerator(self.pipeline, self.options.sampler).generate(item, seed, use_source)


def model_fingerprint(options: ModelOptions) -> str:
    """Hash of the checkpoint's files (name, size, content), of settings that change results, and of the code."""
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
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]
