"""Which back end computes the operations, and the check on its first call.

Nothing is chosen silently: a back end that cannot be built, or that disagrees with the definition on its first call
for a dtype and width, stops the job (``required=True``) or is replaced by ``eager``, with one warning and an entry in
:func:`report`.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace

import torch

from loomvideo.model.kernels import eager
from loomvideo.model.kernels.fused import fused_operations
from loomvideo.platform.errors import UserError

logger = logging.getLogger(__name__)

BACKENDS = ("eager", "cpp", "triton", "auto")
DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass
class _State:
    requested: str = "eager"
    required: bool = False
    by_device: dict[str, str] = field(default_factory=lambda: {"cpu": "eager", "cuda": "eager"})
    operations: dict[str, SimpleNamespace] = field(default_factory=dict)
    checked: dict[tuple, bool] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)


_state = _State()


def set_backend(name: str, required: bool = False) -> dict:
    """Choose the back end of every operation from now on.

    Args:
        name: ``eager``, ``cpp`` (CPU), ``triton`` (CUDA; on CPU only through ``TRITON_INTERPRET=1``), or ``auto``:
            cpp on CPU and triton on CUDA.
        required: Stop instead of falling back to eager when a back end cannot be built or disagrees with eager.

    Returns:
        :func:`report`.

    Raises:
        UserError: for an unknown name, or with ``required`` for a back end that cannot be used here.
    """
    global _state
    if name not in BACKENDS:
        raise UserError(f"kernels.backend={name}: expected one of {', '.join(BACKENDS)}")
    state = _State(requested=name, required=required)
    wanted = {
        "eager": {},
        "cpp": {"cpu": "cpp"},
        "triton": {"cuda": "triton", **({"cpu": "triton"} if _interpreted() else {})},
        "auto": {"cpu": "cpp", **({"cuda": "triton"} if torch.cuda.is_available() else {})},
    }[name]
    if wanted and name != "auto":
        state.by_device = {}
    for device, backend in wanted.items():
        try:
            state.operations[backend] = load_operations(backend)
            state.by_device[device] = backend
        except (UserError, ImportError, OSError) as error:
            if required:
                raise UserError(f"kernels.backend={name} cannot be used on this machine: {error}") from error
            state.by_device[device] = "eager"
            _replace(state, backend, str(error))
    _state = state
    return report()


@contextlib.contextmanager
def use_backend(name: str, required: bool = True) -> Iterator[dict]:
    """:func:`set_backend` for the body of a ``with`` statement."""
    global _state
    before = _state
    try:
        yield set_backend(name, required)
    finally:
        _state = before


def report() -> dict:
    """What is in use, for the run's record: back ends by device, checks passed, and what was replaced and why."""
    used = {
        device: backend for device, backend in _state.by_device.items() if device == "cpu" or torch.cuda.is_available()
    }
    result = {
        "requested": _state.requested,
        "required": _state.required,
        "backend": used,
        "checked": sum(_state.checked.values()),
        "replaced": dict(_state.replaced),
    }
    if "cpp" in used.values():
        from loomvideo.model.kernels import cpp

        result["cpp"] = {"isa": f"x86-64-v{cpp.isa_level()}", "origin": cpp.library().artifact.origin}
    return result


def operation(name: str, x: torch.Tensor) -> Callable:
    """The implementation of an operation for ``x``'s device and dtype, checked on its first use."""
    backend = _state.by_device.get(x.device.type)
    if backend is None:
        raise UserError(
            f"kernels.backend={_state.requested} has no kernels for {x.device.type} tensors: set kernels.backend=auto"
        )
    if backend == "eager":
        return getattr(eager, name)
    # Under torch.compile the choice is made while tracing; the check needs real tensors.
    if not torch.compiler.is_compiling():
        key = (backend, name, x.dtype, x.device.type, x.shape[-1])
        if key not in _state.checked:
            _check_first_use(key)
        if not _state.checked[key]:
            return getattr(eager, name)
    return getattr(_state.operations[backend], name)


def _check_first_use(key: tuple) -> None:
    backend, name, dtype, device, width = key
    if dtype not in DTYPES[backend]:
        raise UserError(
            f"kernels.backend={backend} has no kernels for {dtype}: use float32 or bfloat16, or kernels.backend=eager"
        )
    from loomvideo.model.kernels.selfcheck import disagreement

    _state.checked[key] = True
    reason = disagreement(getattr(_state.operations[backend], name), name, dtype, device, width)
    if reason is not None:
        message = f"{backend} {name} ({dtype}, width {width}) disagrees with eager: {reason}"
        if _state.required:
            del _state.checked[key]
            raise RuntimeError(message)
        _state.checked[key] = False
        _replace(_state, f"{backend}.{name}", message)


def _replace(state: _State, what: str, reason: str) -> None:
    logger.warning("kernels: %s is replaced by eager: %s", what, reason)
    state.replaced[what] = reason


def load_operations(backend: str) -> SimpleNamespace:
    """The operations of ``cpp`` or ``triton``, building or fetching what they need."""
    if backend == "cpp":
        from loomvideo.model.kernels import cpp

        cpp.library()
    return _registered_operations(backend)


@lru_cache(maxsize=2)
def _registered_operations(backend: str) -> SimpleNamespace:
    # Once a process: an operator's name can be registered only once.
    if backend == "cpp":
        from loomvideo.model.kernels import cpp

        return fused_operations(cpp)
    from loomvideo.model.kernels import triton_backend

    return fused_operations(triton_backend)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
