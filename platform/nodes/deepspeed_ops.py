"""DeepSpeed's own C++ ops, built with the node's other artefacts instead of in every rank's first step.

DeepSpeed compiles an op when a rank first asks for it (half a minute for the shared-memory collectives) behind a lock
file that outlives a killed process and then blocks every later start. Here the op is built once in a process of its
own; ranks import the finished library and hand it to DeepSpeed, which then neither compiles nor locks.
"""

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.artifacts import Artifact, ArtifactKey, ArtifactStore

SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""All-reduce between the ranks of one node over shared memory; CPU training uses it."""

_BUILD = """
import sys
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False)
"""


def artifact_key() -> ArtifactKey:
    """The key of the shared-memory op: unlike our own kernels it links PyTorch and Python."""
    import torch

    target = {
        "machine": platform.machine(),
        "libc": "-".join(platform.libc_ver()),
        "python": sys.implementation.cache_tag or "",
        "torch": torch.__version__,
        "cxx11_abi": str(torch.compiled_with_cxx11_abi()),
    }
    source = hashlib.sha256(f"{importlib.metadata.version('deepspeed')}{_BUILD}".encode()).hexdigest()
    return ArtifactKey(SHARED_MEMORY_OP, source, target, _compiler_identity())


def build(folder: Path) -> None:
    """Compile the op into ``folder``.

    Raises:
        UserError: without a compiler or ninja, or with the compiler's first error.
    """
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder / "work"), "DS_ACCELERATOR": "cpu", "MAX_JOBS": "2"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    result = subprocess.run([sys.executable, "-c", _BUILD], env=environment, capture_output=True, text=True)
    libraries = sorted((folder / "work").rglob(f"{SHARED_MEMORY_OP}*.so"))
    if result.returncode or not libraries:
        lines = [line for line in result.stderr.splitlines() if "rror" in line]
        reason = lines[-1] if lines else f"exit code {result.returncode}"
        raise UserError(
            f"building DeepSpeed's {SHARED_MEMORY_OP} failed: {reason}; set kernels.deepspeed=false to skip"
        )
    libraries[0].rename(folder / f"{SHARED_MEMORY_OP}.so")
    shutil.rmtree(folder / "work")


def prepare(store: ArtifactStore | None = None) -> Artifact:
    """Build or fetch the op, without loading it."""
    return (store or ArtifactStore.from_environment()).get(artifact_key(), build)


def preload(store: ArtifactStore | None = None) -> Artifact:
    """Load the op and make DeepSpeed use it; call it before ``deepspeed.init_distributed``."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    artifact = prepare(store)
    if SHARED_MEMORY_OP not in OpBuilder._loaded_ops:
        path = str(artifact.path / f"{SHARED_MEMORY_OP}.so")
        loader = importlib.machinery.ExtensionFileLoader(SHARED_MEMORY_OP, path)
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(SHARED_MEMORY_OP, loader))
        loader.exec_module(module)
        OpBuilder._loaded_ops[SHARED_MEMORY_OP] = module
    return artifact


def _compiler_identity() -> str | None:
    path = shutil.which(os.environ.get("CXX") or "c++")
    if path is None:
        return None
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
