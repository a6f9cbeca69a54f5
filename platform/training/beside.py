"""Work on checkpoints beside training: a Ray task for every n-th one, on resources of its own.

Training neither waits for these tasks nor shares a process group or random numbers with them; it does not know them.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from loomvideo.platform.nodes.devices import device_for
from loomvideo.platform.time_limits import BESIDE_TRAINING
from loomvideo.platform.training.checkpoint import Checkpoint
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.config import ValidationConfig
from loomvideo.platform.training.recipe import Recipe, TrainingDataset
from loomvideo.platform.training.validation import Validator

logger = logging.getLogger(__name__)

POLL_INTERVAL_S, REMOTE_POLL_INTERVAL_S = 1.0, 15.0


@dataclass
class CheckpointTask:
    """What to do with every n-th checkpoint.

    Attributes:
        name: What messages call it.
        every_steps: Checkpoints whose step is a multiple.
        function: Picklable; ``function(URL of the checkpoint)``.
        on_result: Called in the driver with the step and what the function returned.
        resources: Options of the Ray task, ``num_cpus`` and ``num_gpus``.
    """

    name: str
    every_steps: int
    function: Callable[[str], Any]
    on_result: Callable[[int, Any], None]
    resources: dict[str, float] = field(default_factory=dict)


class CheckpointTasks(threading.Thread):
    """Starts the tasks when checkpoints are committed; one of a kind at a time, on the newest checkpoint due.

    Args:
        folder: The folder of the run's checkpoints; those there at the start are left alone.
        tasks: What to do.
        say: Shows a line to the user.
    """

    def __init__(self, folder: CheckpointFolder, tasks: Sequence[CheckpointTask], say: Callable[[str], None]):
        super().__init__(name="checkpoint-tasks", daemon=True)
        self.folder, self.tasks, self._say = folder, list(tasks), say
        self._ended = threading.Event()
        # Looking into a bucket costs a request.
        self._interval_s = POLL_INTERVAL_S if folder.storage.is_local else REMOTE_POLL_INTERVAL_S
        newest = max(folder.steps(), default=0)
        self._done = {task.name: newest for task in self.tasks}
        self._running: dict[str, tuple[int, Any]] = {}

    def run(self) -> None:
        """Watch until :meth:`finish`."""
        while not self._ended.wait(self._interval_s):
            self._advance()

    def finish(self, wait: bool) -> None:
        """End; with ``wait`` not before what is due is done."""
        self._ended.set()
        if self.is_alive():
            self.join()
        if not wait:
            for _, reference in self._running.values():
                ray.cancel(reference, force=True)
            return
        self._advance()
        while self._running:
            references = [reference for _, reference in self._running.values()]
            done, _ = ray.wait(references, timeout=BESIDE_TRAINING.here())
            if not done:
                self._say(f"{', '.join(self._running)}: not finished after {BESIDE_TRAINING.here():.0f} s, given up")
                return
            self._advance()

    def _advance(self) -> None:
        for task in self.tasks:
            if task.name in self._running and ray.wait([self._running[task.name][1]], timeout=0)[0]:
                self._take(task, *self._running.pop(task.name))
            due = [step for step in self.folder.steps() if step > self._done[task.name] and not step % task.every_steps]
            if due and task.name not in self._running:
                self._done[task.name] = due[-1]
                options = {"num_cpus": 1, "max_retries": 1} | task.resources
                reference = ray.remote(task.function).options(**options).remote(self.folder.at(due[-1]))
                self._running[task.name] = (due[-1], reference)

    def _take(self, task: CheckpointTask, step: int, reference: Any) -> None:
        try:
            task.on_result(step, ray.get(reference))
        except Exception as error:  # what is beside training may not end it
            reason = str(getattr(error, "cause", None) or error).splitlines()[0]
            self._say(f"{task.name} of the checkpoint of step {step} failed: {reason}")


@torch.no_grad()
def load_checkpoint_weights(model: torch.nn.Module, checkpoint: Checkpoint, kind: str) -> None:
    """Put a checkpoint's ``master`` or ``ema`` weights into a model of one process, one parameter at a time."""
    weights = checkpoint.weights(kind)
    for name, parameter in model.named_parameters():
        # What a checkpoint leaves to its base was never trained: the model has it already.
        if weights.is_stored(name) or not checkpoint.base:
            parameter.copy_(weights[name])


def validation_task(
    config: ValidationConfig,
    recipe_factory: Callable[[], Recipe],
    datasets: Sequence[str],
    open_dataset: Callable[[str], TrainingDataset],
    on_result: Callable[[int, Any], None],
) -> CheckpointTask:
    """The fixed triples of every validation checkpoint, evaluated by a task instead of by the training workers."""

    def validate(path: str) -> dict[str, dict[str, float]]:
        device = device_for(config.gpus, "training.validation.gpus")
        checkpoint = Checkpoint(path)
        dtype = torch.bfloat16 if checkpoint.state["config"]["precision"] == "bf16" else torch.float32
        opened = [open_dataset(url) for url in datasets]
        recipe = recipe_factory()
        recipe.open(opened)
        validator = Validator(recipe, opened, config)
        model = recipe.build_model().to(device, dtype).eval()
        losses = {}
        for kind, name in (("master", "raw"), ("ema", "ema")):
            if kind in checkpoint.kinds:
                load_checkpoint_weights(model, checkpoint, kind)
                losses[name] = validator.losses_alone(model, device, dtype)
        return losses

    resources = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    return CheckpointTask("validation", config.every_steps, validate, on_result, resources)
