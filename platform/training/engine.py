"""The DeepSpeed ZeRO engine: built from our configuration, with the few things DeepSpeed does not offer itself.

Notable: gradients are those of sum / (elements of all ranks and micro-steps); the averaged weights live on the same
partitions as the float32 master weights; every parameter's slice of master weights, moments and average can be read and
written by name, which is what makes checkpoints independent of the world size.
"""

import contextlib
import fnmatch
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import OptimizerConfig, TrainingConfig
from loomvideo.platform.training.recipe import Recipe
from loomvideo.platform.training.schedule import ema_decay, learning_rate

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_BUCKET_ELEMENTS = 200_000_000


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without compiling its shared-memory all-reduce: training never calls that operation."""
    # DeepSpeed calls collectives by names that torch is renaming.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed


def select_trainable(model: nn.Module, patterns: list[str]) -> None:
    """Freeze every parameter whose name matches none of the patterns; no patterns leave the model as it is.

    Raises:
        UserError: if a pattern matches nothing.
    """
    if not patterns:
        return
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"training.optimizer.trainable: {pattern!r} matches no parameter (e.g. {names[0]})")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if not config.weight_decay:
        groups = [{"params": trained, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "adamw8bit":
        if device.type != "cuda":
            raise UserError("training.optimizer.name=adamw8bit: needs a CUDA device; use adamw")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def deepspeed_config(
    config: TrainingConfig, num_elements: int, num_micro_steps: int, on_gpu: bool, resident: bool
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    Args:
        config: Ours.
        num_elements: Trainable parameters of the model.
        num_micro_steps: Micro-steps of a rank in a step.
        on_gpu: Whether workers have GPUs.
        resident: Whether the model stays gathered between steps.
    """
    zero = config.zero
    # One reduction a micro-step for small models; for large ones, buckets that bound the extra memory.
    bucket = zero.bucket_elements or min(num_elements, MAX_BUCKET_ELEMENTS)
    section: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.overlap and on_gpu,
        "reduce_scatter": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
    }
    if zero.stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": int(1e12) if resident else zero.persistence_elements,
            "stage3_max_live_parameters": int(1e9),
            "stage3_max_reuse_distance": int(1e9),
            "sub_group_size": int(1e12),
            "zero_hpz_partition_size": zero.hpz_partition_size,
        }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_steps,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": section,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": int(1e12),
        "wall_clock_breakdown": False,
    }


@dataclass
class ParameterSlice:
    """A rank's contiguous part of one trainable parameter, elements [start, stop) of it flattened.

    Attributes:
        views: ``master``, and once they exist ``exp_avg``, ``exp_avg_sq`` and ``ema``: [stop - start] float32 views.
    """

    name: str
    start: int
    stop: int
    views: dict[str, Tensor]


class ZeroEngine:
    """A model under ZeRO.

    Args:
        config: The run's configuration.
        recipe: Names the layers.
        model: Float32 on the CPU, the same on every rank.
        device: This worker's.
        num_micro_steps: Micro-steps of a rank in a step.
    """

    def __init__(
        self, config: TrainingConfig, recipe: Recipe, model: nn.Module, device: torch.device, num_micro_steps: int
    ):
        deepspeed = import_deepspeed()
        self.config, self.device = config, device
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.num_micro_steps = num_micro_steps
        self.world_size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        select_trainable(model, config.optimizer.trainable)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        on_gpu = device.type == "cuda"
        self._resident = config.zero.stage == 3 and self.num_parameters <= config.zero.resident_elements
        prepare_layers(recipe.layers(model), config)
        with _hooks_of_root_only(model) if self._resident else contextlib.nullcontext():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, config.optimizer, device),
                config=deepspeed_config(config, self.num_trainable, num_micro_steps, on_gpu, self._resident),
                dist_init_required=False,
            )
        self.module = self.engine.module
        if self._resident:
            # Gathered below in one collective a group, where DeepSpeed would start one a parameter.
            self.optimizer.persistent_parameters = []
        self._slices = list(self._partition())
        self.ema: list[Tensor] = []
        if config.ema.decay:
            self.ema = [master.detach().clone() for master in self.masters]
        self.grad_norm = 0.0
        if self._resident:
            self._gather()

    @property
    def masters(self) -> list[Tensor]:
        """This rank's flat float32 master weights, one tensor a parameter group."""
        if self.config.zero.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def _partition(self) -> Iterator[tuple[str, int, int, int, int]]:
        """Rows (name, group, offset in the flat group, start, stop in the parameter) of this rank's partitions."""
        if self.config.zero.stage == 3:
            for name, parameter in self._parameters.items():
                position = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                group, offset, length = position
                start = self.rank * length
                stop = min(start + length, parameter.ds_numel)
                if start < stop:
                    yield name, group, offset, start, stop
            return
        name_of = {id(parameter): name for name, parameter in self._parameters.items()}
        for group, parameters in enumerate(self.optimizer.round_robin_bit16_groups):
            first = self.optimizer.partition_size[group] * self.rank
            last = first + self.optimizer.partition_size[group]
            place = 0
            for parameter in parameters:
                start, stop = max(first, place), min(last, place + parameter.numel())
                if start < stop:
                    yield name_of[id(parameter)], group, start - first, start - place, stop - place
                place += parameter.numel()

    def slices(self) -> Iterator[ParameterSlice]:
        """This rank's part of every trainable parameter."""
        states = [self.optimizer.optimizer.state.get(master, {}) for master in self.masters]
        for name, group, offset, start, stop in self._slices:
            flats = {"master": self.masters[group].data}
            flats |= {moment: states[group][moment] for moment in MOMENTS if moment in states[group]}
            if self.ema:
                flats["ema"] = self.ema[group]
            yield ParameterSlice(
                name, start, stop, {kind: flat.narrow(0, offset, stop - start) for kind, flat in flats.items()}
            )

    def frozen_slices(self) -> Iterator[ParameterSlice]:
        """This rank's share of the parameters that are not trained, so that checkpoints hold the whole model."""
        for name, parameter in self._frozen.items():
            whole = torch.Size(self.shapes[name]).numel()
            length = -(-whole // self.world_size)
            start, stop = min(self.rank * length, whole), min((self.rank + 1) * length, whole)
            if start < stop:
                part = parameter.ds_tensor if self.config.zero.stage == 3 else parameter.detach().flatten()[start:stop]
                yield ParameterSlice(name, start, stop, {"master": part[: stop - start]})

    @torch.no_grad()
    def load_slices(self, read: Callable[[str, str, int, int], Tensor | None], optimizer_step: int) -> None:
        """Fill this rank's partitions.

        Args:
            read: ``read(kind, name, start, stop)`` gives [stop - start] float32, or None when there is no such state.
            optimizer_step: Steps the moments have seen; 0 leaves the optimiser fresh.
        """
        if optimizer_step:
            for master in self.masters:
                state = self.optimizer.optimizer.state[master]
                state["step"] = torch.tensor(float(optimizer_step), device=master.device)
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(master)
        for part in self.slices():
            for kind, view in part.views.items():
                value = read(kind, part.name, part.start, part.stop)
                if value is None and kind == "ema":
                    # A run that starts to average starts from the weights.
                    value = part.views["master"]
                if value is not None:
                    view.copy_(value)
        self._load_frozen(read)
        self._publish()

    def _load_frozen(self, read: Callable[[str, str, int, int], Tensor | None]) -> None:
        """Parameters that are not trained come back from the checkpoint too: what they started from may be gone."""
        if self.config.zero.stage == 3:
            for part in self.frozen_slices():
                part.views["master"].copy_(read("master", part.name, part.start, part.stop))
            return
        for name, parameter in self._frozen.items():
            parameter.copy_(read("master", name, 0, parameter.numel()).view_as(parameter))

    def _publish(self) -> None:
        """Bring the working weights in line with the master weights."""
        if self.config.zero.stage == 3:
            self.optimizer._partition_all_parameters()
            for group in range(len(self.masters)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if self._resident:
                self._gather()
            elif self.optimizer.persistent_parameters:
                self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)
            return
        for group, master in enumerate(self.masters):
            partitions = self.optimizer.parallel_partitioned_bit16_groups[group]
            partitions[self.rank].data.copy_(master.data)
            torch.distributed.all_gather_into_tensor(
                self.optimizer.bit16_groups_flat[group], partitions[self.rank].clone()
            )

    @torch.no_grad()
    def _gather(self) -> None:
        """Gather a resident model's working weights."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        gathered = []
        for flat in self.optimizer.fp16_partitioned_groups_flat:
            whole = flat.new_empty(self.world_size, flat.numel())
            torch.distributed.all_gather_into_tensor(whole.view(-1), flat)
            gathered.append(whole)
        for parameter in self._parameters.values():
            group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            whole = gathered[group][:, offset : offset + length].reshape(-1)
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange weights and averaged weights; a second call exchanges them back."""
        for master, average in zip(self.masters, self.ema, strict=True):
            kept = master.data.clone()
            master.data.copy_(average)
            average.copy_(kept)
        self._publish()

    def backward(self, loss_sum: Tensor, total_elements: float) -> None:
        """Gradients of one micro-step.

        Args:
            loss_sum: 0-dim loss summed over this pack's elements.
            total_elements: Loss elements of all ranks and micro-steps of this step.
        """
        # ZeRO averages over ranks and micro-steps; undo both and divide by the elements instead.
        self.engine.backward(loss_sum * (self.world_size * self.num_micro_steps / total_elements))

    def forward_backward(self, recipe: Recipe, pack: Any, total_elements: float, counts: bool) -> Any:
        """Loss and gradients of one pack; a pack that does not count has weight 0."""
        output = recipe.loss(self.engine, pack)
        self.backward(output.sum * (1.0 if counts else 0.0), total_elements)
        return output

    def step_micro(self) -> None:
        """Tell the engine that a micro-step other than the last is done."""
        self.engine.step()

    def step(self, step: int, skip: bool) -> bool:
        """Update the weights after the last micro-step.

        Args:
            step: Index of the optimiser step, from 0.
            skip: Drop the gradients instead, on every rank.

        Returns:
            Whether the weights were updated; also False when the gradients are not finite.
        """
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if skip:
            self._poison_gradients()
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        if self._resident:
            self._gather()
        updated = self.engine.skipped_steps == skipped_before
        if skip and self.config.zero.stage == 3:
            # Reductions never overwrite the padding of the partitions.
            self.optimizer.grad_partitions_flat_buffer.zero_()
        self.grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        if updated and self.ema:
            decay = ema_decay(self.config.ema.decay, self.config.ema.warmup, step)
            torch._foreach_lerp_(self.ema, [master.data for master in self.masters], 1.0 - decay)
        return updated

    def _poison_gradients(self) -> None:
        """Make the gradient norm invalid, upon which the engine drops the gradients on all ranks."""
        for gradients in self.optimizer.averaged_gradients.values():
            for gradient in gradients:
                gradient.fill_(float("nan"))


@contextlib.contextmanager
def _hooks_of_root_only(model: nn.Module) -> Iterator[None]:
    """Let ZeRO-3 watch the model as one module, gradients still reduced a parameter at a time.

    For a resident model the per-module hooks gather nothing and cost a tenth of a small model's step.
    """
    from deepspeed.runtime.zero import stage3
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(model, True)
    of_leaf = stage3.z3_leaf_parameter
    # A leaf's gradients would be reduced when its inputs have theirs; the root's inputs need none.
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = of_leaf


def prepare_layers(layers: Any, config: TrainingConfig) -> None:
    """Compile or recompute layers as configured."""
    for number, layer in enumerate(layers):
        if config.compile:
            layer.compile(dynamic=True)
        if _recomputes(config.activation_checkpointing, number):
            _recompute(layer)


def _recomputes(policy: str, number: int) -> bool:
    if policy in ("none", "all"):
        return policy == "all"
    kind, _, period = policy.partition(":")
    if kind != "every" or not period.isdigit() or int(period) < 1:
        raise UserError(f"training.activation_checkpointing={policy}: use none, all or every:N")
    return number % int(period) == 0


def _recompute(layer: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No random number is drawn inside a layer.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    layer.forward = recomputed
