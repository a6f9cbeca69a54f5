"""Which implementation computes attention on a CUDA device: the fastest that is there, checked, and on record.

FlashAttention 3 (``flash_attn_interface``) and 4 (``flash_attn.cute``) are used where they are installed and the GPU is
of their kind, through torch's own switch; else cuDNN's for long segments on Hopper and later, and torch's built-in
FlashAttention 2 for the rest. Each is compared with plain attention in float32, forward and backward, before the first
step that would use it. What is passed over, and why, is in :func:`report`.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, restore_flash_attention_impl

from loomvideo.platform.errors import UserError

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("flash3", "flash4", "cudnn", "flash2", "sdpa", "math")
"""In order of preference. ``sdpa`` is torch's choice a segment, ``math`` plain matrix products."""
CHOICES = ("auto", *IMPLEMENTATIONS)
MODULES = {"flash3": "flash_attn_interface", "flash4": "flash_attn.cute.interface"}
"""What torch imports for an implementation that does not come with it."""
REPEATABLE = ("flash3", "flash2", "math")
"""Those whose backward pass has a fixed order of sums when torch is told to be deterministic."""
HALF = (torch.bfloat16, torch.float16)
CHECK_LENGTHS = (1100, 130, 1)
TOLERANCE = 2e-2
"""Relative to the largest value: bf16 keeps 8 bits, and a gradient is a sum of about a thousand products."""


@dataclass(frozen=True)
class Device:
    """What decides which implementations a device can run.

    Attributes:
        capability: Compute capability as 90 for sm_90.
        cudnn: cuDNN's version as 90100 for 9.1; 0 for none.
        modules: The names in :data:`MODULES` that can be imported.
    """

    capability: int
    cudnn: int
    modules: frozenset[str]

    @classmethod
    def here(cls, device: torch.device) -> "Device":
        """The facts of a CUDA device of this process."""
        major, minor = torch.cuda.get_device_capability(device)
        modules = frozenset(name for name, module in MODULES.items() if _is_installed(module))
        return cls(10 * major + minor, torch.backends.cudnn.version() or 0, modules)


@dataclass
class _State:
    requested: str = "auto"
    chosen: dict[torch.dtype, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)


_state = _State()


def request_attention(name: str) -> None:
    """Choose ``auto`` or one implementation for half precision on CUDA from now on.

    Nothing is tried yet, as this process may never compute on a GPU; :func:`settle` does so at the first step.

    Raises:
        UserError: for an unknown name.
    """
    global _state
    if name not in CHOICES:
        raise UserError(f"kernels.attention={name}: expected one of {', '.join(CHOICES)}")
    if name != _state.requested:
        _state = _State(requested=name)


def report() -> dict[str, Any]:
    """For the run's record: what was requested, what computes each dtype on CUDA, what was passed over and why."""
    return {
        "requested": _state.requested,
        "chosen": {str(dtype).removeprefix("torch."): name for dtype, name in _state.chosen.items()},
        "passed_over": dict(_state.passed_over),
    }


def chosen(dtype: torch.dtype) -> str:
    """What computes CUDA tensors of a dtype; torch's own until :func:`settle`."""
    return _state.chosen.get(dtype, "flash2" if dtype in HALF else "sdpa")


def candidates(requested: str, dtype: torch.dtype, device: Device, deterministic: bool) -> tuple[list[str], dict]:
    """Implementations to try, best first, and those passed over with the reason.

    Raises:
        UserError: if a requested one cannot be used.
    """
    if dtype not in HALF:
        # Flash and cuDNN attention know half precision alone; torch's own for float32 repeats itself in no fixed order.
        return (["math"] if deterministic else ["sdpa"]), {}
    obstacles = {name: _obstacle(name, device, deterministic) for name in IMPLEMENTATIONS}
    if requested != "auto":
        if obstacles[requested]:
            raise _refused(requested, obstacles[requested])
        return [requested], {}
    # A faster kind that this GPU could run is worth a word; that an A100 has no FlashAttention 3 is not.
    missed = {
        name: why for name, why in obstacles.items() if why and (name in device.modules or _could_run(name, device))
    }
    return [name for name in ("flash3", "flash4", "cudnn", "flash2") if not obstacles[name]], missed


def settle(device: torch.device, dtype: torch.dtype, head_dim: int, attend: Callable[..., Tensor]) -> None:
    """Choose once a dtype, when a CUDA device is about to compute: try, check, record.

    Args:
        device: The tensors'.
        dtype: The tensors'.
        head_dim: The model's.
        attend: ``attend(name, query, key, value, lengths)`` computes packed attention by an implementation.

    Raises:
        UserError: if a requested implementation cannot be used or disagrees with plain attention.
    """
    if dtype in _state.chosen or not torch.cuda.is_available():
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    names, passed_over = candidates(_state.requested, dtype, Device.here(device), deterministic)
    _state.passed_over |= passed_over
    for name in names:
        problem = _activate(name) or disagreement(
            lambda *tensors, name=name: attend(name, *tensors, CHECK_LENGTHS), device, dtype, head_dim, deterministic
        )
        if not problem:
            _state.chosen[dtype] = name
            logger.info("attention of %s on %s: %s", dtype, device, name)
            return
        if _state.requested != "auto":
            raise _refused(name, problem)
        logger.warning("attention: %s is passed over: %s", name, problem)
        _state.passed_over[name] = problem
    why = "; ".join(f"{name}: {reason}" for name, reason in _state.passed_over.items())
    raise UserError(f"kernels.attention=auto: nothing on this device computes attention of {dtype} rightly ({why})")


def disagreement(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool = False,
) -> str:
    """Compare packed attention with plain attention in float32, forward and backward.

    Args:
        attend: Computes self-attention of segments of :data:`CHECK_LENGTHS` tokens.
        device, dtype, head_dim: What the tensors have.
        deterministic: Also compute twice and compare bit by bit.

    Returns:
        What is wrong; empty when nothing is.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (sum(CHECK_LENGTHS), 2, head_dim)
    inputs = [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for _ in range(3)]
    upstream = torch.randn(shape, generator=generator, device=device).to(dtype)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        expected = _plain(*exact)
        wanted = [expected, *torch.autograd.grad(expected, exact, upstream.float())]
        try:
            found = _with_gradients(attend, inputs, upstream)
            again = _with_gradients(attend, inputs, upstream) if deterministic else found
        except (RuntimeError, ImportError, NotImplementedError, AssertionError) as error:
            first_line = str(error).partition("\n")[0]  # empty for a bare assertion
            return f"{type(error).__name__}: {first_line[:200]}"
    for what, one, other in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        error = float((one.detach().float() - other.detach()).abs().max() / other.detach().abs().max())
        if not error < TOLERANCE:
            return f"{what} differs from plain attention by {error:.1%}"
    if any(not torch.equal(one, other) for one, other in zip(found, again, strict=True)):
        return "two equal passes differ, and training.deterministic=true wants them equal"
    return ""


def _refused(name: str, why: str) -> UserError:
    return UserError(f"kernels.attention={name}: {why}; set kernels.attention=auto for what can be used")


def _with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    output = attend(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = []
    for q, k, v in zip(*(tensor.split(CHECK_LENGTHS) for tensor in (query, key, value)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(parts)


def _obstacle(name: str, device: Device, deterministic: bool) -> str:
    """Why an implementation cannot be used; empty when it can."""
    if not _could_run(name, device):
        kinds = {"flash3": "sm_90 (Hopper)", "flash4": "sm_90 or sm_100", "cudnn": "sm_90 or later"}
        return f"needs a GPU of {kinds[name]}, and this is sm_{device.capability}"
    if name in MODULES and name not in device.modules:
        return f"the module {MODULES[name]} is not installed"
    if name == "cudnn" and device.cudnn < 90000:
        return f"needs cuDNN 9, and this is {device.cudnn}"
    if deterministic and name not in REPEATABLE:
        return "its sums have no fixed order, and training.deterministic=true wants one"
    return ""


def _could_run(name: str, device: Device) -> bool:
    if name == "flash3":
        return 90 <= device.capability < 100
    if name == "flash4":
        return 90 <= device.capability < 110
    return name != "cudnn" or device.capability >= 90


def _activate(name: str) -> str:
    """Switch torch's flash attention to an implementation; returns why it cannot be."""
    wanted = {"flash3": "FA3", "flash4": "FA4"}.get(name)
    if wanted == current_flash_attention_impl():
        return ""
    if wanted is None:
        restore_flash_attention_impl()
        return ""
    try:
        activate_flash_attention_impl(wanted)
    except (ImportError, RuntimeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _is_installed(module: str) -> bool:
    parent = module.partition(".")[0]
    # A parent package may be there without the part that is asked for.
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None
