"""LoomVideo as the model under test: a checkpoint with its sampler settings."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class ModelOptions:
    """A checkpoint and how results are sampled from it.

    Attributes:
        weights: Weights folder or file.
        model: Model size.
        codec_folder: The codec's weights, for model sizes that need them.
        mllm_folder: The MLLM, for model sizes that need one.
        steps: Denoising steps.
        edit_scale: Guidance scale of edits.
        generate_scale: Guidance scale of generation.
        visual_scale: Guidance scale of media.
    """

    weights: str
    model: str = "tiny"
    codec_folder: str = ""
    mllm_folder: str = ""
    steps: int = 50
    edit_scale: float = 2.5
    generate_scale: float = 5.0
    visual_scale: float = 1.5


@dataclass
class ModelGenerator:
    """Generates with :class:`~loomvideo.model.pipeline.LoomVideoPipeline`."""

    options: ModelOptions
    fingerprint: str
    _pipeline: Any = field(default=None, repr=False)

    def generate(self, item: LoadedItem, seed: int, use_source: bool = True) -> np.ndarray:
        """See :class:`~loomvideo.pipelines.evaluation.generators.Generator`."""
        from loomvideo.pipelines.evaluation.pipeline_generator import PipelineGenerator, SamplerSettings

        if self._pipeline is None:
            self._pipeline = self._load()
        o = self.options
        settings = SamplerSettings(o.steps, o.edit_scale, o.generate_scale, o.visual_scale)
        return PipelineGenerator(self._pipeline, settings).generate(item, seed, use_source)

    def _load(self) -> Any:
        import torch

        from loomvideo.model.pipeline import LoomVideoPipeline
        from loomvideo.model.sizes import model_size, with_folders

        o = self.options
        model = with_folders(model_size(o.model), o.codec_folder, o.mllm_folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return LoomVideoPipeline.from_parts(model, o.weights, device)


def model_fingerprint(options: ModelOptions) -> str:
    """Hash of the checkpoint's files (name, size and content) and every setting that changes results."""
    path = Path(options.weights)
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such file or folder")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    settings = dataclasses.asdict(options) | {"weights": digest.hexdigest()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]
