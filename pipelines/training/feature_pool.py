"""Frozen MLLMs in Ray actors that turn stored MLLM inputs into the states the transformer attends to.

Datasets prepared with ``features.mode=streamed`` (and ``text``, for samples with pictures) hold what the MLLM reads.
Loader threads of the training workers ask the pool, steps ahead of training; each waits for its own sample, so the
order of samples is the planned one however fast an actor is. What arrives while an actor computes, from all workers, is
its next batch: an edit's thousand tokens fill an accelerator, a caption's hundred do not. States are bfloat16 as stored
ones are, so both modes train alike.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from loomvideo.model.conditioning.inputs import MLLMInputs
from loomvideo.model.conditioning.mllm import MAX_BATCH_TOKENS, FrozenMLLM
from loomvideo.model.sizes import ModelSize
from loomvideo.pipelines.prepare.features import streamed_inputs
from loomvideo.pipelines.training.config import FeaturePoolConfig
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.devices import device_for
from loomvideo.platform.shards.reader import ShardDataset

MAX_REQUESTS = 256
"""Requests that an actor holds at once; more wait in Ray's queue."""


@dataclasses.dataclass
class _Request:
    prompt: MLLMInputs
    answer: Future


class FeatureActor:
    """One frozen MLLM, asked from many threads.

    Args:
        model: Names it.
        gpus: Reserved for it; 0 computes on the CPU, whatever GPUs there are.
        num_threads: CPU threads.
        packed: Whether prompts of a batch share a row.
    """

    def __init__(self, model: ModelSize, gpus: float, num_threads: int, packed: bool = False):
        device = device_for(gpus, "features.gpus")
        torch.set_num_threads(num_threads)
        # The precision that `data prepare` encodes with.
        self.mllm = FrozenMLLM.of_size(model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        if packed:
            self.mllm.pack_prompts()
        self.batch_sizes: list[int] = []
        self._waiting: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="encode", daemon=True).start()

    def fingerprint(self) -> str:
        """Of the MLLM."""
        return self.mllm.fingerprint

    def states(self, member: Mapping[str, np.ndarray], entry: int, variant: str) -> np.ndarray:
        """States [layers, tokens, dim] of one prompt of a streamed member, bfloat16 bits as int16."""
        tensors = {name: torch.tensor(values) for name, values in member.items()}
        request = _Request(streamed_inputs(tensors, entry, variant, self.mllm.processor), Future())
        self._waiting.put(request)
        return request.answer.result()

    def _serve(self) -> None:
        while True:
            requests = [self._waiting.get()]
            tokens = requests[0].prompt.num_tokens
            while tokens < MAX_BATCH_TOKENS and not self._waiting.empty():
                requests.append(self._waiting.get())
                tokens += requests[-1].prompt.num_tokens
            self.batch_sizes = [*self.batch_sizes[-99:], len(requests)]
            self._answer(requests)

    def _answer(self, requests: Sequence[_Request]) -> None:
        try:
            for request, states in zip(requests, self.mllm.encode([r.prompt for r in requests]), strict=True):
                bits = states.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
                request.answer.set_result(bits.numpy())
        except Exception as error:  # handed to who asked
            if len(requests) == 1:
                requests[0].answer.set_exception(error)
                return
            # One bad prompt must not fail the others.
            for request in requests:
                if not request.answer.done():
                    self._answer([request])


class FeaturePool:
    """The actors as their users see them; picklable, with counts of its own in every process.

    Args:
        actors: Handles of :class:`FeatureActor`.
    """

    def __init__(self, actors: Sequence[Any]):
        self.actors = list(actors)
        self._outstanding = [0] * len(self.actors)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeaturePool, (self.actors,)

    def states(self, member: Mapping[str, Tensor], entry: int, variant: str) -> Tensor:
        """States bfloat16 [layers, tokens, dim] of entry ``entry``, ``full`` or ``visual``, of a streamed member.

        Waits for them; an actor that dies is restarted and asked again.
        """
        other = "visual_input_ids" if variant == "full" else "input_ids"
        names = [name for name in member if name.endswith(f".{entry}") and name != f"{other}.{entry}"]
        with self._lock:
            least = self._outstanding.index(min(self._outstanding))
            self._outstanding[least] += 1
        try:
            bits = ray.get(
                self.actors[least].states.remote({name: member[name].numpy() for name in names}, entry, variant)
            )
        finally:
            with self._lock:
                self._outstanding[least] -= 1
        # What Ray hands over is read-only.
        return torch.from_numpy(bits.copy()).view(torch.bfloat16)


@contextlib.contextmanager
def feature_pool(
    config: FeaturePoolConfig, model: ModelSize, datasets: Sequence[ShardDataset]
) -> Iterator[FeaturePool | None]:
    """The pool that the datasets need, or None when all their features are stored. Ray must be initialised.

    Raises:
        UserError: if the actors' MLLM is not the one the datasets were prepared for.
    """
    streamed = [dataset for dataset in datasets if feature_mode(dataset) != "stored"]
    if not streamed:
        yield None
        return
    remote = ray.remote(
        num_cpus=config.cpus, num_gpus=config.gpus, max_restarts=-1, max_task_retries=-1, max_concurrency=MAX_REQUESTS
    )(FeatureActor)
    actors = [remote.remote(model, config.gpus, max(1, config.cpus), config.packed) for _ in range(config.actors)]
    try:
        fingerprint = ray.get(actors[0].fingerprint.remote())
        for dataset in streamed:
            expected = dataset.manifest.encoders["mllm"]
            if fingerprint != expected:
                raise UserError(
                    f"data.shards {dataset.storage.url}: prepared for MLLM {expected}, the pool has {fingerprint}; "
                    "set mllm_folder to the one used by `data prepare`"
                )
        yield FeaturePool(actors)
    finally:
        for actor in actors:
            ray.kill(actor)


def feature_mode(dataset: Any) -> str:
    """``stored``, ``streamed`` or ``text``."""
    return dataset.manifest.features.get("mode", "stored")
