"""Compiling the Triton kernels for a GPU architecture on any machine, with or without a GPU.

Proves that every kernel compiles for every supported architecture, and fills a node's Triton cache before its ranks
start: the launches of one forward and backward go through Triton's own specialisation, so that ranks find the results.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget

from loomvideo.model.kernels import triton_backend
from loomvideo.model.kernels.backends import load_operations
from loomvideo.model.kernels.selfcheck import results_and_gradients, training_calls

ARCHITECTURES = (80, 90, 100, 120)
"""A100, H100/H200, B200, RTX PRO 6000/5090."""


class _NoDevice:
    """A Triton driver that knows an architecture and has no device; enough to compile, not to launch."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        # Triton keeps one table of compiled kernels a device; the architecture's number keeps them apart.
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernels(
    architecture: int, dim: int, num_heads: int, dtype: torch.dtype = torch.bfloat16, patch: int = 192
) -> list:
    """Compile every kernel that training a model of this width launches; the results land in Triton's cache.

    Args:
        architecture: Compute capability, 90 for sm_90.
        dim: Model width.
        num_heads: The heads of its attention.
        dtype: The type of its activations.
        patch: Values in a latent patch.

    Returns:
        The distinct compiled kernels; ``.asm["cubin"]`` holds the machine code.
    """
    compiled = {}

    def compile_launch(kernel, grid, on, *arguments, **options) -> None:
        result = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **options)
        compiled[result.hash] = result

    driver = triton.runtime.driver
    previous = driver._active  # None until something asks for a GPU
    driver.set_active(_NoDevice(architecture))
    try:
        with triton_backend.recorded_launches(compile_launch):
            operations = load_operations("triton")
            for name, arguments, keywords in training_calls(dim, num_heads, dtype, "cpu", patch=patch):
                results_and_gradients(getattr(operations, name), arguments, keywords)
    finally:
        driver.set_active(previous)
    return list(compiled.values())
