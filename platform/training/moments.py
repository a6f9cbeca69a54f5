"""Optimiser moments as float32 arrays, whatever the optimiser keeps them as.

torch's AdamW keeps ``exp_avg`` and ``exp_avg_sq``. bitsandbytes' optimisers keep ``state1`` and ``state2``: float32 for
small arrays, else one byte an element with a table of 256 values (``qmap1``) and the largest magnitude of every block
of 256 elements (``absmax1``). Checkpoints hold float32 of either, so that blocks need not fall alike on another world
size, and a run may change its optimiser; on the same world size quantising again gives the same bytes, as every
block's largest element is stored exactly.
"""

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK_ELEMENTS = 256
_OF_BITSANDBYTES = {"exp_avg": "1", "exp_avg_sq": "2"}


def read_moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """The moments [elements] of one array's optimiser state: views where it holds float32; empty before step one."""
    if "state1" not in state:
        return {moment: state[moment] for moment in MOMENTS if moment in state}
    moments = {}
    for moment, number in _OF_BITSANDBYTES.items():
        stored = state[f"state{number}"]
        if stored.dtype == torch.uint8:
            from bitsandbytes.functional import dequantize_blockwise

            stored = dequantize_blockwise(
                stored, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=BLOCK_ELEMENTS
            )
        moments[moment] = stored.flatten()
    return moments


@torch.no_grad()
def write_moments(
    optimizer: torch.optim.Optimizer, group: int, master: Tensor, moments: dict[str, Tensor], step: int
) -> None:
    """Give an optimiser the moments it had after ``step`` steps.

    Args:
        optimizer: AdamW of torch or bitsandbytes.
        group: Number of the array's parameter group.
        master: The array [elements] that it updates.
        moments: [elements] float32 each; taken over.
        step: Steps seen.
    """
    if not hasattr(optimizer, "init_state"):
        optimizer.state[master].update(moments, step=torch.tensor(float(step), device=master.device))
        return
    optimizer.init_state(optimizer.param_groups[group], master, group, 0)
    state = optimizer.state[master]
    state["step"] = step
    for moment, number in _OF_BITSANDBYTES.items():
        stored = state[f"state{number}"]
        if stored.dtype != torch.uint8:
            stored.copy_(moments[moment].view_as(stored))
            continue
        from bitsandbytes.functional import quantize_blockwise

        quantised, constants = quantize_blockwise(
            moments[moment], code=state[f"qmap{number}"], blocksize=BLOCK_ELEMENTS
        )
        stored.copy_(quantised.view_as(stored))
        state[f"absmax{number}"].copy_(constants.absmax)
