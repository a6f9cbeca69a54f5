"""Moments of optimisers that keep them otherwise than torch does, by a stand-in with bitsandbytes' layout."""

import sys
import types

import pytest
import torch

from loomvideo.platform.training.moments import BLOCK_ELEMENTS, read_moments, write_moments

CODE = torch.linspace(-1, 1, 256)


def quantize_blockwise(values, code, blocksize):
    """Blocks scaled to their largest magnitude, every element the nearest of 256 values."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(1)
    scaled = padded / absmax.clamp_min(1e-30)[:, None]
    nearest = (scaled[..., None] - code).abs().argmin(-1)
    return nearest.flatten()[: len(values)].to(torch.uint8), types.SimpleNamespace(absmax=absmax)


def dequantize_blockwise(stored, absmax, code, blocksize):
    """The reverse."""
    scale = absmax.repeat_interleave(blocksize)[: stored.numel()]
    return code[stored.flatten().long()] * scale


class EightBit(torch.optim.Optimizer):
    """Keeps state as bitsandbytes' AdamW8bit does: one byte an element beyond 4096 elements, float32 below."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    def init_state(self, group, parameter, group_index, index):
        state = self.state[parameter]
        state["step"] = 0
        for number in "12":
            if parameter.numel() < 4096:
                state[f"state{number}"] = torch.zeros_like(parameter)
                continue
            state[f"state{number}"] = torch.zeros(parameter.numel(), dtype=torch.uint8)
            state[f"qmap{number}"] = CODE
            state[f"absmax{number}"] = torch.zeros(-(-parameter.numel() // BLOCK_ELEMENTS))


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch):
    functional = types.ModuleType("bitsandbytes.functional")
    functional.quantize_blockwise, functional.dequantize_blockwise = quantize_blockwise, dequantize_blockwise
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)


@pytest.mark.parametrize("num_elements", [1000, 5000])
def test_eight_bit_moments_survive_a_checkpoint(num_elements):
    master = torch.zeros(num_elements)
    moments = {name: torch.rand(num_elements) for name in ("exp_avg", "exp_avg_sq")}
    optimizer = EightBit([master])
    assert read_moments(optimizer.state[master]) == {}
    write_moments(optimizer, 0, master, dict(moments), 7)
    assert optimizer.state[master]["step"] == 7
    saved = {name: value.clone() for name, value in read_moments(optimizer.state[master]).items()}
    for name, value in moments.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0 if num_elements < 4096 else 1 / 250)
    again = EightBit([master])
    write_moments(again, 0, master, dict(saved), 7)
    for name, value in optimizer.state[master].items():
        assert name == "step" or torch.equal(value, again.state[master][name])


def test_moments_of_torch_are_views():
    master = torch.zeros(10)
    optimizer = torch.optim.AdamW([master], fused=True)
    moments = {name: torch.rand(10) for name in ("exp_avg", "exp_avg_sq")}
    write_moments(optimizer, 0, master, moments, 3)
    assert read_moments(optimizer.state[master])["exp_avg"].data_ptr() == moments["exp_avg"].data_ptr()
    master.grad = torch.ones(10)
    optimizer.step()
    assert optimizer.state[master]["step"] == 4
