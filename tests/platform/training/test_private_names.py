"""Every name of DeepSpeed, Ray and torch that is not their public interface, so that an upgrade fails here first."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from ray.train import FailureConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import controller
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from torch._C import _distributed_c10d as c10d

from loomvideo.platform.training import engine, ray_trainer
from loomvideo.platform.training.zero import import_deepspeed

STAGE_3 = {
    "empty_partition_cache",
    "fp32_partitioned_groups_flat",
    "get_param_id",
    "grad_position",
    "invalidate_secondary_tensor",
    "optimizer",
    "param_groups",
    "persistent_parameters",
    "_reassign_or_swap_out_partitioned_parameters",
}
STAGE_2 = {
    "bit16_groups_flat",
    "optimizer",
    "param_groups",
    "parallel_partitioned_bit16_groups",
    "partition_size",
    "round_robin_bit16_groups",
    "single_partition_of_fp32_groups",
}
OF_PARAMETERS = {"ds_numel", "ds_secondary_tensor", "ds_tensor", "all_gather_coalesced", "convert_to_zero_parameters"}
RAY = {"_create_default_callbacks", "_initialize_and_run_controller", "_register_sigint_handler"}


def test_the_engine_uses_no_other_names():
    source = Path(engine.__file__).read_text()
    assert set(re.findall(r"self\.optimizer\.(\w+)", source)) == STAGE_3 | STAGE_2
    beside = "".join(file.read_text() for file in Path(engine.__file__).parent.glob("*.py"))
    of_parameters = set(re.findall(r"\.(ds_\w+|all_gather_coalesced|convert_to_zero\w*)", beside))
    assert of_parameters == OF_PARAMETERS
    assert set(re.findall(r"self\.engine\.(\w+)", source)) == {
        "backward",
        "get_global_grad_norm",
        "module",
        "skipped_steps",
        "step",
    }


@pytest.mark.parametrize(
    ("module", "optimizer", "names"),
    [("stage3", "DeepSpeedZeroOptimizer_Stage3", STAGE_3), ("stage_1_and_2", "DeepSpeedZeroOptimizer", STAGE_2)],
)
def test_deepspeed_has_them(module, optimizer, names):
    import_deepspeed()
    found = importlib.import_module(f"deepspeed.runtime.zero.{module}")
    source = inspect.getsource(getattr(found, optimizer))
    for name in names:
        assert re.search(rf"def {name}\(|self\.{name}\b|^    {name} = property", source, re.MULTILINE), name


def test_deepspeed_gives_parameters_these():
    import_deepspeed()
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

    source = inspect.getsource(partition_parameters)
    for name in OF_PARAMETERS:
        assert re.search(rf"param\.{name} =", source), name
    assert callable(safe_set_full_grad)
    assert callable(safe_set_local_grad)


def test_ray_has_them():
    source = Path(ray_trainer.__file__).read_text()
    assert set(re.findall(r"def (_(?!_|has_state|on_signal)\w+)", source)) == RAY
    for name in RAY:
        assert callable(getattr(DataParallelTrainer, name))
    assert "failure_policy" in inspect.getsource(DataParallelTrainer.fit)
    assert {"before_controller_execute_resize_decision", "before_controller_execute_failure_decision"} <= set(
        dir(ControllerCallback)
    )
    assert "before_controller_execute_resize_decision" in inspect.getsource(controller)
    assert hasattr(DefaultFailurePolicy(FailureConfig()), "_worker_group_failures")
    assert callable(PlacementGroupCleanerCallback)


def test_torch_has_a_flight_recorder():
    assert hasattr(c10d, "_dump_fr_trace")
    assert hasattr(c10d, "_dump_nccl_trace") or not torch.distributed.is_nccl_available()
    assert torch.distributed.is_available()
