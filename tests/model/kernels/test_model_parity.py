"""The whole transformer with the C++ kernels: the published model's vectors, and the gradients of every parameter."""

import copy

import pytest
import torch
from fixtures.reference import (
    TOLERANCE,
    reference_config,
    reference_dit,
    reference_dit_config,
    reference_sample,
    reference_vectors,
    requires_reference_vectors,
)

from loomvideo.model import kernels
from loomvideo.model.kernels import cpp_build
from loomvideo.model.packing import pack

pytestmark = [
    requires_reference_vectors,
    pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def batch():
    samples = [reference_sample(index) for index in range(len(reference_config()["samples"]))]
    return pack(samples, reference_dit_config().patch_size)


@torch.no_grad()
def test_velocities_equal_the_published_ones(batch):
    with kernels.use_backend("cpp"):
        velocities = batch.unpack(reference_dit()(batch))
        assert kernels.report()["checked"] >= 6
    for index, velocity in enumerate(velocities):
        torch.testing.assert_close(velocity, reference_vectors()[f"{index}.velocity"][0], **TOLERANCE)


def test_gradients_of_every_parameter_equal_those_of_eager(batch):
    model = copy.deepcopy(reference_dit()).requires_grad_()
    gradients = {}
    for backend in ("eager", "cpp"):
        with kernels.use_backend(backend):
            model.zero_grad()
            model(batch).square().sum().backward()
        gradients[backend] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["eager"].keys() == gradients["cpp"].keys()
    for name, expected in gradients["eager"].items():
        error = (gradients["cpp"][name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-4, name
