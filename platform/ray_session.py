"""A Ray session for a job: the cluster it was submitted to, or a local one that ends with it."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType

import ray

logger = logging.getLogger(__name__)

# Ray warns and changes how workers see GPUs at num_gpus=0 otherwise; the new behaviour is what CPU workers need.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def in_cluster() -> bool:
    """Whether this process should use an existing cluster (submitted with ``ray job submit`` or RAY_ADDRESS set)."""
    return bool(
        os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    )


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None, env_vars: dict[str, str] | None = None) -> Iterator[None]:
    """Connect to Ray for the duration of a job.

    SIGTERM is turned into :class:`KeyboardInterrupt`, so that both it and Ctrl-C leave through the same clean-up.

    Args:
        num_cpus: CPUs of a local cluster; the machine's when None. Ignored when joining a cluster.
        env_vars: Environment of every worker of this job.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    runtime_env = {"env_vars": env_vars or {}}
    if ray.is_initialized():
        yield
        signal.signal(signal.SIGTERM, previous)
        return
    if in_cluster():
        ray.init(address="auto", runtime_env=runtime_env, logging_level="warning")
    else:
        # A local cluster listens on loopback only and dies with the job; no token is needed to talk to oneself.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(
            # Without it Ray would join whatever other cluster this machine runs.
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            runtime_env=runtime_env,
            logging_level="warning",
            log_to_driver=True,
        )
    # Ray's own handler, set by ray.init, would leave by sys.exit.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        ray.shutdown()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
