"""What a machine must have to take part in a job: checks that run on the machine itself, each in seconds."""

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from loomvideo.platform.time_limits import DOCTOR_COMMAND

PACKAGES = ("torch", "ray", "deepspeed", "mlflow", "transformers", "diffusers")
MIN_DISK_GIB = 5.0
MIN_SHARED_MEMORY_MIB = 512
PROBE_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Check:
    """One result.

    Attributes:
        name: What was checked.
        status: ``ok``, ``warn`` or ``fail``.
        detail: What was found; for a problem also what to do.
        value: Must be equal on all nodes (versions, ABI); None for what may differ.
    """

    name: str
    status: str
    detail: str
    value: str | None = None


Probe = Callable[[], Check]


def node_probes(storage: str | None, tracking_uri: str | None) -> list[Probe]:
    """The checks of every node.

    Args:
        storage: Folder or URL that all nodes share and jobs write to; None skips the check.
        tracking_uri: MLflow; None or a local store skips the check.
    """
    probes: list[Probe] = [versions, abi, accelerator, gpu, compiler, disk, shared_memory, memory_bandwidth]
    if storage:
        probes.append(lambda: shared_storage(storage))
    if tracking_uri and tracking_uri.startswith("http"):
        probes.append(lambda: tracking(tracking_uri))
    return probes


def run_probes(probes: Iterable[Probe]) -> list[dict]:
    """Run checks; one that breaks is a failed check, not a failed doctor."""
    results = []
    for probe in probes:
        try:
            check = probe()
        except Exception as error:  # whatever a broken machine raises is the finding
            name = getattr(probe, "__name__", "check").replace("_", " ")
            check = Check(name, "fail", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        results.append(asdict(check))
    return results


def versions() -> Check:
    """Packages that must be equal on all nodes."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return Check("versions", "fail", f"{package} is not installed in this image")
    text = " ".join(f"{name} {version}" for name, version in found.items())
    return Check("versions", "ok", text, value=text)


def abi() -> Check:
    """Processor, C library and torch build: compiled kernels travel only between equal ones."""
    import torch

    libc = " ".join(platform.libc_ver())
    text = f"{platform.machine()} {libc} cuda {torch.version.cuda or 'none'}"
    return Check("abi", "ok", text, value=text)


def accelerator() -> Check:
    """Whether this environment is for CPU or CUDA, and whether that fits the machine and itself."""
    import torch

    version, cuda = torch.__version__, torch.version.cuda
    # Written by make setup; an image or a hand-made environment may have none.
    record = Path(sys.prefix, ".accelerator")
    made_for = record.read_text().strip() if record.exists() else ("cuda" if cuda else "cpu")
    text = f"{made_for}: torch {version}, " + (f"built for CUDA {cuda}" if cuda else "a CPU build")
    wanted = _triton_of_torch()
    triton = _installed("triton")
    if cuda and wanted and triton != wanted:
        return Check("accelerator", "warn", f"{text} and Triton {wanted}, but Triton {triton} is installed: make setup")
    has_gpu = shutil.which("nvidia-smi") is not None and "GPU 0" in _run(["nvidia-smi", "-L"])
    if has_gpu and made_for == "cpu":
        return Check("accelerator", "warn", f"{text}, but there is a GPU: make setup ACCELERATOR=cuda")
    if cuda and made_for == "cuda" and not has_gpu:
        return Check("accelerator", "warn", f"{text}, but nvidia-smi lists no GPU: make setup ACCELERATOR=cpu")
    return Check("accelerator", "ok", text)


def _triton_of_torch() -> str | None:
    """The release of Triton that the installed torch asks for; None for a build that asks for none."""
    for line in importlib.metadata.requires("torch") or []:
        if line.startswith("triton=="):
            return line.removeprefix("triton==").partition(";")[0].strip()
    return None


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> Check:
    """Every GPU that Ray gives away can compute."""
    import torch

    visible = shutil.which("nvidia-smi")
    if not torch.cuda.is_available():
        if visible and torch.version.cuda is None:
            return Check(
                "gpu",
                "fail",
                "there are GPUs, but torch is a CPU build: make setup ACCELERATOR=cuda, or the cuda image",
            )
        if visible:
            return Check("gpu", "warn", "nvidia-smi is there, but torch sees no GPU; check driver and limits")
        return Check("gpu", "ok", "none")
    names = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        total = torch.ones(1024, device=device).sum().item()
        if total != 1024:
            return Check("gpu", "fail", f"GPU {index} adds 1024 ones up to {total}; take the node out of service")
        names.append(torch.cuda.get_device_name(index))
    driver = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    text = f"{len(names)} x {names[0]}, driver {driver[0] if driver else '?'}"
    return Check("gpu", "ok", text, value=text)


def compiler() -> Check:
    """A C++ compiler for kernels that no cache has."""
    command = shutil.which(os.environ.get("CXX", "g++"))
    if command is None:
        return Check("compiler", "warn", "no g++: kernels must come prebuilt or from shared storage")
    return Check("compiler", "ok", _run([command, "--version"]).splitlines()[0])


def disk() -> Check:
    """Room for spilled objects and caches on the node's own disk."""
    folder = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))
    free_gib = shutil.disk_usage(folder).free / 1024**3
    if free_gib < MIN_DISK_GIB:
        return Check("disk", "fail", f"{free_gib:.1f} GiB free in {folder}; need {MIN_DISK_GIB:g} or more")
    return Check("disk", "ok", f"{free_gib:.0f} GiB free in {folder}")


def shared_memory() -> Check:
    """/dev/shm, which Ray's object store and NCCL live in; 64 MiB is a container's default."""
    usage = shutil.disk_usage("/dev/shm")
    mib = usage.total / 1024**2
    if mib < MIN_SHARED_MEMORY_MIB:
        return Check("/dev/shm", "fail", f"{mib:.0f} MiB; mount an emptyDir with medium Memory (shared_memory_gib)")
    return Check("/dev/shm", "ok", f"{mib / 1024:.1f} GiB, {usage.free / 1024**3:.1f} free")


def shared_storage(url: str) -> Check:
    """Write, read back and remove a file where jobs keep their runs."""
    import fsspec

    name = f"{url.rstrip('/')}/.doctor-{platform.node()}-{os.getpid()}-{time.time_ns()}"
    data = os.urandom(PROBE_BYTES)
    filesystem, path = fsspec.core.url_to_fs(name)
    started = time.monotonic()
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    try:
        filesystem.pipe_file(path, data)
        written = time.monotonic()
        if filesystem.cat_file(path) != data:
            return Check("storage", "fail", f"{url}: reads back other bytes than were written")
        read = time.monotonic()
    finally:
        if filesystem.exists(path):
            filesystem.rm_file(path)
    mib = PROBE_BYTES / 1024**2
    return Check(
        "storage", "ok", f"{url}: {mib / (written - started):.0f} MiB/s write, {mib / (read - written):.0f} read"
    )


def tracking(uri: str) -> Check:
    """MLflow answers, accepts this node's user and refuses others."""
    import mlflow

    health = _status(f"{uri.rstrip('/')}/health")
    if health != 200:
        reason = "refuses this host name; extend --allowed-hosts" if health == 403 else f"answers {health}"
        return Check("mlflow", "fail", f"{uri}: {reason}")
    mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    anonymous = _status(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1")
    if anonymous == 200:
        return Check("mlflow", "warn", f"{uri}: answers without a user; start it with --app-name basic-auth")
    return Check("mlflow", "ok", f"{uri}: reached, refuses anonymous requests ({anonymous})")


def _status(url: str) -> int | str:
    try:
        with urllib.request.urlopen(url, timeout=DOCTOR_COMMAND.here()) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return f"no answer ({error})"


def memory_bandwidth(megabytes: int = 32) -> Check:
    """Copy speed of main memory: a node far below its equals is throttled or shared."""
    size = megabytes * 1024**2
    source, target = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    ctypes.memmove(target, source, size)
    started = time.monotonic()
    ctypes.memmove(target, source, size)
    rate = 2 * size / (time.monotonic() - started) / 1e9
    return Check("memory", "ok", f"{rate:.1f} GB/s")


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=DOCTOR_COMMAND.here()).stdout.strip()
