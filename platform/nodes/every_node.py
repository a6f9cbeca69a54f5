"""Run a function once on every alive Ray node, and on nodes that join later."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loomvideo.platform.errors import UserError
from loomvideo.platform.time_limits import NODES_PREPARED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeResult:
    """What a function returned on one node.

    Attributes:
        node_id: Ray's id of the node.
        address: Its IP address.
        seconds: Time from submission to result.
        value: What the function returned, or None.
        error: The one-line message of what it raised, or None.
    """

    node_id: str
    address: str
    seconds: float
    value: Any = None
    error: str | None = None


def run_on_every_node(
    function: Callable[[], Any], timeout_s: float = 0.0, node_ids: Sequence[str] | None = None
) -> list[NodeResult]:
    """Run ``function`` once on every alive node, all at the same time, and wait.

    The tasks take no CPU slots, so that they run on nodes whose CPUs other tasks hold. A node that dies on the way is
    left out: it needs nothing any more.

    Args:
        function: Importable on every node; its result must be picklable.
        timeout_s: How long the slowest node may take; the usual time when 0.
        node_ids: Only these nodes.

    Raises:
        UserError: naming the nodes that did not answer in time.
    """
    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"] and (node_ids is None or n["NodeID"] in node_ids)}
    start, timeout_s = time.monotonic(), timeout_s or NODES_PREPARED.here()
    pending = {_submit(function, node_id): node_id for node_id in nodes}
    results = []
    while pending:
        remaining = timeout_s - (time.monotonic() - start)
        done, _ = ray.wait(list(pending), timeout=max(remaining, 0))
        if not done:
            late = ", ".join(nodes[node_id]["NodeManagerAddress"] for node_id in pending.values())
            raise UserError(
                f"preparing nodes took over {timeout_s:.0f} s on {late}: look at their logs, or raise the limit"
            )
        node_id = pending.pop(done[0])
        value, error = None, None
        try:
            value = ray.get(done[0])
        except ray.exceptions.RayTaskError as failure:
            error = str(failure.cause).splitlines()[0] if str(failure.cause) else type(failure.cause).__name__
        except (ray.exceptions.RayError, ValueError) as failure:
            if node_id not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
                logger.warning("node %s left while it was being prepared", nodes[node_id]["NodeManagerAddress"])
                continue
            error = str(failure).splitlines()[0]
        seconds = time.monotonic() - start
        results.append(NodeResult(node_id, nodes[node_id]["NodeManagerAddress"], seconds, value, error))
    return results


@contextlib.contextmanager
def prepared_nodes(
    function: Callable[[], Any],
    on_result: Callable[[NodeResult], None],
    interval_s: float = 5.0,
    timeout_s: float = 0.0,
) -> Iterator[list[NodeResult]]:
    """Run ``function`` on every node now, and while the body runs on every node that joins.

    Args:
        function: What :func:`run_on_every_node` takes.
        on_result: Called with the result of each node that joined later, in a thread of its own.
        interval_s: How often to look for new nodes.
        timeout_s: How long each round may take; the usual time when 0.

    Yields:
        The results of the nodes that were there at the start.
    """
    first = run_on_every_node(function, timeout_s)
    seen = {result.node_id for result in first}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(interval_s):
            new = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in seen]
            seen.update(new)
            if not new:
                continue
            try:
                for result in run_on_every_node(function, timeout_s, new):
                    on_result(result)
            except UserError as error:  # a thread has nobody to raise to; the node's own ranks will build
                logger.error("%s", error)

    thread = threading.Thread(target=watch, name="prepare-nodes", daemon=True)
    thread.start()
    try:
        yield first
    finally:
        stop.set()
        thread.join(timeout=interval_s + 1)


def _submit(function: Callable[[], Any], node_id: str) -> ray.ObjectRef:
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=1)(function).options(scheduling_strategy=strategy).remote()
