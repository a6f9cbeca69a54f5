"""Where the three parts of a model are while it generates: all at once, one after another, or a block at a time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loomvideo.model.codec import LatentGrid

PartName = Literal["dit", "codec", "mllm"]
MODES = ("resident", "sequential", "offload")
"""``resident``: all weights on the device; ``sequential``: one part at a time, each read when it is needed and freed
for the next; ``offload``: that, and the transformers' blocks come from host memory one after another."""


class ResidentParts:
    """Parts that are all on the device."""

    def __init__(self, dit: nn.Module, codec: Any, mllm: Any) -> None:
        self._parts: dict[str, Any] = {"dit": dit, "codec": codec, "mllm": mllm}
        parameter = next(dit.parameters())
        self.device, self.config = parameter.device, dit.config
        self.latent_channels, self.grid = codec.latent_channels, LatentGrid.of(codec, dit.config.patch_size)

    @contextlib.contextmanager
    def use(self, name: PartName) -> Iterator[Any]:
        """The part, ready to compute."""
        yield self._parts[name]

    def replace(self, name: PartName, part: Any) -> None:
        """Put another part in the place of one."""
        self._parts[name] = part

    def free(self) -> None:
        """Free what can be read again: nothing."""


class SequentialParts:
    """Parts of which one is loaded at a time.

    Args:
        loaders: Read a part from its files to the device.
        device: Where they compute.
        config: The configuration of the transformer.
        latent_channels: The channels of the codec.
        grid: The grid of codec and patches.
    """

    def __init__(
        self,
        loaders: Mapping[PartName, Callable[[], Any]],
        device: torch.device,
        config: Any,
        latent_channels: int,
        grid: LatentGrid,
    ) -> None:
        self._loaders = dict(loaders)
        self.device, self.config, self.latent_channels, self.grid = device, config, latent_channels, grid
        self._name: PartName | None = None
        self._part: Any = None

    @contextlib.contextmanager
    def use(self, name: PartName) -> Iterator[Any]:
        """The part, loaded; whichever was loaded before is freed first. It stays until another is needed."""
        if name != self._name:
            self.free()
            with torch.inference_mode(False):  # weights outlive the call that needed them first
                self._part, self._name = self._loaders[name](), name
        yield self._part

    def replace(self, name: PartName, part: Any) -> None:
        """Load a part by handing out this one from now on."""
        self._loaders[name] = lambda: part
        self.free()

    def free(self) -> None:
        """Free the part that is loaded."""
        self._part = self._name = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class BlockStream:
    """Keeps the weights of a transformer's blocks in host memory and brings each to the device for its turn.

    While a block computes, the next one's weights are copied on a stream of their own, so at most two blocks are on the
    device. Weights are never written back: they do not change.

    Args:
        blocks: The blocks in the order in which they run; their weights are on the host.
        device: Where they compute.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.blocks, self.device = list(blocks), torch.device(device)
        on_cuda = self.device.type == "cuda" and torch.cuda.is_available()
        self._copies = torch.cuda.Stream(self.device) if on_cuda else None
        self._hosts = [[(tensor, _pinned(tensor.data, on_cuda)) for tensor in _tensors(block)] for block in self.blocks]
        self._ready: dict[int, tuple[list[Tensor], Any]] = {}
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda module, inputs, index=index: self._bring(index))
            block.register_forward_hook(lambda module, inputs, output, index=index: self._drop(index))
            block.brought = lambda index=index: self._brought(index)

    @contextlib.contextmanager
    def _brought(self, index: int) -> Iterator[None]:
        self._bring(index)
        try:
            yield
        finally:
            self._drop(index)

    def _bring(self, index: int) -> None:
        if index not in self._ready:
            self._start(index)
        tensors, event = self._ready.pop(index)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        for (tensor, _), copy in zip(self._hosts[index], tensors, strict=True):
            if event is not None:
                copy.record_stream(torch.cuda.current_stream(self.device))
            tensor.data = copy
        del tensors
        following = index + 1
        if following < len(self.blocks) and following not in self._ready:
            self._start(following)

    def _start(self, index: int) -> None:
        with torch.cuda.stream(self._copies) if self._copies is not None else contextlib.nullcontext():
            copies = [torch.empty_like(host, device=self.device).copy_(host, non_blocking=True)
                      for _, host in self._hosts[index]]  # fmt: skip
            event = self._copies.record_event() if self._copies is not None else None
        self._ready[index] = copies, event

    def _drop(self, index: int) -> None:
        for tensor, host in self._hosts[index]:
            tensor.data = host


def brought(block: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A block's weights on the device, for what uses them outside its ``forward``."""
    return block.brought() if hasattr(block, "brought") else contextlib.nullcontext()


def move_all_but(module: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    """Move what is not in the blocks to a device."""
    streamed = {id(tensor) for block in blocks for tensor in _tensors(block)}
    for tensor in _tensors(module):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _pinned(tensor: Tensor, pin: bool) -> Tensor:
    return tensor.pin_memory() if pin else tensor
