"""The training loop of one worker.

A step: take this rank's packs, agree on the global number of loss elements, forward and backward for each pack, agree
on the loss, update or skip. All ranks take every decision from reduced values, so they never part.
"""

import dataclasses
import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reading import ReadTally
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.collectives import AllRanks
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.gradients import PROBE_STEP, GradientSteps
from loomvideo.platform.training.hardware import device_name
from loomvideo.platform.training.loader import LoadedStep, SampleError, StepLoader
from loomvideo.platform.training.packing import packs_of_rank, packs_of_run, planner_of
from loomvideo.platform.training.profiling import profiled
from loomvideo.platform.training.recipe import Recipe, RemoteDataset, TrainingDataset, Turn
from loomvideo.platform.training.reporting import Reporter
from loomvideo.platform.training.roles import Roles
from loomvideo.platform.training.run_state import RunState, base_of
from loomvideo.platform.training.saving import Saver, newest_whole
from loomvideo.platform.training.validation import Validator
from loomvideo.platform.training.watchdog import FLIGHT_FOLDER, FLIGHT_PREFIX, Watchdog
from loomvideo.platform.training.writer import CheckpointWriter

PREEMPTION_INTERVAL_S = 5.0
OTHER_WORKER = "another worker could not load its samples"


@dataclass
class WorkerJob:
    """What every worker of a run is given.

    Attributes:
        config: The run's configuration.
        recipe_factory: Picklable; builds the recipe on the worker.
        datasets: URLs of the datasets.
        open_dataset: Opens one URL.
        checkpoints: Folder or fsspec URL of the run's checkpoints, reached by all workers.
        run_path: The run's folder.
        last_step: Stop after this step, with the learning rates of the whole run; 0 for ``config.steps``.
    """

    config: TrainingConfig
    recipe_factory: Callable[[], Recipe]
    datasets: Sequence[str]
    open_dataset: Callable[[str], TrainingDataset]
    checkpoints: str | Path
    run_path: Path
    last_step: int = 0


class Worker:
    """One rank of a run.

    Args:
        job: The run.
        device: This rank's.
        report: Sends a report to the driver and returns why the run should stop, as far as is known now.
        preempted: Whether this node is about to be taken away; called on all ranks at the same steps.
    """

    def __init__(
        self,
        job: WorkerJob,
        device: torch.device,
        report: Callable[[dict[str, Any]], str],
        preempted: Callable[[], bool] = lambda: False,
    ):
        self.job, self.config, self.device = job, job.config, device
        self._preempted = preempted
        self._started = time.perf_counter()
        torch.use_deterministic_algorithms(self.config.deterministic)
        self.ranks = AllRanks(device)
        self.reporter = Reporter(report, self.ranks.rank, device, job.run_path, self.config.log_every)
        self.datasets = [job.open_dataset(url) for url in job.datasets]
        self.recipe = job.recipe_factory()
        self.recipe.open(self.datasets)
        self.recipe.share_sequences(self.config.sequence_ranks)
        # Ranks that share a pack count as one where packs are dealt.
        shares = self.config.sequence_ranks
        self.pack_rank, self.pack_ranks = self.ranks.rank // shares, self.ranks.size // shares
        self.folder = CheckpointFolder(job.checkpoints)
        self.last_step = job.last_step or self.config.steps
        self._stop_reason = ""
        self._num_rollbacks = 0
        self._asked_at = time.monotonic()
        # A preemption notice asks for a checkpoint, once; the driver asks before it changes the number of workers.
        self._urgent = self._noticed = False
        attempt = self.ranks.from_rank_0(uuid.uuid4().hex)
        resumed = newest_whole(self.folder, self.ranks.sum)
        self.pack_config, self.packs_per_step = packs_of_run(
            self.config.pack, None if resumed is None else resumed.state, self.pack_ranks
        )
        num_micro_steps = len(packs_of_rank(self.packs_per_step, 0, self.pack_ranks))
        self.roles = Roles(self.config, self.recipe, device, num_micro_steps, load=resumed is None)
        self.engine = self.roles.model
        base = base_of(self.engine, self.recipe, resumed, self.ranks)
        self.state = RunState(self.config, self.datasets, self.roles, base, self.ranks)
        self.gradients = GradientSteps(self.config, self.recipe, self.roles, self.ranks)
        validates = self.config.validation.every_steps > 0 and not self.config.validation.beside
        self._validator = Validator(self.recipe, self.datasets, self.config.validation, shares) if validates else None
        if resumed is not None:
            self.state.restore(resumed)
        # Only now: reading weights from a store may take longer than any step.
        logs = job.run_path / "logs"
        self._watchdog = Watchdog(
            self.config.guard.hang_s,
            logs / f"hang-rank-{self.ranks.rank}.txt",
            logs / FLIGHT_FOLDER / f"{FLIGHT_PREFIX}{self.ranks.rank}",
        )
        self._writer = CheckpointWriter(
            self.folder, self.config.checkpoint, self.ranks.rank, self.ranks.size, attempt, pin=device.type == "cuda"
        )
        self._saver = Saver(
            self.folder,
            self.config.checkpoint,
            self._writer,
            self.ranks.sum,
            self.reporter.tell,
            self._watchdog.beat,
            None if resumed is None else resumed.step,
        )

    def run(self) -> dict[str, Any]:
        """Train to the last step or until asked to stop; returns the worker's final report.

        Raises:
            UserError: if training cannot go on, or the last checkpoint could not be written.
        """
        try:
            return self._run()
        finally:
            self._watchdog.close()

    def _run(self) -> dict[str, Any]:
        first_step = self.state.step
        self.reporter.tell(
            {
                "event": "ready",
                "rank": self.ranks.rank,
                "step": self.state.step,
                "start_s": time.perf_counter() - self._started,
                "num_parameters": self.engine.num_parameters,
                "num_trainable": self.engine.num_trainable,
                "packs_per_step": self.packs_per_step,
                "world_size": self.ranks.size,
                "device_name": device_name(self.device),
            }
        )
        if len(self.state.data) > 1 and self.ranks.rank == 0:
            self.reporter.tell({"event": "data", "entries": self.state.data})
        if self.state.recent and self.ranks.rank == 0:
            self.reporter.tell({"event": "recorded", "steps": list(self.state.recent)})
        self._watchdog.beat()
        while self.state.step < self.last_step and not self._stop_reason:
            loader = self._open_loader()
            try:
                self._train(loader)
            finally:
                loader.close()
            if self.state.guard.consecutive_skips > self.config.guard.max_skips:
                self._roll_back()
        self.reporter.flush(self._details(), last=True)
        self._saver.save_last(self.state.step, self.state.contents)
        return {"steps": self.state.step, "first_step": first_step, "stopped": self._stop_reason}

    def _train(self, loader: StepLoader) -> None:
        """Steps until the end, a stop, or too many skipped in a row."""
        while self.state.step < self.last_step:
            traces = self.job.run_path / "profile"
            with profiled(self.state.step + 1, self.config.profile_steps, traces, self.ranks.rank):
                self._train_step(loader)
            self._watchdog.beat()
            if self._stop_reason or self.state.guard.consecutive_skips > self.config.guard.max_skips:
                return
            if self._validator is not None and self.state.step % self.config.validation.every_steps == 0:
                self._validate()
            # Asked on all ranks, as it may be a collective.
            due = self._saver.is_due(self.state.step, self.state.step % self.config.log_every == 0)
            if self._urgent:
                self._urgent = False
                self._saver.save_urgently(self.state.step, self.state.contents)
            elif due and self._saver.saved_at != self.state.step < self.last_step:
                self._saver.save_when_free(self.state.step, self.state.contents)

    def _validate(self) -> None:
        """Report the loss of raw and averaged weights on the fixed triples; remember the best checkpoint's step."""
        started = time.perf_counter()
        losses = {"raw": self._validator.losses(self.engine)}
        if self.engine.ema:
            self.engine.swap_ema()
            losses["ema"] = self._validator.losses(self.engine)
            self.engine.swap_ema()
        self._watchdog.beat()
        judged = losses.get("ema", losses["raw"])["loss"]
        if judged < self.state.best_loss:
            self.state.best_loss = judged
            if self.config.checkpoint.keep_best and self._saver.saved_at != self.state.step:
                best_before, self.state.best_step = self.state.best_step, self.state.step
                if not self._saver.save_when_free(self.state.step, self.state.contents):
                    self.state.best_step = best_before
        if self.ranks.rank == 0:
            seconds = time.perf_counter() - started
            self.reporter.tell({"event": "validation", "step": self.state.step, "losses": losses, "seconds": seconds})

    def _roll_back(self) -> None:
        """Return to the last checkpoint's weights and go on with the samples after the bad ones."""
        self._saver.settle()
        self._num_rollbacks += 1
        checkpoint = newest_whole(self.folder, self.ranks.sum)
        if checkpoint is None or self._num_rollbacks > self.config.guard.max_rollbacks:
            raise UserError(
                f"{self.state.guard.consecutive_skips} steps in a row had a bad loss up to step {self.state.step}, "
                f"after {self._num_rollbacks - 1} rollbacks; lower training.optimizer.learning_rate, "
                "or look at the samples in quarantine.json"
            )
        report = {"event": "rollback", "rank": self.ranks.rank, "step": self.state.step, "to_step": checkpoint.step}
        self.reporter.tell(report)
        self.state.roll_back(checkpoint)

    def _open_loader(self) -> StepLoader:
        planner = planner_of(
            self.recipe, self.datasets, dataclasses.replace(self.config, pack=self.pack_config), self.packs_per_step
        )
        if self.state.planner is None:
            self.state.planner = planner.state()
        else:
            planner.load_state(self.state.planner)
        return StepLoader(
            planner,
            self.recipe,
            self.datasets,
            self.config.seed,
            self.pack_rank,
            self.pack_ranks,
            num_steps=self.last_step - self.state.step,
            num_threads=self.config.data_threads,
            prefetch=self.config.prefetch_steps,
            excluded=self.state.guard.excluded,
            pin_memory=self.device.type == "cuda",
        )

    def _train_step(self, loader: StepLoader) -> None:
        started = time.perf_counter()
        loaded, problem = None, ""
        try:
            loaded = loader.next()
        except (SampleError, UserError, OSError) as error:
            problem = str(error)
        packs = loaded.packs if loaded else []
        counted = [pack for pack, counts in packs if counts]
        asks = self.ranks.rank == 0 and time.monotonic() - self._asked_at > PREEMPTION_INTERVAL_S
        elements, tokens, flops, stops, asks, failed, wanted, writing, not_written = self.ranks.sum(
            float(sum(pack.num_loss_elements for pack in counted)),
            float(sum(pack.num_tokens for pack in counted)),
            float(sum(self.recipe.flops(pack) for pack in counted)),
            float(bool(self.reporter.stop_reason)),
            float(asks),
            float(bool(problem)),
            float(self.reporter.wants_checkpoint),
            float(self._writer.busy),
            float(self._writer.failed),
        )
        self._saver.look(writing, not_written)
        if failed:
            raise UserError(problem or OTHER_WORKER)
        if stops:
            self._stop_reason = self.reporter.stop_reason or "asked to stop"
            return
        if asks:
            # A barrier, so it is rare and every rank comes here at the same step.
            self._asked_at = time.monotonic()
            self._urgent = self._preempted() and not self._noticed
            self._noticed = self._noticed or self._urgent
        if wanted:
            self._urgent, self.reporter.wants_checkpoint = True, False
        computing = time.perf_counter()
        turn = self.roles.turn(self.state.step)
        mine = self.gradients.forward_backward(turn, packs, elements, self.roles.updates[turn.role])
        total, num_bad, num_dead = self.ranks.sum(mine.sum, float(len(mine.bad_keys)), float(len(mine.dead_inputs)))
        if num_dead:
            self.gradients.refuse_dead(mine.dead_inputs)
        loss = total / elements
        skip = self._judge(turn, loss, num_bad, mine.bad_keys, loaded.step + loader.max_ahead)
        stepping = time.perf_counter()
        updated, rate = self.roles.step(turn, skip), self.roles.learning_rate(turn)
        self.state.step += 1
        self.state.planner = loaded.state
        if updated and self.roles.updates[turn.role] == PROBE_STEP:
            self.gradients.probe(turn.role)
        done = time.perf_counter()
        self._note(
            loaded,
            {
                "step": self.state.step,
                "role": turn.role,
                "loss": loss,
                "grad_norm": self.roles.engines[turn.role].grad_norm,
                "learning_rate": rate,
                "updated": updated,
                "tokens": tokens,
                "elements": elements,
                "flops": flops,
                "step_s": done - started,
                "data_wait_s": loaded.wait_s,
                "read_s": loaded.read_s,
                "compute_s": stepping - computing,
                "update_s": done - stepping,
            },
        )

    def _judge(self, turn: Turn, loss: float, num_bad: float, bad_keys: list[str], from_step: int) -> bool:
        """Whether to skip the step; quarantines samples whose own loss is not finite."""
        if num_bad:
            keys = sorted({key for part in self.ranks.gather(bad_keys) for key in part})
            self.state.guard.quarantine(keys, from_step)
            step = self.state.step + 1
            self.reporter.tell({"event": "quarantine", "rank": self.ranks.rank, "step": step, "keys": keys})
        return self.state.guard.is_bad(loss, turn.role)

    def _note(self, loaded: LoadedStep, record: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            keys = loaded.keys
            record |= {
                "samples": len(keys),
                "keys_digest": hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16],
                "fill": loaded.fill,
                "imbalance": loaded.imbalance,
            }
            self.state.recent.append(record)
        self.reporter.note(self.state.step, record, self._details)

    def _details(self) -> dict[str, Any]:
        details: dict[str, Any] = {"tags": self.gradients.take_tags()}
        read = sum((dataset.tally() for dataset in self.datasets if isinstance(dataset, RemoteDataset)), ReadTally())
        if read != ReadTally():
            details["reading"] = dataclasses.asdict(read)
        if self.ranks.rank == 0:
            details["checkpoint_age_s"] = self._saver.age_s
            details["computes_with"] = dict(self.recipe.computes_with())
        if warnings := list(self.recipe.warnings()):
            details["warnings"] = warnings
        return details
