"""A small convolutional autoencoder whose weights ship with the package: the codec of the ``tiny`` model.

Four frames are one picture of twelve channels, so every latent frame is coded alone: nothing is carried over time, any
clip is as long as one likes, and a stream is exact. Weights were trained by ``benchmarks/tiny_codec.py`` on the sample
dataset and photographs, with noise on the latents, so that the decoder forgives what a small transformer gets wrong.
The last channels of a latent say what stands where (:mod:`loomvideo.model.codec.scene`); the decoder ignores them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from loomvideo.model.codec import scene
from loomvideo.model.codec.protocol import STREAM_FRAMES, LatentMoments, check_video_shape
from loomvideo.platform.errors import UserError

WEIGHTS = Path(__file__).with_name("learned.safetensors")
TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
LATENT_CHANNELS = 32
WIDTHS = (32, 56, 80)
"""Channels at strides 2, 4 and 8."""


class Activation(nn.Module):
    """Tanh-approximated GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.gelu(x, approximate="tanh")


class Residual(nn.Module):
    """Activation and a 3x3 convolution, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` to the same."""
        return x + self.conv(F.gelu(x, approximate="tanh"))


class Autoencoder(nn.Module):
    """Encoder and decoder of pictures of 12 channels, and the statistics of their latents.

    Each is a linear lapped transform (windows of 16x16 at a stride of 8) and a network that corrects it.
    """

    def __init__(self, latent_channels: int = LATENT_CHANNELS, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        fine, middle, coarse = widths
        frames = 3 * TEMPORAL_STRIDE
        pixels = 4 * frames
        lapped = {"kernel_size": 2 * SPATIAL_STRIDE, "stride": SPATIAL_STRIDE, "padding": SPATIAL_STRIDE // 2}
        self.linear_encoder = nn.Conv2d(frames, latent_channels, **lapped)
        self.linear_decoder = nn.ConvTranspose2d(latent_channels, frames, **lapped)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(pixels, fine, 3, padding=1),
            Activation(),
            nn.Conv2d(fine, middle, 3, stride=2, padding=1),
            Residual(middle),
            Activation(),
            nn.Conv2d(middle, coarse, 3, stride=2, padding=1),
            Residual(coarse),
            Activation(),
            nn.Conv2d(coarse, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, coarse, 3, padding=1),
            Residual(coarse),
            Activation(),
            nn.Conv2d(coarse, 4 * middle, 1),
            nn.PixelShuffle(2),
            Residual(middle),
            Activation(),
            nn.Conv2d(middle, 4 * fine, 1),
            nn.PixelShuffle(2),
            Residual(fine),
            Activation(),
            nn.Conv2d(fine, pixels, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("mean", torch.zeros(latent_channels))
        self.register_buffer("std", torch.ones(latent_channels))

    def encode(self, pictures: Tensor) -> Tensor:
        """``[batch, 12, height, width]`` to normalised latents ``[batch, channels, height / 8, width / 8]``."""
        return (self.raw_latents(pictures) - self.mean[:, None, None]) / self.std[:, None, None]

    def raw_latents(self, pictures: Tensor) -> Tensor:
        """:meth:`encode` before the normalisation."""
        return self.linear_encoder(pictures) + self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to pictures."""
        raw = latents * self.std[:, None, None] + self.mean[:, None, None]
        return self.linear_decoder(raw) + self.decoder(raw)


class LearnedCodec:
    """The codec around :class:`Autoencoder`.

    The first frame is coded as four equal frames: a picture and a still clip have the same latents. Deterministic: the
    posterior has zero std.

    Args:
        weights: A safetensors file of an :class:`Autoencoder`.
        device: The device it computes on, in float32.
        scene_weights: A safetensors file of a :class:`~loomvideo.model.codec.scene.SceneReader`.
    """

    spatial_stride = SPATIAL_STRIDE
    temporal_stride = TEMPORAL_STRIDE

    def __init__(
        self,
        weights: Path | str = WEIGHTS,
        device: torch.device | str = "cpu",
        scene_weights: Path | str = scene.WEIGHTS,
    ) -> None:
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
        self.appearance_channels = len(tensors["mean"])
        self.latent_channels = self.appearance_channels + scene.CHANNELS
        self.model = Autoencoder(self.appearance_channels).eval().requires_grad_(False)
        self.model.load_state_dict(tensors)
        self.model.to(device)
        self.scene_reader = scene.SceneReader.load(scene_weights).to(device)
        content = Path(weights).read_bytes() + Path(scene_weights).read_bytes()
        self.fingerprint = "learned-" + hashlib.sha256(content).hexdigest()[:16]

    @torch.no_grad()
    def encode(self, video: Tensor) -> LatentMoments:
        """Video ``[batch, 3, 4k+1, height, width]`` in [-1, 1] to moments with zero std."""
        period = self.temporal_stride
        check_video_shape(video, period, self.spatial_stride)
        video = torch.cat([video[:, :, :1].expand(-1, -1, period, -1, -1), video[:, :, 1:]], dim=2)
        groups = video.float().unflatten(2, (-1, period)).transpose(1, 2)  # [batch, k+1, 3, 4, height, width]
        pictures = groups.flatten(0, 1).flatten(1, 2)
        latents = torch.cat([self.model.encode(pictures), self.scene_reader.channels(pictures)], dim=1)
        mean = latents.unflatten(0, groups.shape[:2]).transpose(1, 2).to(video.dtype).contiguous()
        return LatentMoments(mean, torch.zeros_like(mean))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[batch, channels, k+1, height, width]`` to a video clamped to [-1, 1]."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """:meth:`decode` in pieces of :data:`STREAM_FRAMES` latent frames, the first frame alone.

        Raises:
            UserError: if the latents are not of this codec.
        """
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise UserError(f"latents of shape {list(latents.shape)}: this codec has {self.latent_channels} channels")
        # The first frame stood for four: their mean is its best estimate.
        yield self._frames(latents[:, :, :1]).mean(2, keepdim=True).clamp(-1, 1).to(latents.dtype)
        for piece in latents[:, :, 1:].split(STREAM_FRAMES, dim=2):
            if piece.shape[2]:
                yield self._frames(piece).clamp(-1, 1).to(latents.dtype)

    def _frames(self, latents: Tensor) -> Tensor:
        """Four frames a latent, fp32."""
        batch, _, frames = latents.shape[:3]
        appearance = latents[:, : self.appearance_channels].float()
        pictures = self.model.decode(appearance.transpose(1, 2).flatten(0, 1))
        pictures = pictures.unflatten(1, (3, self.temporal_stride)).unflatten(0, (batch, frames))
        return pictures.permute(0, 2, 1, 3, 4, 5).flatten(2, 3)
