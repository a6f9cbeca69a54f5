"""What a model for use is made of: weights, what its size needs beside them, kernels, compilation and device.

:func:`loomvideo.model.pipeline.load_pipeline` makes it ready.
"""

from dataclasses import dataclass

import torch

from loomvideo.model.sizes import PIPELINE_FILE, ModelSize, model_size, stated_size, with_folders
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


def device_of(name: str = "") -> torch.device:
    """The device of a name; empty is CUDA where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_on(device: torch.device) -> torch.dtype:
    """What models compute in: bf16 on CUDA, fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
