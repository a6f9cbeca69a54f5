"""The device of a process is the one that was asked for."""

import pytest
import ray
import torch

from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes import devices
from loomvideo.platform.nodes.devices import check_device, device_for, device_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu_node(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_what_reserved_no_gpu_takes_none(gpu_node):
    assert device_for(0, "features.gpus") == CPU
    assert device_for(0.5, "features.gpus") == CUDA


def test_a_reserved_gpu_that_cannot_be_used_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"features.gpus=1: no CUDA device .* set features.gpus=0 for the CPU"):
        device_for(1, "features.gpus")
    assert device_of("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="device=cuda:1: no CUDA device can be used here"):
        check_device(device_of("cuda:1"))


def test_without_a_name_a_command_takes_a_gpu_and_an_actor_what_it_reserved(gpu_node, monkeypatch):
    assert device_of() == CUDA
    monkeypatch.setattr(devices, "_reserved_gpus", lambda: 0)
    assert device_of() == CPU
    assert device_of("cuda") == CUDA
    monkeypatch.setattr(devices, "_reserved_gpus", lambda: 1)
    assert device_of() == CUDA


def test_a_name_that_is_none_is_refused():
    with pytest.raises(UserError, match="device=gpu: no such device; use cpu, cuda or cuda:N"):
        device_of("gpu")


@pytest.mark.slow
def test_a_ray_task_knows_what_it_reserved(ray_cluster):
    @ray.remote(num_cpus=0)
    def reserved():
        return devices._reserved_gpus()

    assert ray.get(reserved.remote()) == 0
    assert devices._reserved_gpus() is None
