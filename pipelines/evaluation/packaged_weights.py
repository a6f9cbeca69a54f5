"""Networks of learned metrics whose weights come as a file of a Python package, in the extra ``metrics``."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from loomvideo.platform.errors import UserError, how_to_add

_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True)
class PackagedWeights:
    """A file of weights in a package.

    Attributes:
        metric: Name of the learned metric, for messages.
        package: The package, as it is installed.
        module: The same, as it is imported.
        file: The file inside.
        network: What the weights belong to, for messages.
    """

    metric: str
    package: str
    module: str
    file: str
    network: str

    def path(self, place: str = "") -> Path:
        """The file that is given, else that of the installed package.

        Raises:
            UserError: if there is none.
        """
        path = Path(place)
        if not place:
            found = importlib.util.find_spec(self.module)
            if found is None or found.origin is None:
                raise UserError(f"learned metrics need the package {self.package}: {how_to_add('metrics')}")
            path = Path(found.origin).parent / self.file
        if not path.is_file():
            raise UserError(f"learned_weights.{self.metric}: file {path} not found")
        return path

    def load(self, build: Callable[[dict[str, Tensor]], _Network], place: str = "") -> _Network:
        """The network that ``build`` makes of the state dictionary, ready for use.

        Raises:
            UserError: if there are no weights, or the file holds something else.
        """
        path = self.path(place)
        try:
            return build(torch.load(path, map_location="cpu", weights_only=True)).eval()
        except (KeyError, RuntimeError, AttributeError, ValueError, TypeError) as error:
            raise UserError(
                f"learned_weights.{self.metric}: {path} holds no weights of {self.network} ({error})"
            ) from error
