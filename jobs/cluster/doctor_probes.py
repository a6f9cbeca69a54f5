"""Checks of a machine that need more than the platform: run by the doctor on every node."""

import torch

from loomvideo.model import kernels as operations
from loomvideo.model.kernels.selfcheck import disagreement
from loomvideo.platform.cluster.node_checks import Check


def kernels() -> Check:
    """Build or load this machine's kernels and compare one operation of each kind with its definition."""
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
