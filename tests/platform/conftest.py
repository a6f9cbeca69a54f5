"""A small cluster with a token, shared by the tests that talk to one from outside."""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "infra" / "drills"))
from local_cluster import LocalCluster


@pytest.fixture(scope="session")
def token_cluster():
    """A head without CPUs and one worker node, reached only with their token."""
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="lv") as folder:
        cluster = LocalCluster(Path(folder))
        try:
            cluster.start_head(num_cpus=0)
            cluster.start_worker("worker", num_cpus=1)
            yield cluster
        finally:
            cluster.stop()
