"""Compiling the C++ kernels of this machine with its own compiler, without any PyTorch header."""

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.artifacts import ArtifactKey

SOURCE = Path(__file__).with_name("loomvideo_kernels.cpp")
LIBRARY = "libloomvideo_kernels.so"
# Strict IEEE except for errno and traps, so that NaN and infinity survive; -ffast-math would lose them.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# Every level of x86-64 goes into one library, and the processor at run time chooses; nothing is -march=native.
UNITS = {
    "v4": ["-DLOOMVIDEO_ISA=v4", "-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v3": ["-DLOOMVIDEO_ISA=v3", "-march=x86-64-v3"],
    "v2": ["-DLOOMVIDEO_ISA=v2", "-march=x86-64-v2", "-DLOOMVIDEO_DOUBLE"],
    "dispatch": ["-DLOOMVIDEO_DISPATCH", "-march=x86-64-v2"],
}
X86_64_ELF_MACHINE = 62


def artifact_key() -> ArtifactKey:
    """The key of this machine's library.

    The library is plain C at its border and does not link PyTorch, so it depends on the OpenMP runtime that the
    process shares with PyTorch and on the C library, not on PyTorch's version.
    """
    source = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, UNITS)).encode()).hexdigest()
    target = {
        "machine": platform.machine(),
        "system": platform.system(),
        "libc": "-".join(platform.libc_ver()),
        "openmp": "libgomp.so.1",
        "isa": "+".join(name for name in UNITS if name.startswith("v")),
    }
    return ArtifactKey("cpp", source, target, compiler_identity())


def compiler() -> str | None:
    """The C++ compiler's path: ``$CXX``, else ``g++``; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def compiler_identity() -> str | None:
    """First line of ``--version``, or None without a compiler."""
    path = compiler()
    return None if path is None else _version_line(path)


@lru_cache(maxsize=8)
def _version_line(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def build(folder: Path) -> None:
    """Compile :data:`LIBRARY` into ``folder``.

    Raises:
        UserError: without a compiler, or with its first error line.
    """
    path = compiler()
    if path is None:
        raise UserError(
            "no C++ compiler on this node (g++ or $CXX): install g++, seed kernels.shared_store from a node"
            " that has one, or set kernels.backend=eager"
        )
    if platform.machine() != "x86_64":
        raise UserError(f"the cpp kernels need x86-64, not {platform.machine()}: set kernels.backend=eager")

    def compile_unit(unit: str) -> str:
        output = str(folder / f"{unit}.o")
        _run([path, *FLAGS, *UNITS[unit], "-c", str(SOURCE), "-o", output])
        return output

    with ThreadPoolExecutor(len(UNITS)) as pool:
        objects = list(pool.map(compile_unit, UNITS))
    _run([path, "-shared", "-fopenmp", "-o", str(folder / LIBRARY), *objects])
    for file in objects:
        os.remove(file)


def check(folder: Path) -> None:
    """Raise ``ValueError`` if the library in ``folder`` is not for this kind of processor."""
    header = (folder / LIBRARY).open("rb").read(20)
    machine = int.from_bytes(header[18:20], "little")
    if header[:4] != b"\x7fELF" or machine != X86_64_ELF_MACHINE or platform.machine() != "x86_64":
        raise ValueError(f"{LIBRARY} is for ELF machine {machine}, not for this {platform.machine()}")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise UserError(f"compiling the kernels with {command[0]} failed: {lines[0] if lines else result.returncode}")
