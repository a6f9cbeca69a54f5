"""Compiling the Triton kernels for a GPU architecture on any machine, with or without a GPU.

Used to prove that every kernel compiles for every supported architecture, and to fill an image's Triton cache.
"""

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from loomvideo.model.kernels import triton_backend
from loomvideo.model.kernels.backends import load_operations
from loomvideo.model.kernels.selfcheck import results_and_gradients, training_calls

ARCHITECTURES = (80, 90, 100, 120)
"""A100, H100/H200, B200, RTX PRO 6000/5090."""

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


def compile_kernels(architecture: int, dim: int, num_heads: int, dtype: torch.dtype = torch.bfloat16) -> list:
    """Compile every kernel that training a model of this width launches; the results land in Triton's cache.

    Args:
        architecture: Compute capability, 90 for sm_90.
        dim: Model width.
        num_heads: Of its attention.
        dtype: Of its activations.

    Returns:
        The compiled kernels; ``.asm["cubin"]`` holds the machine code.
    """
    return [
        triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        for source, options in _launches(dim, num_heads, dtype)
    ]


def _launches(dim: int, num_heads: int, dtype: torch.dtype) -> list:
    """Source and options of each distinct launch of one forward and backward of every operation."""
    launches = {}

    def record(kernel, grid, on, *arguments, **options) -> None:
        names = kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in options.items() if k in names}
        signature, constants, attributes = {}, {}, {}
        for index, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
            value = values[name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[(index,)] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[name] = _TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            # Torch allocates at multiples of 16 bytes; the launcher promises the same of multiples of 16.
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        compiler_options = {k: v for k, v in options.items() if k not in names} | {"enable_fp_fusion": True}
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        launches[source.hash(), tuple(sorted(compiler_options.items()))] = source, compiler_options

    with triton_backend.recorded_launches(record):
        operations = load_operations("triton")
        for name, arguments, keywords in training_calls(dim, num_heads, dtype, "cpu"):
            results_and_gradients(getattr(operations, name), arguments, keywords)
    return list(launches.values())
