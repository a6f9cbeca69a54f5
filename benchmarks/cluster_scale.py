"""What many shards, many builders and dying nodes cost the driver of a stage: `make bench-cluster`.

    python benchmarks/cluster_scale.py --shards 1000 5000 20000                  # builders that return at once
    python benchmarks/cluster_scale.py --builders 4 16 64 --nodes 4 --sleep 10   # what polling a pool costs
    python benchmarks/cluster_scale.py --nodes 20 --builders 20 --shards 1500 --sleep 4 --loss 0.05

The real :func:`map_on_actors`, which every stage of a prepare runs on, sends the rows of so many shards to builders
that sleep. Nodes are Ray's own processes with made-up CPUs on this machine, beside a head without CPUs; a builder is a
process. With ``--loss`` that share of the nodes (one at least) is killed every minute and as many new ones start.
Each run is in a process of its own; the driver's CPU seconds are all of its threads, Ray's client included.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

OBJECT_STORE_BYTES = 100 << 20
# Many nodes on one machine start slowly; Ray's own limits are those of one node.
PATIENCE = ("RAY_raylet_start_wait_time_s", "RAY_gcs_server_port_wait_time_s", "RAY_worker_register_timeout_seconds")


@dataclass(frozen=True)
class Run:
    """One measurement.

    Attributes:
        shards: Rows of work.
        nodes: Nodes besides the head; 0 for builders on the head.
        builders: Processes that build, evenly on the nodes.
        sleep_s: What a shard takes.
        loss: Share of the nodes that dies at once.
        every_s: Time between losses.
    """

    shards: int
    nodes: int
    builders: int
    sleep_s: float
    loss: float
    every_s: float

    @property
    def cpus(self) -> int:
        """Of a node: one for each of its builders."""
        return -(-self.builders // max(self.nodes, 1))


class Sleeper:
    """In place of a builder; notes what it begins."""

    def __init__(self, seconds: float, begun: str) -> None:
        self.seconds, self.begun = seconds, begun

    def __call__(self, row: dict) -> dict:
        """As long as a shard takes, then a report of a real one's size."""
        descriptor = os.open(self.begun, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b".")
        os.close(descriptor)
        time.sleep(self.seconds)
        return {"stage": "encode", "unit": row["unit"], "feature_error": 0.0}


def rows(count: int) -> list[dict]:
    """Work as the plan of a prepare has it."""
    return [
        {"unit": f"train-{number:06d}", "recipe": "0" * 32, "split": "train", "before": ["0" * 40], "row": number}
        for number in range(count)
    ]


class Nodes:
    """Nodes with made-up CPUs, of which some may be killed and replaced again and again."""

    def __init__(self, cluster, run: Run) -> None:
        self.cluster, self.run = cluster, run
        self.alive = [self._new() for _ in range(run.nodes)]
        self.killed, self._stopped = 0, threading.Event()

    def _new(self):
        return self.cluster.add_node(wait=False, num_cpus=self.run.cpus, object_store_memory=OBJECT_STORE_BYTES)

    @contextlib.contextmanager
    def dying(self):
        """Kill and replace until the block is left."""
        thread = threading.Thread(target=self._kill, daemon=True)
        thread.start()
        yield
        self._stopped.set()
        thread.join()

    def _kill(self) -> None:
        chance, count = random.Random(0), max(1, round(self.run.loss * self.run.nodes))
        while not self._stopped.wait(self.run.every_s):
            for node in chance.sample(self.alive, count):
                self.cluster.remove_node(node, allow_graceful=False)
                self.alive.remove(node)
                self.killed += 1
                self.alive.append(self._new())


def measure(run: Run) -> dict:
    """One run, in this process."""
    os.environ.update(dict.fromkeys(PATIENCE, "120"), RAY_AUTH_MODE="disabled")
    import ray
    from ray.cluster_utils import Cluster

    from loomvideo.pipelines.prepare.pools import Pool, map_on_actors
    from loomvideo.platform.ray_session import nodes_may_be_late

    with nodes_may_be_late():
        head = {"num_cpus": 0 if run.nodes else run.cpus, "object_store_memory": OBJECT_STORE_BYTES}
        head["include_dashboard"] = False
        # Its hooks belong to the main thread, and nodes are added by another.
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        nodes = Nodes(cluster, run)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    cluster.wait_for_nodes(600)
    start_mb = peak_mb()
    seen: set[str] = set()
    marks = [(time.perf_counter(), time.process_time())]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as losses:
        begun = Path(folder) / "begun"
        for report in map_on_actors(Sleeper, (run.sleep_s, str(begun)), rows(run.shards), Pool(run.builders, 1)):
            seen.add(report["unit"])
            marks.append((time.perf_counter(), time.process_time()))
            # Losses count from when the pool works.
            if run.loss and len(marks) == 2:
                losses.enter_context(nodes.dying())
        started = begun.stat().st_size
    if len(seen) != run.shards or len(marks) != run.shards + 1:
        raise RuntimeError(f"{run.shards} shards, {len(seen)} reported in {len(marks) - 1} reports")
    (begin_s, begin_cpu), (first_s, first_cpu), (end_s, end_cpu) = marks[0], marks[1], marks[-1]
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(marks[1:])]
    result = {
        "shards": run.shards, "nodes": run.nodes, "builders": run.builders, "sleep_s": run.sleep_s,
        "first_report_s": first_s - begin_s, "wall_s": end_s - first_s,
        "ideal_s": run.shards * run.sleep_s / run.builders, "longest_gap_s": max(gaps),
        "nodes_killed": nodes.killed, "begun_again": started - run.shards,
        "cpu_s_per_1000": (end_cpu - begin_cpu) / run.shards * 1000,
        "cpu_share": (end_cpu - first_cpu) / (end_s - first_s),
        "start_MB": start_mb, "peak_MB": peak_mb(),
    }  # fmt: skip
    ray.shutdown()
    cluster.shutdown()
    return result


def peak_mb() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="*", default=[1000])
    parser.add_argument("--nodes", type=int, default=2, help="nodes besides the head; 0: builders on the head")
    parser.add_argument("--builders", type=int, nargs="*", default=[4], help="builders on all nodes together")
    parser.add_argument("--sleep", type=float, default=0.0, help="seconds that a shard takes")
    parser.add_argument("--loss", type=float, default=0.0, help="share of the nodes that dies at once")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between losses")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(Run(**json.loads(given.one)))))
        return
    for shards, builders in itertools.product(given.shards, given.builders):
        run = Run(shards, given.nodes, builders, given.sleep, given.loss, given.every)
        command = [sys.executable, __file__, "--one", json.dumps(asdict(run))]
        line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in json.loads(line).items()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
