"""Starting a training run, following it, and ending it cleanly: what happens in the job's own process."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import CONFIG_FILE, RunFolder
from loomvideo.platform.shards.reading import ReadingConfig
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.time_limits import (
    ELASTIC_GROUP_START,
    FATAL_GRACE,
    PROCESS_GROUP,
    TRAINING_REPORTS,
    WORKER_GROUP_START,
)
from loomvideo.platform.training.beside import CheckpointTask, CheckpointTasks, validation_task
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder, checkpoints_of
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.mailbox import Mailbox
from loomvideo.platform.training.progress import Predict, TrainingProgress
from loomvideo.platform.training.ray_trainer import Trainer
from loomvideo.platform.training.recipe import Recipe, TrainingDataset
from loomvideo.platform.training.watchdog import FLIGHT_FOLDER, recorder_environment
from loomvideo.platform.training.worker import OTHER_WORKER, Worker, WorkerJob

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25


class MetricsTracker(Protocol):
    """What the run reports to; ``platform.tracking.Tracker`` is one."""

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log numbers of a step."""
        ...


def train(
    config: TrainingConfig,
    recipe_factory: Callable[[], Recipe],
    datasets: Sequence[str],
    run_folder: RunFolder,
    tracker: MetricsTracker | None = None,
    open_dataset: Callable[[str], TrainingDataset] | None = None,
    stop: threading.Event | None = None,
    last_step: int = 0,
    predict: Predict | None = None,
    checkpoint_tasks: Sequence[CheckpointTask] = (),
) -> dict[str, Any]:
    """Train, or continue the run of this folder from its newest whole checkpoint.

    Ray must be initialised. Ctrl-C and SIGTERM write a checkpoint and end the run; a second one ends it at once.

    Args:
        config: What to do.
        recipe_factory: Picklable; builds the recipe on every worker.
        datasets: URLs of the datasets, reachable from every worker.
        run_folder: Holds ``steps.jsonl`` and, without ``checkpoint.url``, ``checkpoints/``; then, on a cluster, shared
            storage.
        tracker: Gets the metrics; the driver owns it.
        open_dataset: Opens one URL; by default as a dataset folder of shards.
        last_step: Stop after this step, learning rates still those of ``config.steps``; 0 for the end.
        stop: Set it from another thread to end the run as Ctrl-C would.
        predict: Gives planned figures to compare the run with.
        checkpoint_tasks: What to do with checkpoints beside training.

    Returns:
        ``steps, first_step, loss, seconds, tokens_per_s, checkpoint, stopped`` and means over the run's reports.

    Raises:
        UserError: for a mistake in configuration or data.
        KeyboardInterrupt: after a checkpoint, when the run was interrupted.
    """
    config.check()
    # A busy machine imports torch slowly; Ray gives a worker group one minute.
    # An elastic run first tries to start as many as before the loss, until Ray knows of it: not for long.
    elastic = 0 < config.workers.min < config.workers.num
    start = ELASTIC_GROUP_START if elastic else WORKER_GROUP_START
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(round(start.here())))
    open_dataset = open_dataset or open_shards
    for url in datasets:
        open_dataset(url)
    checkpoints = _prepare_checkpoints(config, run_folder)
    # With the driver, as its controller: a worker node that dies must not take the reports along.
    mailbox = Mailbox.options(
        label_selector={ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    ).remote()
    progress = TrainingProgress(config, run_folder, tracker, predict)
    job = WorkerJob(config, recipe_factory, list(datasets), open_dataset, checkpoints, run_folder.path, last_step)
    workers = config.workers
    trainer = Trainer(
        _run_worker,
        train_loop_config={"job": job, "mailbox": mailbox},
        torch_config=TorchConfig(timeout_s=round(PROCESS_GROUP.here())),
        scaling_config=ScalingConfig(
            num_workers=(workers.min, workers.num) if elastic else workers.num,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
            elastic_resize_monitor_interval_s=workers.resize_s,
        ),
        run_config=RunConfig(
            name=run_folder.name,
            storage_path=str(run_folder.path / ".ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": _worker_environment(config, run_folder)},
        ),
    )
    trainer.mailbox, trainer.failure_window_s = mailbox, workers.failure_window_s
    follower = _Follower(mailbox, progress, stop, trainer.abort)
    if config.validation.every_steps and config.validation.beside:

        def validated(step: int, losses: Any) -> None:
            progress.add({"event": "validation", "step": step, "losses": losses})

        validation = validation_task(config.validation, recipe_factory, datasets, open_dataset, validated)
        checkpoint_tasks = [*checkpoint_tasks, validation]
    tasks = CheckpointTasks(CheckpointFolder(checkpoints), checkpoint_tasks, progress.say)
    error: BaseException | None = None
    restore = trainer.catch_signals()
    try:
        follower.start()
        tasks.start()
        trainer.fit()
    except Exception as failure:  # raised below, when what runs beside it has ended
        error = failure
    finally:
        restore()
        follower.finish()
        tasks.finish(wait=error is None and not progress.fatal and not trainer.interrupted)
        ray.kill(mailbox)
        progress.close()
    if progress.fatal:
        raise UserError(progress.fatal)
    if error is not None and not trainer.interrupted:
        raise error
    if trainer.interrupted:
        raise KeyboardInterrupt
    return progress.result()


def open_shards(url: str, reading: ReadingConfig | None = None) -> TrainingDataset:
    """A dataset folder of shards; ``reading`` says how an object store is asked."""
    from loomvideo.platform.shards.reader import ShardDataset

    return ShardDataset.open(url, reading)


def _prepare_checkpoints(config: TrainingConfig, run_folder: RunFolder) -> str:
    """The URL of the run's checkpoints, ready for workers; elsewhere, the configuration lies beside them."""
    url = checkpoints_of(config.checkpoint, run_folder)
    if not config.checkpoint.url:
        Path(url).mkdir(parents=True, exist_ok=True)
        return url
    storage = Storage(url.rsplit("/", 1)[0])
    if (run_folder.path / CONFIG_FILE).is_file():
        try:
            storage.write_bytes(CONFIG_FILE, (run_folder.path / CONFIG_FILE).read_bytes())
        except OSError as error:
            raise UserError(
                f"training.checkpoint.url={config.checkpoint.url}: cannot be written to: {error}"
            ) from error
    return url


def _worker_environment(config: TrainingConfig, run_folder: RunFolder) -> dict[str, str]:
    environment = {"DS_ACCELERATOR": "cuda" if config.workers.gpus else "cpu"}
    if config.deterministic:
        # cuBLAS repeats itself only with a workspace of its own, chosen before it starts.
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    environment |= recorder_environment(run_folder.path / "logs" / FLIGHT_FOLDER)
    if config.workers.gpus:
        # Packs differ in length from step to step, which fragments memory.
        environment["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    else:
        environment |= {"OMP_NUM_THREADS": str(config.workers.cpus), "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    return environment


class _Follower(threading.Thread):
    """Moves reports from the mailbox to the progress display and the tracker."""

    def __init__(
        self, mailbox: Any, progress: TrainingProgress, stop: threading.Event | None, abort: Callable[[], None]
    ):
        super().__init__(name="training-follower", daemon=True)
        self._abort, self._fatal_at = abort, 0.0
        self._mailbox, self._progress, self._stop_run = mailbox, progress, stop
        self._finished = threading.Event()
        self._asked = False

    def run(self) -> None:
        while not self._finished.wait(POLL_INTERVAL_S):
            self._collect()
            if self._progress.fatal and not self._fatal_at:
                self._fatal_at = time.monotonic()
            if self._fatal_at and time.monotonic() - self._fatal_at > FATAL_GRACE.here():
                # The workers that made no mistake wait in a collective for the one that did.
                self._abort()
                return
            if self._stop_run is not None and self._stop_run.is_set() and not self._asked:
                self._asked = True
                self._mailbox.request_stop.remote("asked to stop")

    def finish(self) -> None:
        """Take what is left and end."""
        self._finished.set()
        if self.is_alive():
            self.join()
        self._collect()

    def _collect(self) -> None:
        try:
            reports = ray.get(self._mailbox.drain.remote(), timeout=TRAINING_REPORTS.here())
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            logger.warning("training reports cannot be read: %s", error)
            return
        for report in reports:
            try:
                self._progress.add(report)
            except OSError as error:  # a full disk; without this thread nobody would hear of the next reports
                self._progress.say(f"a report of the {report['event']} was not recorded: {error}")


def _run_worker(arguments: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    job: WorkerJob = arguments["job"]
    mailbox = arguments["mailbox"]
    device = ray.train.torch.get_device() if job.config.workers.gpus else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(job.config.workers.cpus)
    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    report = _Sender(mailbox)
    try:
        result = Worker(job, device, report, lambda: ray.train.get_preemption_info() is not None).run()
    except UserError as error:
        # A mistake that a restart would repeat: told to the driver instead of raised, so that Ray does not retry.
        if str(error) != OTHER_WORKER:
            ray.get(mailbox.put.remote({"event": "fatal", "message": str(error)}))
        return
    if context.get_world_rank() == 0:
        ray.get(mailbox.put.remote({"event": "finished"} | result))


class _Sender:
    """Sends reports without waiting; the answer to an earlier one tells whether to stop."""

    def __init__(self, mailbox: Any):
        self._mailbox = mailbox
        self._pending: list[Any] = []

    def __call__(self, report: dict[str, Any]) -> str:
        self._pending.append(self._mailbox.put.remote(report))
        done, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
        return next((reason for reason in ray.get(done) if reason), "")
