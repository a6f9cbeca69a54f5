"""What stands where: channels of a latent beside the autoencoder's, so that a small transformer need not learn to see.

To keep the background while a dress changes its colour, a transformer has to tell the two apart; from scratch that
takes it most of a short run. A small convolutional network, whose weights ship with the package, reads it from the
pictures: the shares of a cell that are background, the upper garment (or a dress or coat) and the lower garment. They
are diffused together with the latents, as in ReDi (Kouzelis et al. 2025, arXiv:2504.16064). Weights were trained by
``benchmarks/tiny_scene.py`` on figures of the sample world: of other pictures it says little.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("scene.safetensors")
CLASSES = ("background", "upper garment", "lower garment", "body")
"""The last one is what the others leave, and no channel."""
CHANNELS = len(CLASSES) - 1
WIDTH = 56
DILATIONS = (1, 2, 1, 2, 1)
UNSHUFFLED = 4


class DilatedResidual(nn.Module):
    """Activation and a dilated 3x3 convolution, added to the input."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` to the same."""
        return x + self.conv(F.gelu(x, approximate="tanh"))


class SceneReader(nn.Module):
    """Pictures of several frames to shares of :data:`CLASSES` in every cell of 8x8 pixels, and their statistics."""

    def __init__(self, picture_channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.patches = nn.Conv2d(picture_channels * UNSHUFFLED**2, width, 1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.context = nn.Sequential(*(DilatedResidual(width, dilation) for dilation in DILATIONS))
        self.head = nn.Conv2d(width, len(CLASSES), 1)
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))

    @classmethod
    def load(cls, weights: Path | str = WEIGHTS) -> "SceneReader":
        """The trained network, in float32."""
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
        width, channels = tensors["patches.weight"].shape[:2]
        reader = cls(channels // UNSHUFFLED**2, width).eval().requires_grad_(False)
        reader.load_state_dict(tensors)
        return reader

    def forward(self, pictures: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` in [-1, 1] to logits ``[batch, classes, height / 8, width / 8]``."""
        x = F.gelu(self.patches(F.pixel_unshuffle(pictures, UNSHUFFLED)), approximate="tanh")
        return self.head(F.gelu(self.context(self.down(x)), approximate="tanh"))

    def shares(self, pictures: Tensor) -> Tensor:
        """Shares of all classes but the last, ``[batch, CHANNELS, height / 8, width / 8]``."""
        return self(pictures).softmax(1)[:, :CHANNELS]

    def channels(self, pictures: Tensor) -> Tensor:
        """:meth:`shares` with mean 0 and deviation 1 over the sample world."""
        return (self.shares(pictures) - self.mean[:, None, None]) / self.std[:, None, None]
