"""What a video codec is here.

A codec of temporal stride s maps sk+1 frames to k+1 latent frames, smaller in space by its spatial stride: the first
frame alone, then s frames a latent (:class:`~loomvideo.model.codec.grid.LatentGrid`). Latents are normalised per
channel, so that flow matching sees unit variance whichever codec made them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from loomvideo.platform.errors import UserError

STREAM_FRAMES = 4
"""Latent frames of a piece of a streamed video."""


@dataclass
class CodecConfig:
    """Which codec a model size uses.

    ``kind`` ``"dct"`` is the embedded :class:`DCTCodec`, which is computed; ``"learned"`` the small autoencoder whose
    weights ship with the package (:class:`~loomvideo.model.codec.learned.LearnedCodec`); ``"wan"`` reads a diffusers
    ``AutoencoderKLWan`` from ``folder`` (for example ``Wan2.2-TI2V-5B-Diffusers/vae``). ``memory_limit_bytes`` bounds
    the activations of ``"wan"``. The strides are those of the codec that will be built: what plans sizes without one
    reads them here.
    """

    kind: Literal["dct", "learned", "wan"] = "dct"
    latent_channels: int = 24
    folder: str = ""
    memory_limit_bytes: int = 12 * 2**30
    spatial_stride: int = 16
    temporal_stride: int = 4

    @property
    def is_built_in(self) -> bool:
        """Whether it works without weights from elsewhere; its posterior then has no deviation."""
        return self.kind != "wan"


@dataclass(frozen=True)
class CodecExecution:
    """How ``"wan"`` computes on its device. Either changes last bits, so what it made is named after it.

    Attributes:
        channels_last: The encoder's weights and what passes between its layers lie channels-last.
        compiled: ``torch.compile`` makes a program of the encoder for every shape, without timing candidates: which
            program it makes depends on the shape alone, not on what a worker met before.
    """

    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """For fingerprints; empty where nothing differs from the default."""
        named = (self.channels_last, "-channels_last"), (self.compiled, "-compiled")
        return "".join(name for is_on, name in named if is_on)


AS_WRITTEN = CodecExecution()
"""No change of layout, no compilation."""


class LatentMoments(NamedTuple):
    """Normalised posterior of a video: ``mean`` and ``std``, both ``[batch, channels, frames, height, width]``."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """A draw from the posterior; the mean itself where ``std`` is zero."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32)
        return self.mean + self.std * noise.to(self.mean.device, self.mean.dtype)


class Codec(Protocol):
    """A causal video codec with normalised latents."""

    latent_channels: int
    spatial_stride: int
    temporal_stride: int
    fingerprint: str

    def encode(self, video: torch.Tensor) -> LatentMoments:
        """``[batch, 3, sk+1, height, width]`` in [-1, 1] to moments ``[batch, channels, k+1, rows, columns]``."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """``[batch, channels, k+1, rows, columns]`` to a video ``[batch, 3, sk+1, height, width]`` in [-1, 1]."""
        ...

    def decode_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """:meth:`decode` of one sample, piece by piece in time."""
        ...


def check_video_shape(video: torch.Tensor, temporal_stride: int, spatial_stride: int) -> None:
    """Refuse what a causal codec of these strides cannot encode.

    Raises:
        UserError: naming the shape and what it must be.
    """
    if video.ndim != 5 or video.shape[1] != 3:
        raise UserError(f"video of shape {list(video.shape)}: expected [batch, 3, frames, height, width]")
    frames, height, width = video.shape[2:]
    if frames % temporal_stride != 1 or height % spatial_stride or width % spatial_stride:
        raise UserError(
            f"video of {frames} frames, {width}x{height}: "
            f"need {temporal_stride}k+1 frames and sides divisible by {spatial_stride}"
        )
