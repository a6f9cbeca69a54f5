"""Shared fixtures: one Ray cluster for all tests that need one. Quick tests run first, slow ones while time is left."""

import contextlib
import faulthandler
import os
import threading
import time

import psutil
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
    """How long tests may be started."""
    counted = "(or after LOOMVIDEO_TESTS_STARTED, in Unix seconds)"
    for name, what in (("slow-until", "start no slow test"), ("until", "start no test")):
        parser.addoption(
            f"--{name}",
            type=float,
            default=float("inf"),
            metavar="MINUTES",
            help=f"{what} later than this after the start {counted}",
        )
    parser.addoption(
        "--end-at",
        type=float,
        default=float("inf"),
        metavar="MINUTES",
        help=f"end a run that still hangs so long after the start {counted}, and say where",
    )
    parser.addoption(
        "--walkthrough", action="store_true", help="also run whole pages of the docs, as make test-pages does"
    )


def pytest_configure(config):
    """Note when the run started: on a slow machine making the environment has taken of its time already."""
    started = float(os.environ.get("LOOMVIDEO_TESTS_STARTED") or time.time())
    config.stash[_SLOW_DEADLINE] = started + 60 * config.getoption("--slow-until")
    config.stash[_DEADLINE] = started + 60 * config.getoption("--until")
    config.stash[_NOT_RUN] = []
    end = started + 60 * config.getoption("--end-at")
    if end < float("inf"):
        # Capturing is not on yet: this is the terminal.
        threading.Thread(target=_end_at, args=(end, os.dup(2)), name="end-at", daemon=True).start()


_SLOW_DEADLINE = pytest.StashKey[float]()
_DEADLINE = pytest.StashKey[float]()
_NOT_RUN = pytest.StashKey[list]()
# A test may replace time.sleep.
_wait = threading.Event().wait


def pytest_runtest_setup(item):
    """Leave out a test for which no time is left."""
    deadline = item.config.stash[_SLOW_DEADLINE if item.get_closest_marker("slow") else _DEADLINE]
    if time.time() > min(deadline, item.config.stash[_DEADLINE]):
        item.config.stash[_NOT_RUN].append(item.nodeid)
        pytest.skip("no time left")


def _end_at(end, terminal):
    """Say which test hangs, where, and beside which processes; then end all of it.

    Whoever waits for this run would end it without a word. Neither a signal nor the main thread is needed for this.
    """
    while time.time() < end:
        _wait(1)
    with os.fdopen(terminal, "w", encoding="utf-8") as out:
        children = psutil.Process().children(recursive=True)
        print(f"\n\nthe time is over; running: {os.environ.get('PYTEST_CURRENT_TEST', 'between tests')}", file=out)
        for child in children:
            with contextlib.suppress(psutil.Error):
                print(child.pid, child.status(), child.cpu_times()[:2], *child.cmdline(), file=out)
        out.flush()
        faulthandler.dump_traceback(out)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(1)


def pytest_terminal_summary(terminalreporter, config):
    """Name what was not run: a skip that nobody sees looks like a pass."""
    names = config.stash[_NOT_RUN]
    if names:
        terminalreporter.section(f"{len(names)} tests not run: their time was over")
        for name in names:
            terminalreporter.write_line(name)


def pytest_collection_modifyitems(config, items):
    """Quick tests first, so that a slow machine has run them all; gpu tests are skipped without a CUDA device."""
    if not config.getoption("--walkthrough"):
        for item in items:
            if item.get_closest_marker("walkthrough"):
                item.add_marker(pytest.mark.skip(reason="runs a whole page of the docs; make test-pages"))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            # Most start Ray, some several times: minutes where a quiet machine takes one.
            item.add_marker(pytest.mark.timeout(1800))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
