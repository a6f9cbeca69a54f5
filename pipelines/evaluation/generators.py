"""What makes results: the interface of every model under test, the model itself, and two without weights."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loomvideo.pipelines.evaluation.inputs import LoadedItem


class SampleGenerator(Protocol):
    """A model under test.

    Attributes:
        fingerprint: Changes whenever its results may: weights, sampler, guidance.
    """

    @property
    def fingerprint(self) -> str:
        """Its hash or name."""
        ...

    def generate(self, item: LoadedItem, seed: int, use_source: bool = True) -> np.ndarray:
        """The result, uint8 ``[frames, height, width, 3]`` in ``item.size``.

        Args:
            item: What to generate from.
            seed: The seed of the noise.
            use_source: Whether the source is given; without it the size stays that of the source.
        """


@dataclass(frozen=True)
class IdentityGenerator:
    """Returns the source: the baseline that every preservation metric loves and every edit metric must not."""

    fingerprint: str = "identity"

    def generate(self, item: LoadedItem, seed: int, use_source: bool = True) -> np.ndarray:
        """The source, or flat grey where there is none."""
        if item.source is not None and use_source:
            return item.source
        width, height = item.size
        return np.full((item.num_frames, height, width, 3), 127, np.uint8)


@dataclass(frozen=True)
class BlendGenerator:
    """A stand-in for a model with a known quality: target and source blended, with noise from the seed.

    Attributes:
        skill: 1 gives the target, 0 the source.
        noise: Standard deviation of Gaussian noise in grey levels.
    """

    skill: float = 0.7
    noise: float = 8.0

    @property
    def fingerprint(self) -> str:
        """See :class:`SampleGenerator`."""
        return f"blend-{self.skill:g}-{self.noise:g}"

    def generate(self, item: LoadedItem, seed: int, use_source: bool = True) -> np.ndarray:
        """See :class:`SampleGenerator`."""
        rng = np.random.default_rng(seed)
        base = IdentityGenerator().generate(item, seed, use_source).astype(np.float32)
        if item.target is not None:
            base = (1 - self.skill) * base + self.skill * item.target
        return np.clip(base + rng.normal(0, self.noise, base.shape), 0, 255).astype(np.uint8)


def sample_seed(base: int, suite: str, key: str) -> int:
    """A seed of its own for every sample, the same on every machine and in every order."""
    digest = hashlib.sha256(f"{base}/{suite}/{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
