"""Small rows through a pool of actors on Ray Data: how assessors, caption models and shard builders are run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# For a worker: the last it holds is at most a quarter of what it does, where others have nothing left to do.
_MANY_ROWS = 4


@dataclass(frozen=True)
class Pool:
    """How many workers a stage may have, and what each reserves.

    Attributes:
        size: Workers at most; 0 sets no limit but the work.
        cpus: CPUs that a worker reserves.
        gpus: GPUs that a worker reserves.
        rows: Rows that a worker is given at a time where there are many, each in a thread of its own.
    """

    size: int
    cpus: float
    gpus: float = 0.0
    rows: int = 1

    def rows_at_a_time(self, num_rows: int, cluster: Mapping[str, float]) -> int:
        """Rows that a worker is given at a time: one where two would leave others without any.

        Args:
            num_rows: All rows.
            cluster: The resources of the nodes that are there now; a guess at how many workers there will be.
        """
        room = cluster.get("GPU", 0.0) / self.gpus if self.gpus else cluster.get("CPU", 0.0) / max(self.cpus, 1e-3)
        workers = max(min(self.size or num_rows, int(room)), 1)
        return self.rows if num_rows >= _MANY_ROWS * workers else 1


def map_on_actors(
    worker: type, arguments: Sequence[Any], work: Sequence[Mapping[str, Any]], pool: Pool
) -> Iterator[Any]:
    """Call ``worker(*arguments)(row)`` for every row; yields what comes back, in any order.

    The pool starts with one worker and grows while rows wait and the cluster has, or gets, room: nothing is asked of
    the nodes that are there now, so a cluster that scales from zero nodes is waited for.

    Args:
        worker: Class of the actors.
        arguments: The arguments of its constructor.
        work: Rows.
        pool: How many, and what each reserves.
    """
    import ray

    from loomvideo.platform.ray_session import quiet_data

    quiet_data()
    # A worker has no rows waiting, so a pool is full at 100 %, which Ray's own threshold is above.
    ray.data.DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    most = min(pool.size or len(work), len(work))
    rows = pool.rows_at_a_time(len(work), ray.cluster_resources()) if pool.rows > 1 else 1
    dataset = ray.data.from_items(list(work), override_num_blocks=len(work)).map(
        worker,
        fn_constructor_args=tuple(arguments),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        # No row queues behind another: that would leave others idle at the end.
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=most,
            max_tasks_in_flight_per_actor=rows,
            max_concurrent_calls_per_actor=rows,
            enable_true_multi_threading=rows > 1,
        ),
    )
    yield from dataset.iter_rows()
