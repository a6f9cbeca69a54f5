"""The training loop of one worker.

A step: take this rank's packs, agree on the global number of loss elements, forward and backward for each pack, agree
on the loss, update or skip. All ranks take every decision from reduced values, so they never part.
"""

import collections
import dataclasses
import hashlib
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.checkpoint import Checkpoint, CheckpointFolder
from loomvideo.platform.training.config import PackConfig, TrainingConfig
from loomvideo.platform.training.engine import ZeroEngine, read_from
from loomvideo.platform.training.guard import SpikeGuard
from loomvideo.platform.training.hardware import NodeMonitor, device_name
from loomvideo.platform.training.loader import LoadedStep, SampleError, StepLoader
from loomvideo.platform.training.mailbox import WRITE_CHECKPOINT
from loomvideo.platform.training.order import continued_data, data_entry
from loomvideo.platform.training.packing import packs_for, packs_of_rank, planner_of
from loomvideo.platform.training.profiling import profiled
from loomvideo.platform.training.recipe import Recipe, TrainingDataset
from loomvideo.platform.training.saving import Saver, newest_whole
from loomvideo.platform.training.schedule import learning_rate
from loomvideo.platform.training.validation import Validator
from loomvideo.platform.training.watchdog import FLIGHT_FOLDER, FLIGHT_PREFIX, Watchdog
from loomvideo.platform.training.writer import CheckpointWriter

logger = logging.getLogger(__name__)

PREEMPTION_INTERVAL_S = 5.0
REPORT_INTERVAL_S = 1.0
RECENT_STEPS = 200
PROBE_STEP = 10
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
        self._report, self._preempted = report, preempted
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.use_deterministic_algorithms(self.config.deterministic)
        self.datasets = [job.open_dataset(url) for url in job.datasets]
        self.recipe = job.recipe_factory()
        self.recipe.open(self.datasets)
        self.recipe.share_sequences(self.config.sequence_ranks)
        # Ranks that share a pack count as one where packs are dealt.
        shares = self.config.sequence_ranks
        self.pack_rank, self.pack_ranks = self.rank // shares, self.world_size // shares
        self.folder = CheckpointFolder(job.checkpoints)
        # What this rank would like, and what all ranks agreed on.
        self._wants_stop = self._stop_reason = ""
        self._started = time.perf_counter()
        self._asked_at = self._reported_at = time.monotonic()
        # A preemption notice asks for a checkpoint, once; the driver asks before it changes the number of workers.
        self._urgent = self._noticed = self._asked_for_checkpoint = False
        attempt = self._from_rank_0(uuid.uuid4().hex)
        resumed = newest_whole(self.folder, self._sum)
        self.pack_config, self.packs_per_step = self._packs(resumed)
        num_micro_steps = len(packs_of_rank(self.packs_per_step, 0, self.pack_ranks))
        model, initial = self.recipe.start()
        self.engine = ZeroEngine(
            self.config, self.recipe, model, device, num_micro_steps, initial, load=resumed is None
        )
        self._base = self._base_of(resumed)
        self.step = self.optimizer_step = 0
        self.guard = SpikeGuard(self.config.guard)
        self._data = [data_entry(0, [dataset.digest for dataset in self.datasets], self.config.mixture)]
        self.last_step = job.last_step or self.config.steps
        validates = self.config.validation.every_steps > 0 and not self.config.validation.beside
        self._validator = Validator(self.recipe, self.datasets, self.config.validation, shares) if validates else None
        self._best_loss = math.inf
        self._writer = CheckpointWriter(
            self.folder, self.config.checkpoint, self.rank, self.world_size, attempt, pin=device.type == "cuda"
        )
        self._planner_state: dict[str, Any] | None = None
        # Kept with checkpoints: a driver that was killed may not have recorded what the workers did until they ended.
        self._recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=RECENT_STEPS)
        if resumed is not None:
            self._restore(resumed)
        self._num_rollbacks = self._most_tokens = 0
        self._tags: dict[tuple[str, str], list[float]] = {}
        self._records: list[dict[str, Any]] = []
        self._monitor = NodeMonitor(device, job.run_path)
        # Only now: reading weights from a store may take longer than any step.
        logs = job.run_path / "logs"
        self._watchdog = Watchdog(
            self.config.guard.hang_s,
            logs / f"hang-rank-{self.rank}.txt",
            logs / FLIGHT_FOLDER / f"{FLIGHT_PREFIX}{self.rank}",
        )
        self._saver = Saver(
            self.folder,
            self.config.checkpoint,
            self._writer,
            self._sum,
            self._report,
            self._watchdog.beat,
            None if resumed is None else resumed.step,
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def _packs(self, resumed: Checkpoint | None) -> tuple[PackConfig, int]:
        """Packs a step and their budget: on another number of workers than at the start, the same tokens a step."""
        config = self.config.pack
        if config.per_step or resumed is None:
            return config, config.per_step or self.pack_ranks
        planned = resumed.state["planner"]
        before = resumed.state["config"]["pack"]["tokens"]
        tokens_per_step = planned.get("tokens_per_step", planned["packs_per_step"] * before) * config.tokens / before
        packs, tokens = packs_for(tokens_per_step, config.tokens, self.pack_ranks, config.stretch)
        return dataclasses.replace(config, tokens=tokens), packs

    def _base_of(self, resumed: Checkpoint | None) -> dict[str, str]:
        """Which weights hold the parameters that are not trained; empty when checkpoints hold them themselves."""
        if not self.engine.num_frozen or (resumed is not None and not resumed.base):
            return {}
        # Hashing 20 GB takes long enough for one rank.
        base = self._from_rank_0(self.recipe.base() if self.rank == 0 else None)
        if resumed is not None and base["digest"] != resumed.base["digest"]:
            raise UserError(
                f"{resumed.url}: was trained on other weights, {resumed.base['path']} ({resumed.base['digest']}), than "
                f"{base['path'] or 'random ones'} ({base['digest'] or 'seeded'}); "
                "put those back, or use another run name"
            )
        return base if base["digest"] else {}

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if checkpoint.shapes != self.engine.shapes:
            differing = set(checkpoint.shapes.items()) ^ set(self.engine.shapes.items())
            raise UserError(
                f"{checkpoint.url}: was written for another model ({min(differing)[0]} differs); use another run name"
            )
        self._data = continued_data(checkpoint.url, state, self.datasets, self.config.mixture)
        frozen = read_from(self.engine.initial) if checkpoint.base else None
        self.engine.load_slices(checkpoint.read_many, state["optimizer_step"], frozen)
        self.step, self.optimizer_step = state["step"], state["optimizer_step"]
        self._planner_state = state["planner"]
        self.guard.load_state(state["guard"])
        if not self._recent:
            self._recent.extend(state.get("records", ()))
        best_loss, self._writer.best_step = state.get("best", (None, None))
        # On other samples a loss means something else.
        if best_loss is not None and self._data[-1]["datasets"] == state["datasets"]:
            self._best_loss = best_loss

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            "planner": self._planner_state,
            "guard": self.guard.state(),
            "best": [None if math.isinf(self._best_loss) else self._best_loss, self._writer.best_step],
            "records": list(self._recent),
            "shapes": {name: list(shape) for name, shape in self.engine.shapes.items()},
            "datasets": [dataset.digest for dataset in self.datasets],
            "data": self._data,
            "base": self._base,
            "config": dataclasses.asdict(self.config),
            "world_size": self.world_size,
            "time": time.time(),
        }

    def _contents(self) -> tuple[dict[str, torch.Tensor], dict[str, list[int]], dict[str, Any]]:
        tensors, ranges = {}, {}
        frozen = () if self._base else self.engine.frozen_slices()
        for part in itertools.chain(self.engine.slices(), frozen):
            ranges[part.name] = [part.start, part.stop]
            for kind, view in part.views.items():
                tensors[f"{kind}/{part.name}"] = view
        return tensors, ranges, self._state()

    # -- the loop -------------------------------------------------------------------------------------------------

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
        first_step = self.step
        self._tell(
            {
                "event": "ready",
                "rank": self.rank,
                "step": self.step,
                "start_s": time.perf_counter() - self._started,
                "num_parameters": self.engine.num_parameters,
                "num_trainable": self.engine.num_trainable,
                "packs_per_step": self.packs_per_step,
                "world_size": self.world_size,
                "device_name": device_name(self.device),
            }
        )
        if len(self._data) > 1 and self.rank == 0:
            self._report({"event": "data", "entries": self._data})
        if self._recent and self.rank == 0:
            self._report({"event": "recorded", "steps": list(self._recent)})
        self._watchdog.beat()
        while self.step < self.last_step and not self._stop_reason:
            loader = self._open_loader()
            try:
                self._train(loader)
            finally:
                loader.close()
            if self.guard.consecutive_skips > self.config.guard.max_skips:
                self._roll_back()
        self._flush(last=True)
        self._saver.save_last(self.step, self._contents)
        return {"steps": self.step, "first_step": first_step, "stopped": self._stop_reason}

    def _train(self, loader: StepLoader) -> None:
        """Steps until the end, a stop, or too many skipped in a row."""
        while self.step < self.last_step:
            with profiled(self.step + 1, self.config.profile_steps, self.job.run_path / "profile", self.rank):
                self._train_step(loader)
            self._watchdog.beat()
            if self._stop_reason or self.guard.consecutive_skips > self.config.guard.max_skips:
                return
            if self._validator is not None and self.step % self.config.validation.every_steps == 0:
                self._validate()
            # Asked on all ranks, as it may be a collective.
            due = self._saver.is_due(self.step, self.step % self.config.log_every == 0)
            if self._urgent:
                self._urgent = False
                self._saver.save_urgently(self.step, self._contents)
            elif due and self._saver.saved_at != self.step < self.last_step:
                self._saver.save_when_free(self.step, self._contents)

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
        if judged < self._best_loss:
            self._best_loss = judged
            if self.config.checkpoint.keep_best and self._saver.saved_at != self.step:
                best_before, self._writer.best_step = self._writer.best_step, self.step
                if not self._saver.save_when_free(self.step, self._contents):
                    self._writer.best_step = best_before
        if self.rank == 0:
            seconds = time.perf_counter() - started
            self._report({"event": "validation", "step": self.step, "losses": losses, "seconds": seconds})

    def _roll_back(self) -> None:
        """Return to the last checkpoint's weights and go on with the samples after the bad ones."""
        self._saver.settle()
        self._num_rollbacks += 1
        checkpoint = newest_whole(self.folder, self._sum)
        if checkpoint is None or self._num_rollbacks > self.config.guard.max_rollbacks:
            raise UserError(
                f"{self.guard.consecutive_skips} steps in a row had a bad loss up to step {self.step}, "
                f"after {self._num_rollbacks - 1} rollbacks; lower training.optimizer.learning_rate, "
                "or look at the samples in quarantine.json"
            )
        step, planner_state, quarantined = self.step, self._planner_state, self.guard.quarantined
        self._report({"event": "rollback", "rank": self.rank, "step": step, "to_step": checkpoint.step})
        self._restore(checkpoint)
        # Steps are counted on, so that what is recorded never rewinds.
        self.step, self._planner_state = step, planner_state
        self.guard.quarantined = quarantined
        self.guard.consecutive_skips = 0

    def _open_loader(self) -> StepLoader:
        planner = planner_of(
            self.recipe, self.datasets, dataclasses.replace(self.config, pack=self.pack_config), self.packs_per_step
        )
        if self._planner_state is None:
            self._planner_state = planner.state()
        else:
            planner.load_state(self._planner_state)
        return StepLoader(
            planner,
            self.recipe,
            self.datasets,
            self.config.seed,
            self.pack_rank,
            self.pack_ranks,
            num_steps=self.last_step - self.step,
            num_threads=self.config.data_threads,
            prefetch=self.config.prefetch_steps,
            excluded=self.guard.excluded,
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
        asks = self.rank == 0 and time.monotonic() - self._asked_at > PREEMPTION_INTERVAL_S
        elements, tokens, flops, stops, asks, failed, wanted, writing, not_written = self._sum(
            float(sum(pack.num_loss_elements for pack in counted)),
            float(sum(pack.num_tokens for pack in counted)),
            float(sum(self.recipe.flops(pack) for pack in counted)),
            float(bool(self._wants_stop)),
            float(asks),
            float(bool(problem)),
            float(self._asked_for_checkpoint),
            float(self._writer.busy),
            float(self._writer.failed),
        )
        self._saver.look(writing, not_written)
        if failed:
            raise UserError(problem or OTHER_WORKER)
        if stops:
            self._stop_reason = self._wants_stop or "asked to stop"
            return
        if asks:
            # A barrier, so it is rare and every rank comes here at the same step.
            self._asked_at = time.monotonic()
            self._urgent = self._preempted() and not self._noticed
            self._noticed = self._noticed or self._urgent
        if wanted:
            self._urgent, self._asked_for_checkpoint = True, False
        computing = time.perf_counter()
        loss_sum, bad_keys = self._forward_backward(packs, elements)
        total, num_bad = self._sum(loss_sum, float(len(bad_keys)))
        loss = total / elements
        skip = self._judge(loss, num_bad, bad_keys, loaded.step + loader.max_ahead)
        stepping = time.perf_counter()
        updated = self.engine.step(self.step, skip)
        self.step += 1
        self.optimizer_step += updated
        self._planner_state = loaded.state
        if updated and self.optimizer_step == PROBE_STEP:
            self._probe()
        done = time.perf_counter()
        self._note(
            loaded,
            {
                "step": self.step,
                "loss": loss,
                "grad_norm": self.engine.grad_norm,
                "learning_rate": learning_rate(self.config.optimizer, self.step - 1, self.config.steps),
                "updated": updated,
                "tokens": tokens,
                "elements": elements,
                "flops": flops,
                "step_s": done - started,
                "data_wait_s": loaded.wait_s,
                "compute_s": stepping - computing,
                "update_s": done - stepping,
            },
        )

    def _forward_backward(self, packs: Sequence[tuple[Any, bool]], elements: float) -> tuple[float, list[str]]:
        """Gradients of this rank's packs; returns the summed loss and the keys whose loss is not finite."""
        outputs = []
        for number, (pack, counts) in enumerate(packs):
            if number:
                self.engine.step_micro()
            try:
                placed = pack.to(self.device, self.engine.dtype)
                output = self.engine.forward_backward(self.recipe, placed, elements, counts)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise UserError(self._out_of_memory(pack)) from error
            self._most_tokens = max(self._most_tokens, pack.num_tokens)
            if counts:
                outputs.append((pack.keys, output))
        # Read when all is queued: a number that is asked for earlier makes the device wait for the host.
        loss_sum, bad_keys = 0.0, []
        for keys, output in outputs:
            loss_sum += float(output.sum.detach())
            sums = output.per_sample_sum.float().cpu().tolist()
            numbers = output.per_sample_elements.float().cpu().tolist()
            bad_keys += [key for key, value in zip(keys, sums, strict=True) if not math.isfinite(value)]
            for value, number_of_elements, tags in zip(sums, numbers, output.tags, strict=False):
                for tag in tags.items():
                    entry = self._tags.setdefault(tag, [0.0, 0.0])
                    entry[0] += value
                    entry[1] += number_of_elements
        return loss_sum, bad_keys

    def _probe(self) -> None:
        """Refuse to go on when something that is trained never gets a gradient: it would look like slow learning.

        Not at the first step, as layers that start at zero let nothing through to those before them.
        """
        idle = self.engine.without_gradient()
        if not idle:
            return
        gathered: list[list[str]] = [[]] * self.world_size
        dist.all_gather_object(gathered, list(self.recipe.should_learn(idle)))
        dead = [name for name in idle if any(name in part for part in gathered)]
        if dead:
            shown = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
            raise UserError(
                f"after {PROBE_STEP} steps no gradient has reached {shown}: what they read is cut off from the loss; "
                "leave them out of training.optimizer.trainable, or find what cuts them off"
            )

    def _out_of_memory(self, pack: Any) -> str:
        passed = f"packs of {self._most_tokens} tokens passed" if self._most_tokens else "no pack passed before"
        advice = f"about {int(0.8 * self.config.pack.tokens)}"
        if self.config.activation_checkpointing != "full":
            advice += ", or set training.activation_checkpointing=full"
        return (
            f"out of memory in a pack of {pack.num_tokens} tokens ({', '.join(pack.keys)}; {passed}): lower "
            f"training.pack.tokens={self.config.pack.tokens} to {advice}"
        )

    def _judge(self, loss: float, num_bad: float, bad_keys: list[str], from_step: int) -> bool:
        """Whether to skip the step; quarantines samples whose own loss is not finite."""
        if num_bad:
            gathered: list[list[str]] = [[]] * self.world_size
            dist.all_gather_object(gathered, bad_keys)
            keys = sorted({key for part in gathered for key in part})
            self.guard.quarantine(keys, from_step)
            self._report({"event": "quarantine", "rank": self.rank, "step": self.step + 1, "keys": keys})
        return self.guard.is_bad(loss)

    def _note(self, loaded: LoadedStep, record: dict[str, Any]) -> None:
        if self.rank == 0:
            keys = loaded.keys
            record |= {
                "samples": len(keys),
                "keys_digest": hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16],
                "fill": loaded.fill,
                "imbalance": loaded.imbalance,
            }
            self._records.append(record)
            self._recent.append(record)
        if self.step % self.config.log_every == 0 or self.step == 1:
            self._flush()
        elif self.rank == 0 and time.monotonic() - self._reported_at > REPORT_INTERVAL_S:
            # Asks whether to stop; the answer comes with a later report.
            self._reported_at = time.monotonic()
            self._tell({"event": "alive"})

    def _flush(self, last: bool = False) -> None:
        """Send what was noted since the last time; ``last`` when nothing follows."""
        report: dict[str, Any] = {
            "event": "steps",
            "rank": self.rank,
            "steps": self._records,
            "tags": [[*tag, *sums] for tag, sums in self._tags.items()],
        }
        if self.rank == 0:
            report["checkpoint_age_s"] = self._saver.age_s
        if warnings := list(self.recipe.warnings()):
            report["warnings"] = warnings
        if figures := self._monitor.read(at_once=last):
            report |= {"node": self._monitor.node, "system": figures}
        if self.device.type == "cuda":
            report["memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self._reported_at = time.monotonic()
        self._tell(report)
        self._records, self._tags = [], {}

    def _tell(self, report: dict[str, Any]) -> None:
        """Send a report and take the driver's answer."""
        answer = self._report(report)
        if answer == WRITE_CHECKPOINT:
            self._asked_for_checkpoint = True
        else:
            self._wants_stop = answer or self._wants_stop

    # -- collectives ----------------------------------------------------------------------------------------------

    def _sum(self, *values: float) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced)
        return reduced.tolist()

    def _from_rank_0(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU allocator has no error class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
