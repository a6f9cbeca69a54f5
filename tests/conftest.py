"""Shared fixtures: one Ray cluster for all tests that need one. Quick tests run first, slow ones while time is left."""

import os
import time

import pytest

# Small tensors: a second thread only waits for the first, and on a busy machine waits long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """A local two-CPU Ray cluster, started once a session."""
    import ray

    from loomvideo.platform.ray_session import start_local

    start_local(2, log_to_driver=False)
    yield ray
    ray.shutdown()


def pytest_addoption(parser):
    """How long slow tests may be started."""
    parser.addoption(
        "--slow-until",
        type=float,
        default=float("inf"),
        metavar="MINUTES",
        help="start no slow test later than this after the start (or after LOOMVIDEO_TESTS_STARTED, in Unix seconds)",
    )

    parser.addoption(
        "--walkthrough", action="store_true", help="also run whole pages of the docs, as make test-pages does"
    )


def pytest_configure(config):
    """Note when the run started: on a slow machine making the environment has taken of its time already."""
    started = float(os.environ.get("LOOMVIDEO_TESTS_STARTED") or time.time())
    config.stash[_DEADLINE] = started + 60 * config.getoption("--slow-until")
    config.stash[_NOT_RUN] = []


_DEADLINE = pytest.StashKey[float]()
_NOT_RUN = pytest.StashKey[list]()


def pytest_runtest_setup(item):
    """Leave out a slow test for which no time is left."""
    if item.get_closest_marker("slow") and time.time() > item.config.stash[_DEADLINE]:
        item.config.stash[_NOT_RUN].append(item.nodeid)
        pytest.skip("no time left for slow tests")


def pytest_terminal_summary(terminalreporter, config):
    """Name what was not run: a skip that nobody sees looks like a pass."""
    names = config.stash[_NOT_RUN]
    if names:
        minutes = config.getoption("--slow-until")
        terminalreporter.section(f"{len(names)} slow tests not run: {minutes:g} minutes had gone")
        for name in names:
            terminalreporter.write_line(name)


def pytest_collection_modifyitems(config, items):
    """Quick tests first, so that a slow machine has run them all; gpu tests are skipped without a CUDA device."""
    if not config.getoption("--walkthrough"):
        for item in items:
            if item.get_closest_marker("walkthrough"):
                item.add_marker(pytest.mark.skip(reason="runs a whole page of the docs; make test-pages"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
