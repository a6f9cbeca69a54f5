"""Parameters that are not trained: of a model with adapters, or of a whole role such as a teacher."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from loomvideo.platform.training.allocation import allocate
from loomvideo.platform.training.config import TrainingConfig, ZeroConfig
from loomvideo.platform.training.recipe import Recipe
from loomvideo.platform.training.slices import ParameterSlice, Source, read_from, requests_of
from loomvideo.platform.training.zero import deepspeed_config, import_deepspeed


def frozen_slices(
    parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]], stage: int
) -> Iterator[ParameterSlice]:
    """This rank's share of parameters, which are whole under stage 2.

    Args:
        parameters: The parameters by name.
        shapes: The shapes of the whole parameters.
        stage: The stage of ZeRO.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, parameter in parameters.items():
        whole = torch.Size(shapes[name]).numel()
        length = -(-whole // world_size)
        start, stop = min(rank * length, whole), min((rank + 1) * length, whole)
        if start < stop:
            part = parameter.ds_tensor if stage == 3 else parameter.detach().flatten()[start:stop]
            yield ParameterSlice(name, start, stop, {"master": part[: stop - start]})


@torch.no_grad()
def load_frozen(
    parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]], zero: ZeroConfig, source: Source
) -> None:
    """Fill parameters that are not trained: this rank's share, or all of them under stage 2."""
    if zero.stage == 3:
        wanted = [(part, "master", part.views["master"]) for part in frozen_slices(parameters, shapes, 3)]
    else:
        wanted = [(ParameterSlice(name, 0, p.numel(), {}), "master", p.view(-1)) for name, p in parameters.items()]
    for (_, _, view), value in zip(wanted, source(requests_of(wanted)), strict=True):
        view.copy_(value)
    if zero.hpz_partition_size > 1:
        # DeepSpeed drops these copies for trained parameters only.
        for parameter in parameters.values():
            parameter.ds_secondary_tensor = None


class FrozenEngine:
    """A model that only computes: whole under stage 2, partitioned like the others under stage 3.

    Args:
        config: The run's configuration.
        recipe: Compiles it.
        model: The model, on the CPU or the meta device, the same on every rank; its parameters are replaced.
        device: This worker's.
        initial: Its weights, read one parameter at a time.
        shared: Frozen parameters of another role's model, which take the place of this one's of the same name.
    """

    def __init__(
        self,
        config: TrainingConfig,
        recipe: Recipe,
        model: nn.Module,
        device: torch.device,
        initial: Mapping[str, torch.Tensor],
        shared: Mapping[str, nn.Parameter] | None = None,
    ):
        deepspeed = import_deepspeed()
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        model.requires_grad_(False)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        num_elements = sum(parameter.numel() for parameter in model.parameters())
        settings = deepspeed_config(config, num_elements, 1, device.type == "cuda")
        taken = allocate(model, deepspeed, settings, config.zero.stage, dtype, device, shared)
        own = {name: parameter for name, parameter in model.named_parameters() if name not in taken}
        # Nothing is computed backwards here.
        recipe.prepare(model, "none", config.compile)
        self.engine: Any = model
        if config.zero.stage == 3:
            self.engine, _, _, _ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
        self.num_parameters, self.num_shared = num_elements, len(taken)
        load_frozen(own, shapes, config.zero, read_from(initial))
