"""Two Ray nodes on one machine with caches of their own, a third that joins later; prints what was built as JSON."""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
from ray.cluster_utils import Cluster

from loomvideo.jobs.kernels.build import kernels_on_every_node, summary
from loomvideo.model.kernels.node import use_kernels
from loomvideo.platform.nodes.config import KernelConfig


def main(root: Path) -> None:
    def node(name: str) -> dict:
        return {"num_cpus": 2, "env_vars": {"LOOMVIDEO_KERNEL_CACHE": str(root / name)}}

    cluster = Cluster(initialize_head=True, head_node_args={**node("a"), "include_dashboard": False})
    cluster.add_node(**node("b"))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    config = KernelConfig(backend="cpp", required=True, watch_interval_s=0.2)

    @ray.remote(num_cpus=1)
    def rank() -> dict:
        return use_kernels(config)

    with kernels_on_every_node(config) as record:
        first = json.loads(json.dumps(record))
        ranks = ray.get([rank.remote() for _ in range(2)])
        cluster.add_node(**node("c"))
        deadline = time.monotonic() + 120
        while len(record) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
    with kernels_on_every_node(config) as again:
        pass
    built = {name: sorted(p.name for p in (root / name).glob("cpp-*")) for name in "abc"}
    print(
        json.dumps(
            {"first": first, "all": record, "again": again, "summary": summary(again), "built": built, "ranks": ranks}
        )
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
