"""Kernels of one node and one process: built or fetched before workers start, then only loaded."""

import logging
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loomvideo.model.config import DiTConfig
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.artifacts import CACHE_VARIABLE, Artifact, ArtifactStore, default_cache_dir
from loomvideo.platform.nodes.config import KernelConfig
from loomvideo.platform.nodes.jit_caches import point_jit_caches

logger = logging.getLogger(__name__)

Shape = tuple[int, int, int]


def prepare_this_node(
    config: KernelConfig, shape: Shape | None = None, architectures: Sequence[int] = ()
) -> dict[str, Any]:
    """Build or fetch what this node needs for ``config``, and describe it.

    Args:
        config: The job's.
        shape: Width, heads and values in a latent patch of the model; with it the Triton kernels are compiled into
            the node's Triton cache.
        architectures: GPU architectures to compile them for; by default those of the node's GPUs.

    Returns:
        Host, seconds, one row an artefact (origin, seconds, target) and, with ``required=false``, what could not be
        had and why.

    Raises:
        UserError: if a required artefact cannot be had.
    """
    start = time.monotonic()
    os.environ.update(config.environment())
    caches = point_jit_caches(_jit_root())
    store = ArtifactStore.from_environment()
    artifacts, missing = {}, {}
    for name, prepare in _wanted(config).items():
        try:
            artifacts[name] = _describe(prepare(store))
        except UserError as error:
            if config.required:
                raise
            missing[name] = str(error)
            logger.warning("kernels: %s", error)
    if config.backend in ("auto", "triton") and shape is not None:
        for architecture in architectures or gpu_architectures():
            artifacts[f"triton sm_{architecture}"] = _compile_triton(architecture, shape)
    return {
        "host": os.uname().nodename,
        "seconds": round(time.monotonic() - start, 3),
        "artifacts": artifacts,
        "missing": missing,
        "jit_caches": caches,
    }


def use_kernels(config: KernelConfig) -> dict[str, Any]:
    """Load the prepared kernels in this process and choose the back end: what every rank calls before its first step.

    Args:
        config: The job's.

    Returns:
        The back ends' report (:func:`loomvideo.model.kernels.report`).
    """
    os.environ.update(config.environment())
    point_jit_caches(_jit_root())
    from loomvideo.model import attention_choice, kernels

    attention_choice.request_attention(config.attention)
    return kernels.set_backend(config.backend, config.required)


def model_shape(dit: DiTConfig) -> Shape:
    """Width, heads and values in a latent patch of a transformer."""
    return dit.inner_dim, dit.num_attention_heads, dit.in_channels * math.prod(dit.patch_size)


def gpu_architectures() -> list[int]:
    """Compute capabilities of this node's GPUs, as 90 for sm_90; asks the driver without opening a CUDA context."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode:
        logger.warning("nvidia-smi failed (%s); no Triton kernels are compiled ahead", output.stdout.strip())
        return []
    return sorted({int(line.strip().replace(".", "")) for line in output.stdout.splitlines() if line.strip()})


def _compile_triton(architecture: int, shape: Shape) -> dict[str, Any]:
    from loomvideo.model.kernels.triton_compile import compile_kernels

    start = time.monotonic()
    dim, num_heads, patch = shape
    count = len(compile_kernels(architecture, dim, num_heads, patch=patch))
    seconds = round(time.monotonic() - start, 3)
    return {"origin": "compiled", "seconds": seconds, "path": f"{count} kernels in {os.environ['TRITON_CACHE_DIR']}"}


def _wanted(config: KernelConfig) -> dict[str, Callable[[ArtifactStore], Artifact]]:
    wanted = {}
    if config.backend in ("auto", "cpp"):
        from loomvideo.model.kernels import cpp

        wanted["cpp"] = cpp.prepare
    return wanted


def _describe(artifact: Artifact) -> dict[str, Any]:
    return {
        "origin": artifact.origin,
        "seconds": round(artifact.seconds, 3),
        "path": str(artifact.path),
        "notes": list(artifact.notes),
    }


def _jit_root() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or default_cache_dir()) / "jit"
