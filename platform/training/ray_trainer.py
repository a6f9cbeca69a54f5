"""Ray's trainer with what a long run needs of it: checkpoints before workers end, failures counted in a window."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RpcError
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from loomvideo.platform.time_limits import RAY_START, RAY_STATE, RESIZE_GRACE, STOP_GRACE

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25


def _has_state_api() -> bool:
    ends = time.monotonic() + RAY_START.here()
    # Without it Ray asks the newest cluster of the machine, which may be somebody else's.
    address = ray.get_runtime_context().gcs_address
    while True:
        try:
            list_actors(address, limit=1, timeout=round(RAY_STATE.here()))
        except (RayStateApiException, ConnectionError):
            return False
        except RpcError:
            # Ray gives its own server a few seconds, which no setting changes and a busy machine may need.
            if time.monotonic() > ends:
                raise
        else:
            return True


class FailuresInWindow(DefaultFailurePolicy):
    """Lets a run end when too many workers died within a window, where Ray counts over a run's life.

    Args:
        config: Ray's.
        window_s: How long a death counts.
    """

    def __init__(self, config: FailureConfig, window_s: float):
        super().__init__(config)
        self.window_s = window_s
        self._failed_at: list[float] = []

    def make_decision(self, training_failed_error: Any) -> Any:
        """What Ray decides, from the failures of the window alone."""
        now = time.monotonic()
        self._failed_at = [failed_at for failed_at in self._failed_at if now - failed_at < self.window_s]
        self._worker_group_failures = len(self._failed_at)
        decision = super().make_decision(training_failed_error)
        if self._worker_group_failures > len(self._failed_at):
            self._failed_at.append(now)
        return decision


class CheckpointBeforeResize(ControllerCallback):
    """Asks the workers for a checkpoint before Ray ends them to start another number of them.

    Args:
        mailbox: The mailbox of the run.
    """

    def __init__(self, mailbox: Any):
        self.mailbox = mailbox
        self._has_started = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Runs in the controller, at the first start too, when there is nobody to ask."""
        workers_run = self._has_started and ray.get(self.mailbox.is_running.remote())
        self._has_started = True
        if not workers_run:
            return
        request = ray.get(self.mailbox.request_checkpoint.remote())
        waited_until = time.monotonic() + RESIZE_GRACE.here()
        while time.monotonic() < waited_until and not ray.get(self.mailbox.is_written.remote(request)):
            time.sleep(POLL_INTERVAL_S)
        ray.get(self.mailbox.note_stopped.remote())

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Workers that died cannot write."""
        ray.get(self.mailbox.note_stopped.remote())


class Trainer(TorchTrainer):
    """A trainer that asks the workers for a checkpoint before it ends on a signal."""

    mailbox: Any
    failure_window_s: float
    interrupted = False
    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = [*super()._create_default_callbacks(), CheckpointBeforeResize(self.mailbox)]
        if _has_state_api():
            return callbacks
        # Without a dashboard the cleaner cannot watch the controller and warns every second; a local cluster, the
        # only kind without one, takes its placement groups along when it ends.
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["failure_policy"] = FailuresInWindow(self.run_config.failure_config, self.failure_window_s)
        return super()._initialize_and_run_controller(**options)

    def _register_sigint_handler(self, controller: Any) -> None:
        # Ray would abort the workers at once; catch_signals() gives them time for a checkpoint.
        self._controller = controller

    def catch_signals(self) -> Callable[[], None]:
        """Handle SIGINT and SIGTERM while training; returns what restores the handlers before."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:
            self.abort()
            return
        self.interrupted = True
        if self._controller is None:
            raise KeyboardInterrupt
        print("stopping: writing a checkpoint; once more to stop at once", file=sys.stderr, flush=True)
        self.mailbox.request_stop.remote("interrupted")
        timer = threading.Timer(STOP_GRACE.here(), self.abort)
        timer.daemon = True
        timer.start()

    def abort(self) -> None:
        """End the workers at once."""
        if self._controller is not None:
            self._controller.abort.remote()
