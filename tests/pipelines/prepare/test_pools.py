"""Pools of workers on a cluster that has no node for them when the work begins."""

import json
import subprocess
import sys

import pytest

from loomvideo.jobs.command import job_config
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.stages import ASSESS, ENCODE

# A cluster of its own, in a process of its own: Ray connects to one at a time. GPU nodes come while the work waits.
SCRIPT = """
import json
import threading
import time

import ray
from ray.cluster_utils import Cluster

from loomvideo.pipelines.prepare.pools import Pool, map_on_actors


class Worker:
    def __call__(self, row):
        time.sleep(0.5)
        return {"unit": row["unit"], "node": ray.get_runtime_context().get_node_id()}


memory = {"object_store_memory": 80_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "num_gpus": 0, **memory})
before = ray.cluster_resources().get("GPU", 0)


reports = []
work = [{"unit": str(number)} for number in range(120)]
# Nodes can be started from the main thread only.
thread = threading.Thread(target=lambda: reports.extend(map_on_actors(Worker, (), work, Pool(0, 1.0, 1.0))))
thread.start()
for _ in range(2):
    time.sleep(5)
    cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80_000_000)
thread.join()
units, nodes = ({report[name] for report in reports} for name in ("unit", "node"))
print("RESULT", json.dumps({"gpus_before": before, "units": len(units), "nodes": len(nodes)}), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_cluster_without_gpus_is_waited_for_and_grown_into(tmp_path):
    script = tmp_path / "zero.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads(found[0].removeprefix("RESULT ")) == {"gpus_before": 0, "units": 120, "nodes": 2}


def test_workers_that_assess_reserve_their_own_cpus():
    config = job_config(PrepareConfig, "data-prepare", ["preset=5b", "input=x", "output=y"])
    assert ENCODE.pool(config).cpus == 8
    assert ENCODE.pool(config).gpus == 1
    assert (ASSESS.pool(config).cpus, ASSESS.pool(config).gpus, ASSESS.pool(config).size) == (1.0, 0.0, 0)
