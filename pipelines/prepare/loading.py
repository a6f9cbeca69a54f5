"""Planned samples to pixels, wherever a decoder runs: in the builder itself, or in an actor on another node.

Pixels cross Ray's object store, so a decoder may run on any node: docs/benchmarks.md has what a GPU takes of them.
"""

import dataclasses
import logging
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.attempts import worker_place
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.geometry import Filtered
from loomvideo.pipelines.prepare.load import LoadedSample, SampleLoader
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.manifest import shard_path
from loomvideo.platform.shards.reader import read_placed
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.shards.storage import Storage

logger = logging.getLogger(__name__)

_CHANNELS = 3
Loaded = LoadedSample | Outcome


@dataclasses.dataclass(frozen=True)
class PlannedSample:
    """A sample of the plan.

    Attributes:
        slot: Its place in the shard.
        sample: What to make.
        assessed: What curation found.
        place: Index row of its earlier encoding, None without one.
    """

    slot: int
    sample: Sample
    assessed: dict[str, Any]
    place: dict[str, Any] | None


class Loader(Protocol):
    """What decodes samples; see :class:`~loomvideo.pipelines.prepare.load.SampleLoader`."""

    def load(self, sample: Sample, previous: ShardSample | None = None) -> LoadedSample:
        """Probe, cut, decode and crop."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...


def load_planned(loader: Loader, storage: Storage, plan: PlannedSample) -> Loaded:
    """Load a sample, or say why it cannot be.

    Args:
        loader: What decodes.
        storage: The dataset folder, for its earlier encoding.
        plan: The sample.
    """
    sample = plan.sample
    try:
        return loader.load(sample, _before(storage, plan.place))
    except DecodeError as error:
        return lost(sample, "quarantined", "decode", error.reason, str(error))
    except Filtered as decision:
        return lost(sample, "filtered", "clip", decision.reason, str(decision))
    except UserError as error:
        return lost(sample, "quarantined", "decode", "invalid_sample", str(error))


def lost(sample: Sample, outcome: str, stage: str, reason: str, message: str) -> Outcome:
    """What came of a planned sample that is not written; the plan has the sample, so it needs no copy."""
    return Outcome(sample.key, sample.dataset, outcome, stage, reason, message, where=worker_place())


def _before(storage: Storage, place: dict[str, Any] | None) -> ShardSample | None:
    if place is None:
        return None
    try:
        return read_placed(storage, shard_path(place["shard"]), place, raw=True)
    except (UserError, ValueError, KeyError) as error:
        # A shard that another worker is writing anew holds other bytes there.
        logger.warning("%s; %s is encoded again", error, place["key"])
        return None


def pixel_bytes(sample: Sample, config: PrepareConfig) -> int:
    """Bytes of a loaded sample's pixels at most: all its windows at the largest bucket class."""
    is_image = TASKS[sample.task].is_image
    frames = 1 if is_image else config.clips.num_frames * config.clips.windows
    clips = 2 if sample.source else 1
    return (clips * frames + len(sample.references)) * max(config.clips.buckets) ** 2 * _CHANNELS


class Decoder:
    """Decodes samples for a builder elsewhere; a Ray actor without a GPU.

    Args:
        config: The configuration of the job.
        encoders: Fingerprints of the builder's encoders, for those of the members.
        loader: Makes what decodes.
    """

    def __init__(self, config: PrepareConfig, encoders: dict[str, str], loader: Callable[..., Loader] = SampleLoader):
        # One core is reserved, and sums over threads depend on their number.
        torch.set_num_threads(1)
        self._storage = Storage(config.output)
        self._loader = loader(config, base_folder(config.input), encoders)

    def place(self) -> str:
        """Where it runs; answers when it is ready."""
        return worker_place()

    def load(self, plan: PlannedSample) -> Loaded:
        """Load a sample, its pixels as arrays, which cross the object store without a copy in a pickle."""
        loaded = load_planned(self._loader, self._storage, plan)
        return mapped(loaded, Tensor.numpy) if isinstance(loaded, LoadedSample) else loaded


class DecoderHandle:
    """A :class:`Decoder` as its builder sees it: an actor that waits for a free CPU anywhere in the cluster.

    Args:
        config: The configuration of the job.
        encoders: Fingerprints of the builder's encoders.
        loader: Makes what decodes.
    """

    def __init__(self, config: PrepareConfig, encoders: dict[str, str], loader: Callable[..., Loader] = SampleLoader):
        import ray

        self._ray = ray
        # Whoever started it starts another where it is missed; Ray ends it with its builder.
        actor = ray.remote(num_cpus=config.workers.decoder_cpus, max_restarts=0)(Decoder)
        self._actor = actor.remote(config, encoders, loader)

    def wait(self) -> str:
        """Wait until it runs; returns where.

        Raises:
            DecoderLostError: if it ended before.
        """
        return self._get(self._actor.place.remote())

    def load(self, plan: PlannedSample) -> Loaded:
        """Load a sample there; its pixels lie in the shared memory of this node, and must not be written to.

        Raises:
            DecoderLostError: if the decoder's process or node ended.
        """
        loaded = self._get(self._actor.load.remote(plan))
        return mapped(loaded, _tensor) if isinstance(loaded, LoadedSample) else loaded

    def _get(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (errors.RayActorError, errors.ObjectLostError, errors.OutOfMemoryError) as error:
            raise DecoderLostError(str(error).strip().splitlines()[0][:200]) from error

    def close(self) -> None:
        """End it."""
        self._ray.kill(self._actor)


class DecoderLostError(RuntimeError):
    """A decoder's process or node ended before it answered."""


def mapped(loaded: LoadedSample, convert: Callable[[Any], Any]) -> LoadedSample:
    """A loaded sample with its pixels in another form."""
    parts = ("target", "source", "references")
    return dataclasses.replace(loaded, **{part: [convert(one) for one in getattr(loaded, part)] for part in parts})


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # Pixels are only read, as what lies in shared memory must be.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)
