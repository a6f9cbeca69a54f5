"""Which model a command runs: a checkpoint, its size, and how its operations are computed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loomvideo.jobs.weights.references import CHECKPOINT_KEY
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from loomvideo.pipelines.generation.generator import ModelSource


@dataclass
class ModelChoice:
    """Keys that ``generate`` and ``serve`` share."""

    checkpoint: str = option("", CHECKPOINT_KEY)
    runs: str = option("runs", "folder of all runs")
    model: str = option("", "model size of a checkpoint that does not state one: tiny, small or 5b")
    codec_folder: str = option("", "folder of the codec's weights, for model sizes that need one")
    mllm_folder: str = option("", "folder of the MLLM, for model sizes that need one")
    kernels: str = option("auto", "back end of the fused operations: auto, eager, cpp or triton")
    compile: bool = option(False, "compile the transformer's blocks: slower to start, faster on a GPU")
    lora: list[str] = option([], "adapters, FILE or FILE:STRENGTH each: [style.safetensors:0.8,…]")
    memory: str = option(
        "auto",
        "resident: all weights on the device; sequential: one part at a time; offload: blocks from host memory; "
        "auto: the first of these that fits",
    )
    memory_gib: float = option(0.0, "GiB that memory=auto may use; 0 takes what is free")
    mllm_bits: int = option(16, "bits of the MLLM's decoder weights: 16, 8 or 4")
    dit_bits: int = option(16, "bits of the transformer's block weights: 16, 8 or 4")


def model_source(choice: ModelChoice, drop_exact: bool = False) -> "ModelSource":
    """The checkpoint and its model size.

    Args:
        choice: What the command was told.
        drop_exact: Free the exact weights where ``shortcuts.fp8`` is set.

    Raises:
        UserError: if there is no such checkpoint, or its size is unknown.
    """
    from loomvideo.jobs.weights.lookup import find_weights
    from loomvideo.model.loading import ModelSource
    from loomvideo.model.sizes import model_size, stated_size

    _, weights = find_weights(choice.checkpoint, choice.runs)
    name = stated_size(weights) or choice.model
    if not name:
        raise UserError(f"checkpoint={weights}: does not state its model size; set model= (5b for the published model)")
    model_size(name)
    return ModelSource(
        str(weights),
        name,
        choice.codec_folder,
        choice.mllm_folder,
        choice.kernels,
        choice.compile,
        drop_exact,
        memory=choice.memory,
        lora=tuple(choice.lora),
        mllm_bits=choice.mllm_bits,
        dit_bits=choice.dit_bits,
        memory_bytes=int(choice.memory_gib * 2**30),
    )
