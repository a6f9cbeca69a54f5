"""Peak memory of tensors alive at once, counted from the operators: works on CPU, CUDA and meta tensors alike."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakLiveBytes(TorchDispatchMode):
    """While active, ``live`` counts the bytes of storages made inside it and still alive, ``peak`` their maximum.

    Weights and inputs that exist before, and workspaces inside an operator, are not counted.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._references: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operator and count the storages of its results."""
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._references:
                self._known.add(tensor.untyped_storage()._cdata)
        result = function(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if key not in self._references:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._references[key] = self._references.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, storage.nbytes())

    def _release(self, key: int, num_bytes: int) -> None:
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self.live -= num_bytes
