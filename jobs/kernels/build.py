"""Kernels of a job: built once on every node before its workers start, then only loaded; checked by the doctor."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from loomvideo.model.kernels.node import Shape, prepare_this_node
from loomvideo.platform.cluster.node_checks import Check
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.config import KernelConfig

logger = logging.getLogger(__name__)

HEAD_DIM = 128
"""Of the 5b model."""


@contextlib.contextmanager
def kernels_on_every_node(config: KernelConfig, shape: Shape | None = None) -> Iterator[dict[str, Any]]:
    """Prepare every alive node, and while the body runs every node that joins.

    Call it in the driver, with Ray initialised, around the training run; ``shape`` as in :func:`prepare_this_node`.

    Yields:
        A record for the run: ``{node address: result of prepare_this_node}``; nodes that join later are added to it.

    Raises:
        UserError: with ``kernels.required=true``, naming the first node that failed and why.
    """
    from loomvideo.platform.nodes.every_node import NodeResult, prepared_nodes

    record: dict[str, Any] = {}

    def add(result: NodeResult) -> None:
        name = f"{result.address}-{result.node_id[:6]}"
        record[name] = result.value if result.error is None else {"error": result.error, "seconds": result.seconds}
        if result.error is not None:
            logger.warning("kernels on node %s: %s", name, result.error)

    def prepare() -> dict[str, Any]:
        return prepare_this_node(config, shape)

    with prepared_nodes(prepare, add, config.watch_interval_s) as results:
        for result in results:
            add(result)
            if result.error is not None and config.required:
                raise UserError(f"kernels on node {result.address}: {result.error}")
        yield record


def summary(record: dict[str, Any]) -> dict[str, float]:
    """Numbers of a record of :func:`kernels_on_every_node` for experiment tracking."""
    rows = [row for row in record.values() if "artifacts" in row]
    origins = [artifact["origin"] for row in rows for artifact in row["artifacts"].values()]
    return {
        "kernels/nodes": float(len(record)),
        "kernels/slowest_node_s": max((row["seconds"] for row in record.values()), default=0.0),
        "kernels/built": float(origins.count("built")),
        "kernels/from_shared": float(origins.count("shared")),
        "kernels/cached": float(origins.count("cache") + origins.count("prebuilt")),
        "kernels/missing": float(sum(len(row["missing"]) for row in rows) + len(record) - len(rows)),
    }


def kernels() -> Check:
    """The doctor's check of a node: build or load kernels, compare one operation of each kind with its definition."""
    import torch

    from loomvideo.model import kernels as operations
    from loomvideo.model.kernels.selfcheck import disagreement

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with operations.use_backend("auto", required=False):
        for name in ("qk_norm_rope", "layer_norm_modulate", "gated_residual", "scale_and_add"):
            difference = disagreement(getattr(operations, name), name, torch.float32, device, 96)
            if difference:
                return Check("kernels", "fail", f"{name}: {difference}")
        report = operations.report()
    used = report["backend"].get(device, "eager")
    if report["replaced"]:
        reason = "; ".join(f"{name}: {why}" for name, why in report["replaced"].items())
        return Check("kernels", "warn", f"eager stands in: {reason}")
    return Check("kernels", "ok", f"{used} agrees with the definition on {device}")


def attention() -> Check:
    """The doctor's check of a node: try what would compute attention on its GPU, compare it with plain attention."""
    import torch

    from loomvideo.model import attention_choice
    from loomvideo.model.attention import settled_attention

    if not torch.cuda.is_available():
        return Check("attention", "ok", "scaled dot products on the CPU")
    try:
        used = settled_attention(torch.zeros(1, dtype=torch.bfloat16, device="cuda"), HEAD_DIM)
    except UserError as error:
        return Check("attention", "fail", str(error))
    passed_over = attention_choice.report()["passed_over"]
    missed = "; ".join(f"without {name}: {why}" for name, why in passed_over.items())
    detail = f"{used} agrees with plain attention; {missed}".strip("; ")
    return Check("attention", "warn" if passed_over else "ok", detail)


MODEL_PROBES = (kernels, attention)
"""What the doctor asks of every node beside the platform's own checks."""
