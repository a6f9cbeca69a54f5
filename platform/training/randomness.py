"""Counter-based randomness: everything random about a sample is a function of (run seed, sample key, visit).

A draw is named by its purpose ("timestep", "noise", "dropout" ...), so adding one draw never shifts another, and
neither world size, packing, loader threads nor a resume can change it. Streams are Philox (Salmon et al., 2011) with a
128-bit key hashed from the name, so two samples never share a stream.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_reused = threading.local()


def stream(*name: str | int) -> np.random.Generator:
    """The Philox stream with this name; equal names give equal draws on every machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key(name), "little")))


def first_uniform(*name: str | int) -> float:
    """The first float in [0, 1) of a stream, for those that are asked by the ten thousand a step."""
    try:
        philox, generator, state = _reused.parts
    except AttributeError:
        # A new generator costs four times as much: it also reads the system's entropy.
        philox = np.random.Philox(key=0)
        generator, state = np.random.Generator(philox), philox.state
        _reused.parts = philox, generator, state
    state["state"]["key"][:] = np.frombuffer(_key(name), "<u8")
    philox.state = state
    return generator.random()


def _key(name: Sequence[str | int]) -> bytes:
    return hashlib.blake2b("\x1f".join(map(str, name)).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class SampleRandom:
    """The random draws of one visit to one sample.

    Args:
        seed: The run's seed.
        key: The sample's key.
        visit: How often the sample was drawn before in this run.
    """

    seed: int
    key: str
    visit: int

    def numpy(self, purpose: str) -> np.random.Generator:
        """A NumPy generator of its own for ``purpose``; the same object state at every call."""
        return stream("sample", self.seed, self.key, self.visit, purpose)

    def generator(self, purpose: str) -> torch.Generator:
        """A torch CPU generator for ``purpose``.

        Torch seeds its CPU engine with 32 bits only; large draws such as noise should use :meth:`normal`.
        """
        return torch.Generator().manual_seed(int(self.numpy(purpose).integers(2**32)))

    def uniform(self, purpose: str) -> float:
        """One float in [0, 1)."""
        return first_uniform("sample", self.seed, self.key, self.visit, purpose)

    def integer(self, purpose: str, high: int) -> int:
        """One integer in [0, high)."""
        return int(self.numpy(purpose).integers(high))

    def normal(self, purpose: str, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal float32 tensor of ``shape``, on the CPU."""
        return torch.from_numpy(self.numpy(purpose).standard_normal(tuple(shape), dtype=np.float32))
