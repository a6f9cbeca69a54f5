"""Small rows through a pool of actors on Ray Data: how assessors, caption models and shard builders are run."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from loomvideo.platform.errors import UserError


def map_on_actors(
    worker: type, arguments: Sequence[Any], work: list[dict[str, Any]], count: int, cpus: float, gpus: float
) -> Iterator[dict[str, Any]]:
    """Call ``worker(*arguments)(row)`` for every row; yields what comes back, in any order.

    Args:
        worker: Class of the actors.
        arguments: Of its constructor.
        work: Rows.
        count: Actors; 0 takes as many as the cluster's CPUs and GPUs allow.
        cpus: That an actor reserves.
        gpus: That an actor reserves.

    Raises:
        UserError: if the cluster has no such GPU.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    fitting = _workers_that_fit(cpus, gpus, ray.cluster_resources())
    size = max(min(count or fitting, len(work)), 1)
    dataset = ray.data.from_items(work, override_num_blocks=len(work)).map(
        worker,
        fn_constructor_args=tuple(arguments),
        num_cpus=cpus,
        num_gpus=gpus,
        # One row at a time: queueing several behind one worker would leave others idle at the end.
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
    )
    yield from dataset.iter_rows()


def _workers_that_fit(cpus: float, gpus: float, resources: dict[str, float]) -> int:
    count = int(resources.get("CPU", 1) / cpus) if cpus else 1
    if gpus:
        count = min(count, int(resources.get("GPU", 0) / gpus))
        if count < 1:
            raise UserError(f"workers.gpus={gpus:g}: the cluster has {resources.get('GPU', 0):g} GPUs")
    return max(count, 1)
