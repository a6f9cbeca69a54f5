"""The embedded codec, which needs no weights."""

import hashlib
from collections.abc import Iterator

import torch

from loomvideo.model.codec.protocol import STREAM_FRAMES, LatentMoments, check_video_shape
from loomvideo.platform.errors import UserError

# (colour, temporal, vertical, horizontal frequency, root mean square) of the strongest coefficients of the orthonormal
# 4x16x16 DCT in the colour space below, for pixels in [-1, 1]; strongest first. Measured on 480 crops of 128x128 of
# eight photographs that scikit-image and scikit-learn ship (half of them panned by about 1.2 pixels a frame, vertical
# and horizontal averaged); they hold 94 % of the energy with 24 coefficients, 96 % with 48, of 3,072.
COEFFICIENTS: tuple[tuple[int, int, int, int, float], ...] = (
    *((0, 0, 0, 0, 24.784), (1, 0, 0, 0, 14.779), (2, 0, 0, 0, 8.432), (0, 0, 0, 1, 5.739)),
    *((0, 0, 1, 0, 5.739), (0, 0, 1, 1, 2.999), (0, 0, 0, 2, 2.998), (0, 0, 2, 0, 2.998)),
    *((1, 0, 0, 1, 2.169), (1, 0, 1, 0, 2.169), (0, 0, 1, 2, 2.021), (0, 0, 2, 1, 2.021)),
    *((0, 0, 0, 3, 1.851), (0, 0, 3, 0, 1.851), (0, 0, 2, 2, 1.474), (0, 1, 0, 0, 1.472)),
    *((0, 0, 1, 3, 1.35), (0, 0, 3, 1, 1.35), (0, 0, 0, 4, 1.321), (0, 0, 4, 0, 1.321)),
    *((0, 1, 0, 1, 1.192), (0, 1, 1, 0, 1.192), (2, 0, 0, 1, 1.118), (2, 0, 1, 0, 1.118)),
    *((0, 0, 2, 3, 1.091), (0, 0, 3, 2, 1.091), (1, 0, 0, 2, 1.025), (1, 0, 2, 0, 1.025)),
    *((1, 0, 1, 1, 1.02), (0, 0, 0, 5, 1.001), (0, 0, 5, 0, 1.001), (0, 0, 1, 4, 1.001)),
    *((0, 0, 4, 1, 1.001), (0, 1, 0, 2, 0.908), (0, 1, 2, 0, 0.908), (0, 1, 1, 1, 0.896)),
    *((0, 0, 3, 3, 0.856), (0, 0, 2, 4, 0.83), (0, 0, 4, 2, 0.83), (0, 0, 0, 6, 0.809)),
    *((0, 0, 6, 0, 0.809), (0, 0, 1, 5, 0.77), (0, 0, 5, 1, 0.77), (0, 1, 0, 3, 0.724)),
    *((0, 1, 3, 0, 0.724), (0, 1, 1, 2, 0.703), (0, 1, 2, 1, 0.703), (0, 0, 3, 4, 0.692)),
    *((0, 0, 4, 3, 0.692), (0, 0, 2, 5, 0.664), (0, 0, 5, 2, 0.664), (0, 0, 0, 7, 0.657)),
    *((0, 0, 7, 0, 0.657), (1, 0, 1, 2, 0.648), (1, 0, 2, 1, 0.648), (0, 0, 1, 6, 0.628)),
    *((0, 0, 6, 1, 0.628), (1, 0, 0, 3, 0.614), (1, 0, 3, 0, 0.614), (0, 1, 2, 2, 0.587)),
    *((0, 0, 4, 4, 0.586), (0, 0, 3, 5, 0.576), (0, 0, 5, 3, 0.576), (0, 1, 0, 4, 0.568)),
)

# Brightness, red against blue, green against both: orthogonal rows.
COLOURS = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])


class DCTCodec:
    """The embedded codec: the strongest coefficients of a blockwise 3-D cosine transform.

    The basis is orthonormal: decoding is the transposed matrix and what is lost is exactly the coefficients left out.
    The first frame is coded as four equal frames: a picture and a still clip have the same latents. Deterministic: the
    posterior has zero std.
    """

    spatial_stride = 16
    temporal_stride = 4
    """The block that :data:`COEFFICIENTS` were measured on."""

    def __init__(self, latent_channels: int = 24):
        if not 1 <= latent_channels <= len(COEFFICIENTS):
            raise UserError(f"codec latent_channels={latent_channels}: the dct codec has 1 to {len(COEFFICIENTS)}")
        self.latent_channels = latent_channels
        kept = COEFFICIENTS[:latent_channels]
        time, space = _cosines(self.temporal_stride), _cosines(self.spatial_stride)
        colours = torch.nn.functional.normalize(COLOURS.double(), dim=1)
        basis = [torch.einsum("c,t,y,x->ctyx", colours[c], time[t], space[v], space[h]) for c, t, v, h, _ in kept]
        self.basis = torch.stack(basis).flatten(1).float()  # [channels, 3 * 4 * 16 * 16]
        self.scale = torch.tensor([rms for *_, rms in kept])
        self.fingerprint = "dct-" + hashlib.sha256(repr(kept).encode()).hexdigest()[:16]

    def encode(self, video: torch.Tensor) -> LatentMoments:
        """Video ``[batch, 3, 4k+1, height, width]`` in [-1, 1] to moments with zero std."""
        period, stride = self.temporal_stride, self.spatial_stride
        check_video_shape(video, period, stride)
        video = torch.cat([video[:, :, :1].expand(-1, -1, period, -1, -1), video[:, :, 1:]], dim=2)
        batch, _, frames, height, width = video.shape
        shape = batch, frames // period, height // stride, width // stride
        blocks = video.reshape(batch, 3, shape[1], period, shape[2], stride, shape[3], stride)
        blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(*shape, -1).float()
        latents = blocks @ self.basis.to(video.device).T / self.scale.to(video.device)
        mean = latents.permute(0, 4, 1, 2, 3).to(video.dtype).contiguous()
        return LatentMoments(mean, torch.zeros_like(mean))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents ``[batch, channels, k+1, height, width]`` to a video clamped to [-1, 1]."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def decode_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """:meth:`decode` in pieces of :data:`STREAM_FRAMES` latent frames, the first frame alone."""
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise UserError(f"latents of shape {list(latents.shape)}: this codec has {self.latent_channels} channels")
        # The first frame stood for four: their mean is its least-squares estimate.
        yield self._frames(latents[:, :, :1]).mean(2, keepdim=True).clamp(-1, 1).to(latents.dtype)
        for piece in latents[:, :, 1:].split(STREAM_FRAMES, dim=2):
            if piece.shape[2]:
                yield self._frames(piece).clamp(-1, 1).to(latents.dtype)

    def _frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Four frames a latent, fp32."""
        period, stride = self.temporal_stride, self.spatial_stride
        batch, _, frames, height, width = latents.shape
        coefficients = latents.float().permute(0, 2, 3, 4, 1) * self.scale.to(latents.device)
        blocks = coefficients @ self.basis.to(latents.device)
        blocks = blocks.reshape(batch, frames, height, width, 3, period, stride, stride)
        return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, 3, -1, height * stride, width * stride)


def _cosines(size: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix, ``[frequency, position]``."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64)[None]
    matrix = torch.cos(torch.pi * (position + 0.5) * frequency / size) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix
