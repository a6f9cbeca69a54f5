"""Parameters on the device before there are values: partitioned one by one under ZeRO-3, whole under stage 2.

Models of several roles may hold the very same frozen parameters: the second one is given those of the first, so that a
teacher under adapters, and the base of a critic's adapters, take no memory of their own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def allocate(
    model: nn.Module,
    deepspeed: Any,
    settings: dict[str, Any],
    stage: int,
    dtype: torch.dtype,
    device: torch.device,
    shared: Mapping[str, nn.Parameter] | None = None,
) -> set[str]:
    """Replace a model's parameters by zeros on the device; stage 3 partitions each at once.

    Args:
        model: The model, on the CPU or the meta device.
        deepspeed: The module.
        settings: DeepSpeed's configuration.
        stage: The stage of ZeRO.
        dtype, device: What the working weights have.
        shared: Parameters of another model by name: a frozen one of the same name is that very parameter.

    Returns:
        The names of the shared parameters.
    """
    shared = shared or {}
    replaced: dict[int, nn.Parameter] = {}
    taken: set[str] = set()
    first: nn.Parameter | None = None
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{module_name}.{name}" if module_name else name
            if not parameter.requires_grad and full_name in shared:
                replaced[id(parameter)] = shared[full_name]
                taken.add(full_name)
            if id(parameter) not in replaced:
                zeros = torch.zeros(parameter.shape, dtype=dtype, device=device)
                fresh = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
                replaced[id(parameter)] = fresh
                if stage == 3:
                    if first is None:
                        first = fresh
                        holder = nn.ParameterList([fresh])
                        deepspeed.zero.Init(module=holder, config_dict_or_path=settings, dtype=dtype)
                    else:
                        first.convert_to_zero_parameters(param_list=[fresh])
            module.register_parameter(name, replaced[id(parameter)])
    model.to(device)
    return taken
