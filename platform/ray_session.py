"""A Ray session for a job: the cluster it was submitted to, or a local one that ends with it."""

import contextlib
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray

from loomvideo.platform.errors import UserError
from loomvideo.platform.machine import own_folder, slowness, usable_cpus
from loomvideo.platform.time_limits import RAY_START, RAY_WORKER_START

logger = logging.getLogger(__name__)

# Ray warns and changes how workers see GPUs at num_gpus=0 otherwise; the new behaviour is what CPU workers need.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


# The raylet gives its agents 15 s, fixed in its code: on a machine that is overloaded for a while only more tries help.
START_ATTEMPTS = 3
MOST_START_ATTEMPTS = 8
_START_LIMITS = {"RAY_gcs_server_port_wait_time_s": RAY_START, "RAY_worker_register_timeout_seconds": RAY_WORKER_START}
# Sockets lie in session_DATE_PID/sockets below it, and Linux names no socket with more than 107 bytes.
MAX_SESSION_PATH = 40
SHARED_MEMORY = Path("/dev/shm")
OBJECT_STORE_BYTES = 2 << 30


def in_cluster() -> bool:
    """Whether this process should use an existing cluster (submitted with ``ray job submit`` or RAY_ADDRESS set)."""
    return bool(
        os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    )


def quiet_data() -> None:
    """Keep Ray Data from printing: a command has bars and lines of its own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None, env_vars: dict[str, str] | None = None) -> Iterator[None]:
    """Connect to Ray for the duration of a job.

    SIGTERM is turned into :class:`KeyboardInterrupt`, so that both it and Ctrl-C leave through the same clean-up.

    Args:
        num_cpus: CPUs of a local cluster; those that this process may use when None. Ignored when joining a cluster.
        env_vars: Environment of every worker of this job.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    runtime_env = {"env_vars": env_vars or {}}
    joined = ray.is_initialized()
    try:
        if not joined:
            if in_cluster():
                _join(runtime_env)
            else:
                start_local(num_cpus or usable_cpus(), runtime_env=runtime_env, log_to_driver=True)
            # Ray's own handler, set by ray.init, would leave by sys.exit.
            signal.signal(signal.SIGTERM, _interrupt)
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        if not joined:
            ray.shutdown()


def _join(runtime_env: dict[str, Any]) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise UserError(f"RAY_ADDRESS={address}: is a dashboard; send the job there: loomvideo submit, or unset it")
    try:
        ray.init(address="auto", runtime_env=runtime_env, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        ray.shutdown()
        raise UserError(
            f"RAY_ADDRESS={address}: {_first_line(error)}; unset it to run on this machine alone, or start the cluster"
        ) from error


def start_local(num_cpus: int, **options: Any) -> None:
    """Start a local cluster, again when Ray's own fixed limits were too short for this machine.

    Args:
        num_cpus: Its CPUs.
        options: Further ones of ``ray.init``.

    Raises:
        UserError: in one line, when it does not start.
    """
    # A local cluster listens on loopback only and dies with the job; no token is needed to talk to oneself.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    for name, limit in _START_LIMITS.items():
        os.environ.setdefault(name, str(round(limit.here())))
    if folder := _temporary_folder():
        options["_temp_dir"] = folder
    options = _object_store() | options
    quoted = shlex.quote(sys.executable)
    if quoted != sys.executable:
        # Ray starts workers by a shell and hands it this path as it is.
        options["runtime_env"] = {"py_executable": quoted, **options.get("runtime_env", {})}
    attempts = min(max(START_ATTEMPTS, round(2 * slowness())), MOST_START_ATTEMPTS)
    for attempt in range(1, attempts + 1):
        earlier = {child.pid for child in psutil.Process().children()}
        try:
            # Without an address Ray would join whatever other cluster this machine runs.
            with nodes_may_be_late():
                ray.init(
                    address="local", num_cpus=num_cpus, include_dashboard=False, logging_level="warning", **options
                )
            return
        except UserError:
            raise
        except Exception as error:  # Ray raises bare exceptions for a node that is late
            ray.shutdown()
            _end_half_a_cluster(earlier)
            late = isinstance(error, TimeoutError) or "timed out" in str(error).lower()
            if late and attempt < attempts:
                logger.warning(
                    "Ray did not start in time on this machine; trying again (%d of %d)", attempt + 1, attempts
                )
                continue
            reason = f"did not start in {attempts} attempts" if late else "does not start"
            raise UserError(
                f"Ray {reason}: {_first_line(error)} (this machine runs {slowness():.0f} times slower than an ordinary "
                "one now, loomvideo doctor tells more)"
            ) from error


@contextlib.contextmanager
def nodes_may_be_late() -> Iterator[None]:
    """Ray gives a node 30 s to register, and no setting changes that: its look-up is made to wait instead.

    Not for one that ended: the raylet leaves when its agents were not there in the 15 s that it gives them.
    """
    services = ray._private.services
    look_up, ends = services.get_node, time.monotonic() + RAY_START.here()
    earlier = _ended_raylets()

    def patient_look_up(*arguments: Any) -> Any:
        while True:
            try:
                return look_up(*arguments)
            except RuntimeError as error:  # it is not registered yet
                if _ended_raylets() - earlier:
                    raise TimeoutError("the raylet timed out waiting for its agents") from error
                if time.monotonic() > ends:
                    raise
                time.sleep(0.1)

    services.get_node = patient_look_up
    try:
        yield
    finally:
        services.get_node = look_up


def _end_half_a_cluster(earlier: set[int]) -> None:
    """End what a start that failed leaves running: Ray does so only when this process exits."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.pid not in earlier and any("/ray/" in part for part in child.cmdline()):
                child.kill()


def _ended_raylets() -> set[int]:
    """Processes of raylets that this process started and that are over."""
    ended = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "raylet" and child.status() == psutil.STATUS_ZOMBIE:
                ended.add(child.pid)
    return ended


def _object_store() -> dict[str, Any]:
    """Where objects lie when there is no ``/dev/shm``, whose size Ray asks for; where it is small, Ray itself moves."""
    if SHARED_MEMORY.is_dir():
        return {}
    folder = _temporary_folder() or str(_session_folder().parent)
    logger.warning("no %s: Ray's objects lie in %s, which is slower", SHARED_MEMORY, folder)
    return {"_plasma_directory": folder, "object_store_memory": OBJECT_STORE_BYTES}


def _session_folder() -> Path:
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def _temporary_folder() -> str | None:
    """Another folder for Ray's session than its own choice, where that cannot work; else None."""
    chosen = _session_folder()
    there = chosen if chosen.exists() else chosen.parent
    if len(str(chosen)) <= MAX_SESSION_PATH and os.access(there, os.W_OK | os.X_OK):
        return None
    return str(own_folder("loomvideo-ray"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
