"""A loaded model under test: its pipeline with fixed sampler settings."""

from dataclasses import dataclass

import numpy as np

from loomvideo.model.guidance import Guidance
from loomvideo.model.pipeline import LoomVideoPipeline, without_source
from loomvideo.pipelines.evaluation.inputs import LoadedItem


@dataclass(frozen=True)
class SamplerSettings:
    """How results are sampled.

    Attributes:
        steps: Denoising steps.
        edit_scale: Guidance scale of edits.
        generate_scale: Guidance scale of generation.
        visual_scale: Guidance scale of sources and references.
        negative_prompt: What the unconditional branch is told; None for the model size's own.
    """

    steps: int = 50
    edit_scale: float = 2.5
    generate_scale: float = 5.0
    visual_scale: float = 1.5
    negative_prompt: str | None = None

    def guidance(self, item: LoadedItem) -> Guidance:
        """The scales of an item."""
        media = item.source is not None or bool(item.references)
        scale = self.edit_scale if item.source is not None else self.generate_scale
        return Guidance(scale, self.visual_scale if media else None)


@dataclass(frozen=True)
class PipelineGenerator:
    """A :class:`~loomvideo.pipelines.evaluation.generators.Generator` around a loaded pipeline."""

    pipeline: LoomVideoPipeline
    settings: SamplerSettings
    fingerprint: str = "loaded"

    def generate(self, item: LoadedItem, seed: int, use_source: bool = True) -> np.ndarray:
        """See :class:`~loomvideo.pipelines.evaluation.generators.Generator`."""
        conditions = self.pipeline.encode(
            item.item.task,
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
