"""Shift-tolerant LPIPS (Ghildyal & Liu, ECCV 2022): a perceptual distance whose weights come in a Python package.

The network is AlexNet with its strides replaced by blurs, so that a picture moved by a pixel is nearly the same one.
The package ``stlpips-pytorch`` carries the trained weights; its own code needs torchvision, so the network is written
down here and only the weights are read.
"""

from torch import Tensor, nn
from torch.nn import functional

from loomvideo.pipelines.evaluation.packaged_weights import PackagedWeights

WEIGHTS = PackagedWeights(
    metric="stlpips",
    package="stlpips-pytorch",
    module="stlpips_pytorch",
    file="weights/vST0.0/alex_shift_tolerant.pth",
    network="stlpips-pytorch's AlexNet",
)
_CONVOLUTIONS = ("net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
_BLURS = ("net.slice1.1", "net.slice2.4", "net.slice3.8")
_EPSILON = 1e-10


class ShiftTolerantLPIPS(nn.Module):
    """Distances of pictures.

    Args:
        weights: State dictionary of the package's AlexNet.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.register_buffer("shift", weights["scaling_layer.shift"])
        self.register_buffer("scale", weights["scaling_layer.scale"])
        for place, name in enumerate(_CONVOLUTIONS):
            self.register_buffer(f"kernel{place}", weights[f"{name}.weight"])
            self.register_buffer(f"bias{place}", weights[f"{name}.bias"])
            self.register_buffer(f"head{place}", weights[f"lin{place}.model.1.weight"])
        for place, name in enumerate(_BLURS):
            self.register_buffer(f"blur{place}", weights[f"{name}.filt"])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair.

        Args:
            a: Pictures ``[n, 3, height, width]`` from -1 to 1.
            b: Pictures of the same shape.

        Returns:
            ``[n]``; 0 for the same picture.
        """
        total = a.new_zeros(len(a))
        for place, (x, y) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            difference = (_unit(x) - _unit(y)) ** 2
            total = total + functional.conv2d(difference, getattr(self, f"head{place}")).mean((1, 2, 3))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        x = (x - self.shift) / self.scale
        first = functional.relu(self._blurred(self._convolved(x, 0, 2), 0))
        second = functional.relu(self._convolved(self._blurred(functional.max_pool2d(first, 3, 1), 1), 1, 2))
        third = functional.relu(self._convolved(self._blurred(functional.max_pool2d(second, 3, 1), 2), 2, 1))
        fourth = functional.relu(self._convolved(third, 3, 1))
        return [first, second, third, fourth, functional.relu(self._convolved(fourth, 4, 1))]

    def _convolved(self, x: Tensor, place: int, padding: int) -> Tensor:
        return functional.conv2d(x, getattr(self, f"kernel{place}"), getattr(self, f"bias{place}"), padding=padding)

    def _blurred(self, x: Tensor, place: int) -> Tensor:
        padded = functional.pad(x, (2, 2, 2, 2), mode="reflect")
        return functional.conv2d(padded, getattr(self, f"blur{place}"), stride=2, groups=x.shape[1])


def load_network(place: str = "") -> ShiftTolerantLPIPS:
    """The network with its weights.

    Raises:
        UserError: if there are none, or the file holds something else.
    """
    return WEIGHTS.load(ShiftTolerantLPIPS, place)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + _EPSILON)
