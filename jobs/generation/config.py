"""The configuration of ``loomvideo generate``."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loomvideo.jobs.weights.model_choice import ModelChoice, model_source
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.platform.config import option

if TYPE_CHECKING:
    from loomvideo.model.loading import ModelSource


@dataclass
class _RequestKeys:
    task: str = option("", "t2i, t2v, edit, ref_edit or mi2v (edit is of a video or a picture, as the source is)")
    prompt: str = option("", "instruction or caption")
    out: str = option("", "file to write: .mp4 for videos, .png or .webp for pictures")
    source: str = option("", "video or picture to edit")
    refs: list[str] = option([], "reference pictures")
    seed: int = option(0, "seed of the noise; the same seed gives the same file")
    seeds: list[int] = option([], "several results of one request, a file a seed: OUT gets -SEED before its suffix")
    batch: str = option(
        "", "JSONL file of task, prompt, out, source, refs, negative_prompt, seed a line; done ones are kept"
    )


@dataclass
class GenerateConfig(Settings, ModelChoice, _RequestKeys):
    """One generation, or a batch of them."""

    measure_error: bool = option(True, "with shortcuts, for one file: also generate exactly and print each one's error")
    workers: int = option(1, "batch: generations at a time")
    ranks: int = option(1, "processes that share each generation, dividing its branches")
    sequence_ranks: int = option(1, "neighbouring ranks that divide the tokens of a branch instead")
    gpus: float = option(0.0, "GPUs a process, for a batch or several ranks")
    decode_beside: bool = option(
        False, "batch, seeds: decode and write a file while the next one is denoised; memory for both (see --dry-run)"
    )

    def model_source(self, drop_exact: bool = False) -> "ModelSource":
        """The checkpoint, and how it is loaded.

        Raises:
            UserError: as :func:`model_source`.
        """
        return dataclasses.replace(model_source(self, drop_exact), decode_beside=self.decode_beside)
