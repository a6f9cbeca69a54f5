"""Announce that this node is about to go: ``python -m loomvideo.platform.cluster.drain SECONDS``.

Run by a worker pod's preStop hook. Kubernetes tells nobody inside that a spot node is being taken; draining the node
with a deadline starts no new work on it and tells Ray Train, which gives the job time to write a checkpoint.
"""

import socket
import sys
import time
from typing import Any

REASON = "DRAIN_NODE_REASON_PREEMPTION"
POLL_S = 1.0


def drain(node_id: str, gcs_address: str, seconds: int) -> None:
    """Ask the cluster to drain a node by a deadline.

    Args:
        node_id: Hexadecimal id of the node.
        gcs_address: ``host:port`` of the head.
        seconds: Time from now until the node is gone.

    Raises:
        RuntimeError: if the cluster refuses.
    """
    import ray
    from ray.core.generated import autoscaler_pb2

    client = ray._raylet.GcsClient(address=gcs_address)
    deadline_ms = int((time.time() + seconds) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value(REASON)
    accepted, refusal = client.drain_node(node_id, reason, "the pod is being deleted", deadline_ms)
    if not accepted:
        raise RuntimeError(f"node {node_id}: drain refused: {refusal}")


def this_node() -> dict[str, Any] | None:
    """The alive Ray node of this machine, or None."""
    import ray

    hosts = {socket.gethostname(), ray.util.get_node_ip_address()}
    for node in ray.nodes():
        if node["Alive"] and hosts & {node["NodeManagerHostname"], node["NodeManagerAddress"]}:
            return node
    return None


def main(seconds: int) -> None:
    """Drain this machine's node and wait until it is gone from the cluster or the time is over."""
    import ray

    ray.init(address="auto", log_to_driver=False, logging_level="error")
    node = this_node()
    if node is None:
        return
    deadline = time.monotonic() + seconds
    drain(node["NodeID"], ray.get_runtime_context().gcs_address, seconds)
    while time.monotonic() < deadline and this_node() is not None:
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(int(sys.argv[1]))
