"""What DeepSpeed and the optimiser are told: imports, configuration, parameter groups."""

import fnmatch
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import OptimizerConfig, TrainingConfig

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


def select_trainable(model: nn.Module, patterns: list[str], key: str = "training.optimizer") -> None:
    """Freeze every parameter whose name matches none of the patterns; no patterns leave the model as it is.

    Args:
        model: Its parameters.
        patterns: Shell style.
        key: Where the optimiser's settings are in the configuration.

    Raises:
        UserError: if a pattern matches nothing.
    """
    if not patterns:
        return
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"{key}.trainable: {pattern!r} matches no parameter (e.g. {names[0]})")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def build_optimizer(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    config: OptimizerConfig,
    device: torch.device,
    key: str = "training.optimizer",
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only.

    Args:
        model: Its trainable parameters are optimised; they may be partitioned already.
        shapes: The shapes of the whole parameters: a partitioned one no longer shows its own.
        config: Rates.
        device: The worker's.
        key: Where ``config`` is in the job's configuration.

    Raises:
        UserError: for moments of 8 bits without a GPU.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [parameter for name, parameter in trained.items() if len(shapes[name]) >= 2]
    vectors = [parameter for name, parameter in trained.items() if len(shapes[name]) < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if not config.weight_decay:
        groups = [{"params": list(trained.values()), "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "adamw8bit":
        if device.type != "cuda":
            raise UserError(f"{key}.name=adamw8bit: needs a CUDA device; use adamw")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def deepspeed_config(config: TrainingConfig, num_elements: int, num_micro_steps: int, on_gpu: bool) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    Args:
        config: Ours.
        num_elements: Trainable parameters of the model.
        num_micro_steps: Micro-steps of a rank in a step.
        on_gpu: Whether workers have GPUs.
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
            "stage3_param_persistence_threshold": zero.persistence_elements,
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
        # Ranks and micro-steps are summed in float32: thousands of bf16 terms would lose the small ones.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": section,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": int(1e12),
        "wall_clock_breakdown": False,
    }
