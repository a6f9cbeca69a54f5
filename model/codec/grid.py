"""How pixels and frames map to latents and tokens: the one home of every stride."""

from dataclasses import dataclass
from typing import Protocol

from loomvideo.platform.errors import UserError


class Strided(Protocol):
    """Whatever states a codec's strides: the codec itself, or its configuration."""

    temporal_stride: int
    spatial_stride: int


@dataclass(frozen=True)
class LatentGrid:
    """The geometry of a causal codec and of the transformer's patches on its latents.

    The codec makes k+1 latent frames of ``temporal_stride * k + 1`` frames, the first frame alone.

    Attributes:
        temporal_stride: Frames a latent frame after the first.
        spatial_stride: Pixels a latent cell, in both directions.
        patch_size: Latent frames, rows and columns of a token.
    """

    temporal_stride: int
    spatial_stride: int
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def of(cls, codec: Strided, patch_size: tuple[int, int, int] = (1, 2, 2)) -> "LatentGrid":
        """The grid of a codec under a transformer's patches."""
        return cls(codec.temporal_stride, codec.spatial_stride, tuple(patch_size))

    @property
    def side_multiples(self) -> tuple[int, int]:
        """What a width and a height must be multiples of, in pixels."""
        _, rows, columns = self.patch_size
        return self.spatial_stride * columns, self.spatial_stride * rows

    @property
    def frames_rule(self) -> str:
        """Which numbers of frames exist, in words."""
        return f"{self.temporal_stride}k+1"

    def whole_frames(self, num_frames: int) -> int:
        """The largest encodable number of frames that is not above ``num_frames`` (at least 1)."""
        return (max(num_frames, 1) - 1) // self.temporal_stride * self.temporal_stride + 1

    def covering_frames(self, num_frames: int) -> int:
        """The smallest encodable number of frames that is not below ``num_frames``."""
        return self.whole_frames(num_frames + self.temporal_stride - 1)

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of an encodable number of frames."""
        return (num_frames - 1) // self.temporal_stride + 1

    def frames(self, latent_frames: int) -> int:
        """Frames that latent frames decode to."""
        return (latent_frames - 1) * self.temporal_stride + 1

    def latent_shape(self, num_frames: int, width: int, height: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return self.latent_frames(num_frames), height // self.spatial_stride, width // self.spatial_stride

    def size(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """``(width, height)`` in pixels of latent rows and columns."""
        return latent_width * self.spatial_stride, latent_height * self.spatial_stride

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """Video tokens of the transformer."""
        t, h, w = self.latent_shape(num_frames, width, height)
        return t * (h // self.patch_size[1]) * (w // self.patch_size[2])

    def check_frames(self, key: str, num_frames: int) -> None:
        """Refuse a number of frames that the codec cannot take.

        Raises:
            UserError: naming the key and the nearest number.
        """
        if num_frames < 1 or self.whole_frames(num_frames) != num_frames:
            nearest = max(round((num_frames - 1) / self.temporal_stride), 0) * self.temporal_stride + 1
            raise UserError(f"{key}={num_frames}: must be {self.frames_rule}, for example {nearest}")

    def check_size(self, key: str, width: int, height: int) -> None:
        """Refuse a size that does not divide into tokens.

        Raises:
            UserError: naming the key and the multiples.
        """
        across, down = self.side_multiples
        if min(width, height) < 1 or width % across or height % down:
            sides = f"multiples of {across}" if across == down else f"multiples of {across} and {down}"
            raise UserError(f"{key}={width}x{height}: sides must be {sides}")
