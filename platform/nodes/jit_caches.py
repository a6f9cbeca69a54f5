"""Where just-in-time compilers keep their results: on the node's own disk.

Triton, Inductor, torch extensions and CUDA lock and rename files in caches that default to the home folder. On a
network disk that fails (stale handles, renames of busy files, locks that do not lock) or hangs a job.
"""

import os
from pathlib import Path

SUBFOLDERS = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
}
NETWORK_FILESYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs"}


def point_jit_caches(root: Path) -> dict[str, str]:
    """Set the cache variables of this process and its children to folders under ``root``.

    A variable that is already set keeps its value unless it lies on a network file system.

    Returns:
        The variables and their values.
    """
    for variable, subfolder in SUBFOLDERS.items():
        current = os.environ.get(variable)
        if not current or filesystem_type(Path(current)) in NETWORK_FILESYSTEMS:
            os.environ[variable] = str(root / subfolder)
    return {variable: os.environ[variable] for variable in SUBFOLDERS}


def filesystem_type(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Type of the file system that holds ``path`` (which need not exist), for example ``ext4``."""
    path = path.absolute()
    best, kind = -1, "unknown"
    if not mounts.is_file():
        return kind
    for line in mounts.read_text().splitlines():
        _, point, type_, *_ = line.split()
        point = Path(point.replace("\\040", " "))
        if (path == point or point in path.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), type_
    return kind
