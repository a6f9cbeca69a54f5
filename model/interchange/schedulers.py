"""Schedulers of diffusers in the place of the published one."""

import inspect
from typing import Any

from loomvideo.model.sampler import Solver, flow_sigmas
from loomvideo.platform.errors import UserError


class SchedulerChoice:
    """A scheduler that integrates velocities along the flow.

    Args:
        scheduler: A scheduler of diffusers; it is copied for each generation, never changed.

    Raises:
        UserError: if it integrates something else.
    """

    def __init__(self, scheduler: Any) -> None:
        name, config = type(scheduler).__name__, scheduler.config
        along_flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
        if not (name.startswith("FlowMatch") or along_flow):
            raise UserError(
                f"scheduler={name}: integrates no flow; take a FlowMatch scheduler, or one with "
                "use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=5.0"
            )
        self._scheduler = scheduler

    def build(self, steps: int) -> Solver:
        """A copy, set to a number of steps."""
        solver = type(self._scheduler).from_config(self._scheduler.config)
        if "sigmas" in inspect.signature(solver.set_timesteps).parameters:
            solver.set_timesteps(device="cpu", sigmas=flow_sigmas(steps))
        else:
            solver.set_timesteps(steps, device="cpu")
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(0)
        return solver
