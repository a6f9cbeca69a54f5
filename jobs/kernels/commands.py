"""``loomvideo kernels``: build, inspect, time and clear the compiled kernels of this machine or of a cluster."""

from dataclasses import dataclass
from typing import Any

import typer

from loomvideo.jobs.command import config_command
from loomvideo.platform.config import option
from loomvideo.platform.console import console, table
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.config import KernelConfig

app = typer.Typer(name="kernels", help="Build, inspect, time and clear compiled kernels.", no_args_is_help=True)


@dataclass
class BuildConfig:
    """Keys of ``loomvideo kernels build``."""

    kernels: KernelConfig = option(KernelConfig, "where kernels are kept")
    architectures: list[int] = option([], "GPU architectures to compile Triton kernels for, as [80,90]; [] this node's")
    model: str = option("5b", "model size whose width the Triton kernels are compiled for")
    nodes: str = option("this", "this machine, or all nodes of the running Ray cluster")


@dataclass
class StatusConfig:
    """Keys of ``loomvideo kernels status`` and ``clear``."""

    kernels: KernelConfig = option(KernelConfig, "where kernels are kept")


@dataclass
class BenchConfig:
    """Keys of ``loomvideo kernels bench``."""

    kernels: KernelConfig = option(KernelConfig, "where kernels are kept")
    tokens: int = option(4096, "tokens of the packed sequence")
    model: str = option("5b", "model size whose width is timed")
    dtypes: list[str] = option(["float32", "bfloat16"], "activations")
    repeats: int = option(9, "timed calls; the median counts")


@config_command(app, "build", "kernels", lambda: BuildConfig)
def build(config: BuildConfig) -> None:
    """Build or fetch everything that training needs: on this machine, for an image, or on every node of a cluster."""
    from loomvideo.jobs.kernels.build import kernels_on_every_node
    from loomvideo.model.kernels.node import prepare_this_node

    shape = _shape(config.model)
    if config.nodes == "all":
        from loomvideo.platform.ray_session import ray_session

        with ray_session(), kernels_on_every_node(config.kernels, shape) as record:
            rows = dict(record)
    elif config.nodes == "this":
        config.kernels.required = True
        rows = {"this": prepare_this_node(config.kernels, shape, config.architectures)}
    else:
        raise UserError(f"nodes={config.nodes}: expected this or all")
    for node, row in rows.items():
        _print_node(node, row)
    if any("error" in row for row in rows.values()):
        raise UserError("some nodes could not be prepared; see above")


@config_command(app, "status", "kernels", lambda: StatusConfig)
def status(config: StatusConfig) -> None:
    """Show the compilers, caches and artefacts of this machine and which back end it would use."""
    import os
    from pathlib import Path

    from loomvideo.model import kernels
    from loomvideo.model.kernels import cpp_build
    from loomvideo.model.kernels.node import gpu_architectures
    from loomvideo.platform.nodes.artifacts import ArtifactStore
    from loomvideo.platform.nodes.jit_caches import NETWORK_FILESYSTEMS, filesystem_type, point_jit_caches

    os.environ.update(config.kernels.environment())
    store = ArtifactStore.from_environment()
    caches = {"kernels": str(store.cache_dir), **point_jit_caches(store.cache_dir / "jit")}
    report = kernels.set_backend(config.kernels.backend, config.kernels.required)
    print(f"back end        {', '.join(f'{device}: {name}' for device, name in report['backend'].items())}")
    if "cpp" in report:
        print(f"cpp             {report['cpp']['isa']}, {report['cpp']['origin']}")
    for what, reason in report["replaced"].items():
        print(f"replaced        {what}: {reason}")
    print(f"compiler        {cpp_build.compiler_identity() or 'none'}")
    print(f"GPUs            {', '.join(f'sm_{a}' for a in gpu_architectures()) or 'none'}")
    print(f"shared storage  {store.shared_url or 'none'}")
    for name, path in caches.items():
        kind = filesystem_type(Path(path))
        print(f"{name:<24}{path} ({kind}{', a network disk: expect hangs' if kind in NETWORK_FILESYSTEMS else ''})")
    artefacts = table("artefact", "where", "built in", "target", "compiler")
    for row in store.contents():
        target = ", ".join(row["target"].values())
        artefacts.add_row(row["name"], row["origin"], f"{row['build_seconds']} s", target, str(row["compiler"]))
    console().print(artefacts)


@config_command(app, "bench", "kernels", lambda: BenchConfig)
def bench(config: BenchConfig) -> None:
    """Time the C++ kernels of this machine against eager."""
    import os

    import torch

    from loomvideo.model.kernels.bench import time_backend

    os.environ.update(config.kernels.environment())
    dim, num_heads, patch = _shape(config.model)
    try:
        dtypes = tuple(getattr(torch, name) for name in config.dtypes)
    except AttributeError as error:
        raise UserError(f"dtypes={config.dtypes}: expected float32 or bfloat16") from error
    print(f"L = {config.tokens}, D = {dim}, {num_heads} heads, {torch.get_num_threads()} threads")
    print(f"{'operation':<22}{'dtype':<10}{'phase':<18}{'eager ms':>10}{'cpp ms':>10}{'gain':>8}{'of copy':>9}")
    for row in time_backend("cpp", config.tokens, dim, num_heads, patch, dtypes, config.repeats):
        print(
            f"{row.name:<22}{row.dtype:<10}{row.phase:<18}{row.eager_ms:>10.1f}{row.fused_ms:>10.1f}"
            f"{row.gain:>7.1f}x{row.fused_share:>9.0%}"
        )


@config_command(app, "clear", "kernels", lambda: StatusConfig)
def clear(config: StatusConfig) -> None:
    """Remove this machine's compiled kernels; they are built anew when next needed."""
    import os

    from loomvideo.platform.nodes.artifacts import ArtifactStore

    os.environ.update(config.kernels.environment())
    store = ArtifactStore.from_environment()
    removed = store.clear()
    print(f"removed {len(removed)} artefacts from {store.cache_dir}")


def _shape(model: str) -> tuple[int, int, int]:
    from loomvideo.model.kernels.node import model_shape
    from loomvideo.model.sizes import model_size

    return model_shape(model_size(model).dit)


def _print_node(node: str, row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{node}: {row['error']}")
        return
    print(f"{node} ({row['host']}): ready in {row['seconds']} s")
    for name, artifact in row["artifacts"].items():
        detail = artifact.get("path", "")
        print(f"  {name:<22}{artifact['origin']:<10}{artifact['seconds']:>8} s  {detail}")
        for note in artifact.get("notes", []):
            print(f"    {note}")
    for name, reason in row["missing"].items():
        print(f"  {name:<22}missing   {reason}")
