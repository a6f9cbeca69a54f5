"""Frozen MLLMs in Ray actors that turn stored MLLM inputs into the states the transformer attends to.

Datasets prepared with ``features.mode=streamed`` (and ``text``, for samples with pictures) hold what the MLLM reads.
Loader threads of the training workers ask the pool, steps ahead of training; each waits for its own sample, so the
order of samples is the planned one however fast an actor is. A call holds one prompt: an edit's thousand tokens fill
an accelerator. States are rounded to bfloat16 as stored ones are, so both modes train alike.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.sizes import ModelSize
from loomvideo.pipelines.prepare.features import streamed_inputs
from loomvideo.pipelines.training.config import FeaturePoolConfig
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset


class FeatureActor:
    """One frozen MLLM.

    Args:
        model: Names it.
        num_threads: CPU threads.
    """

    def __init__(self, model: ModelSize, num_threads: int):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(num_threads)
        # The precision that `data prepare` encodes with.
        self.mllm = FrozenMLLM.of_size(model, device, torch.bfloat16 if device == "cuda" else torch.float32)

    def fingerprint(self) -> str:
        """Of the MLLM."""
        return self.mllm.fingerprint

    def states(self, member: Mapping[str, np.ndarray], entry: int, variant: str) -> np.ndarray:
        """States [layers, tokens, dim] of one prompt of a streamed member, bfloat16 bits as int16."""
        tensors = {name: torch.tensor(values) for name, values in member.items()}
        (states,) = self.mllm.encode([streamed_inputs(tensors, entry, variant, self.mllm.processor)])
        return states.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()


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
        """States float32 [layers, tokens, dim] of entry ``entry``, ``full`` or ``visual``, of a streamed member.

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
        # A bfloat16 is the upper half of a float32.
        return torch.from_numpy(bits.astype(np.int32) << 16).view(torch.float32)


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
        num_cpus=config.cpus, num_gpus=config.gpus, max_restarts=-1, max_task_retries=-1, max_concurrency=1
    )(FeatureActor)
    actors = [remote.remote(model, max(1, config.cpus)) for _ in range(config.actors)]
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
