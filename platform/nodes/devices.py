"""Which device a process computes on: what was asked for, never what happens to be there.

Ray leaves ``CUDA_VISIBLE_DEVICES`` alone for tasks and actors that ask for no GPU, so that one of them on a GPU node
sees every GPU, those of training ranks too.
"""

import torch

from loomvideo.platform.errors import UserError


def device_for(gpus: float, key: str) -> torch.device:
    """CUDA for a process that asked for GPUs, the CPU for one that did not.

    Args:
        gpus: What the process reserved.
        key: The configuration key that says so, for the message.

    Raises:
        UserError: if GPUs were asked for and none can be used.
    """
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"{key}={gpus:g}: no CUDA device can be used here; set {key}=0 for the CPU, or install torch with CUDA"
        )
    return torch.device("cuda")
