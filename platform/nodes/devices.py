"""Which device a process computes on: what was asked for, never what happens to be there.

Ray leaves ``CUDA_VISIBLE_DEVICES`` alone for tasks and actors that ask for no GPU, so that one of them on a GPU node
sees every GPU, those of training ranks too.
"""

import sys

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


def device_of(name: str = "") -> torch.device:
    """The device that a user named; without a name, the one that this process may take.

    That is what a Ray task or actor reserved, and elsewhere, in a command or a notebook, CUDA where there is one.
    A named one may be another machine's; :func:`check_device` asks for it here.

    Raises:
        UserError: if there is no such kind of device, or GPUs were reserved and none can be used.
    """
    if name:
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise UserError(f"device={name}: no such device; use cpu, cuda or cuda:N") from error
    reserved = _reserved_gpus()
    if reserved is not None:
        return device_for(reserved, "num_gpus")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: torch.device) -> None:
    """Refuse a device that this process cannot compute on.

    Raises:
        UserError: naming it.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device}: no CUDA device can be used here; use cpu, or install torch with CUDA")


def _reserved_gpus() -> int | None:
    """GPUs that the Ray task or actor of this process reserved; None outside of one."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    return len(ray.get_gpu_ids())
