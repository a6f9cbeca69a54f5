"""The weights a training run starts from, read one parameter at a time: no process holds the whole model.

A rank of a partitioned model keeps a slice of every parameter. Building the model first would cost 20 GB of float32 for
each of a node's eight ranks; here the model stays on the meta device, and a parameter exists while it is being cut.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from loomvideo.model.config import DiTConfig, LoRAConfig
from loomvideo.model.lora import DOWN, MAGNITUDE, UP, adapt
from loomvideo.model.stored_weights import open_checkpoint
from loomvideo.model.weights import match_dit, start_parameters
from loomvideo.platform.errors import UserError

HASH_THREADS = 8


class InitialWeights(Mapping[str, Tensor]):
    """Float32 weights by parameter name: read from a checkpoint, or as from scratch where it has none.

    Args:
        path: See :func:`loomvideo.model.stored_weights.open_checkpoint`.
        config: Sizes of the model.
        allow: Patterns of keys that the checkpoint may lack.
        lora: Adapters to add, which start without effect; None for none.
        seed: The seed of the random values; the same on every rank.

    Attributes:
        model: The model on the meta device, with its adapters.
        fresh: Names that the checkpoint lacks; their values are in the model.
    """

    def __init__(
        self,
        path: str | Path,
        config: DiTConfig,
        allow: Sequence[str] = (),
        lora: LoRAConfig | None = None,
        seed: int = 0,
    ) -> None:
        self._checkpoint, self.model, missing = match_dit(path, config, allow)
        self._seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start_parameters(self.model, missing)
            if lora is not None:
                adapt(self.model, lora)
        held = dict(self.model.named_parameters())
        self.fresh = {name: held[name].detach() for name in missing}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in held.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.fresh:
            return self.fresh[name]
        if name.endswith(DOWN):
            return self._random(name)
        if name.endswith(UP):
            return torch.zeros(self._shapes[name])
        if name.endswith(MAGNITUDE):
            return torch.linalg.norm(self[name.removesuffix(MAGNITUDE) + ".weight"], dim=1)
        ((_, tensor),) = self._checkpoint.tensors([name])
        return tensor.float()

    def _random(self, name: str) -> Tensor:
        # Of the name, so that ranks need not read parameters in the same order.
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return nn.init.kaiming_uniform_(torch.empty(self._shapes[name]), a=math.sqrt(5), generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def weights_digest(path: str | Path) -> str:
    """A hash of the content of a checkpoint's tensor files, whatever the folder is called."""

    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    files = open_checkpoint(path).files
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        parts = [f"{file.name} {sha256}" for file, sha256 in zip(files, pool.map(digest, files), strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def open_base(path: str | Path, digest: str, config: DiTConfig, allow: Sequence[str] = ()) -> Mapping[str, Tensor]:
    """The weights that a run with frozen parameters started from, which its checkpoints name.

    Raises:
        UserError: if they are not there, or not those.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: the weights that the run started from are not there; name their folder with --base")
    found = weights_digest(path)
    if found != digest:
        raise UserError(f"{path}: not the weights that the run started from (hash {found}, expected {digest})")
    return InitialWeights(path, config, allow)
