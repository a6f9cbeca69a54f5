"""A model made ready for use: weights, codec, MLLM, kernels, compilation and device, in one place.

Generation, serving, evaluation and the samples of a training run all load through here, so that none of them computes
with other operations than the others.
"""

from dataclasses import dataclass

import torch

from loomvideo.model import kernels
from loomvideo.model.codec import build_codec
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.sizes import PIPELINE_FILE, ModelSize, model_size, stated_size, with_folders
from loomvideo.model.weights import load_dit, open_checkpoint
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint, what its size needs beside it, and how it computes.

    Attributes:
        weights: The ``weights`` folder of a run, an exported folder, or the published ``gen_model.pth``.
        model: Its size; empty takes what the folder states.
        codec_folder: The codec's weights, for sizes that need them.
        mllm_folder: The MLLM, for sizes that need one.
        kernels: Back end of the fused operations; empty leaves the one in use.
        compile: Compile the transformer's blocks.
        drop_exact: Turn the blocks' products to 8-bit floats for good, so that the exact weights free their memory.
        device: Where everything runs; empty takes CUDA where there is one.
    """

    weights: str
    model: str = ""
    codec_folder: str = ""
    mllm_folder: str = ""
    kernels: str = "auto"
    compile: bool = False
    drop_exact: bool = False
    device: str = ""

    @property
    def size(self) -> ModelSize:
        """The model's size, its folders filled in.

        Raises:
            UserError: if the checkpoint does not say its size and nothing else does.
        """
        name = self.model or stated_size(self.weights)
        if not name:
            raise UserError(f"{self.weights}: has no {PIPELINE_FILE}; name its size with model=")
        return with_folders(model_size(name), self.codec_folder, self.mllm_folder)


def load_pipeline(source: ModelSource, dtype: torch.dtype | None = None) -> LoomVideoPipeline:
    """Load a checkpoint with its codec and MLLM.

    Args:
        source: What to load.
        dtype: Of the transformer and the MLLM; None takes bf16 on CUDA, fp32 elsewhere.

    Raises:
        UserError: if the checkpoint, a folder or the kernels cannot be used.
    """
    size, device = source.size, device_of(source.device)
    stated = open_checkpoint(source.weights).config
    dit = load_dit(source.weights, stated or size.dit, device, dtype or dtype_on(device))
    return pipeline_around(dit, size, source)


def pipeline_around(dit: LoomVideoDiT, size: ModelSize, source: ModelSource | None = None) -> LoomVideoPipeline:
    """Give a transformer its codec and MLLM, on its device and in its dtype.

    Args:
        dit: Such as one whose weights come from a training checkpoint.
        size: The model's size, its folders filled in.
        source: How it computes; None leaves kernels and transformer as they are.
    """
    parameter = next(dit.parameters())
    if source is not None and source.kernels:
        kernels.set_backend(source.kernels)
    codec = build_codec(size.codec, parameter.device, parameter.dtype)
    mllm = FrozenMLLM.of_size(size, parameter.device, parameter.dtype)
    pipeline = LoomVideoPipeline(dit, codec, mllm, size.scheduler, negative_prompt=size.negative_prompt)
    if source is not None and source.drop_exact:
        pipeline.keep_float8_only()
    if source is not None and source.compile:
        pipeline.dit.compile_blocks()
    return pipeline


def device_of(name: str = "") -> torch.device:
    """The device of a name; empty is CUDA where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_on(device: torch.device) -> torch.dtype:
    """What models compute in: bf16 on CUDA, fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
