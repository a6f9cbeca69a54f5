"""What computes attention on a GPU: the choice by device, the check before use, and what is on record."""

import pytest
import torch

from loomvideo.model import attention_choice
from loomvideo.model.attention import AttentionPlan, _packed, segment_attention
from loomvideo.model.attention_choice import MODULES, Device, candidates, disagreement, settle
from loomvideo.platform.errors import UserError

BF16 = torch.bfloat16
H100 = Device(90, 91000, frozenset(MODULES))
PLAIN_H100 = Device(90, 91000, frozenset())
B200 = Device(100, 91000, frozenset({"flash4"}))
A100 = Device(80, 91000, frozenset(MODULES))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(attention_choice, "_state", attention_choice._State())


@pytest.mark.parametrize(
    ("device", "deterministic", "expected"),
    [
        (H100, False, ["flash3", "flash4", "cudnn", "flash2"]),
        (PLAIN_H100, False, ["cudnn", "flash2"]),
        (B200, False, ["flash4", "cudnn", "flash2"]),
        (A100, False, ["flash2"]),
        (H100, True, ["flash3", "flash2"]),
        (PLAIN_H100, True, ["flash2"]),
    ],
)
def test_the_best_that_the_device_has_comes_first(device, deterministic, expected):
    names, _ = candidates("auto", BF16, device, deterministic)
    assert names == expected


def test_what_is_passed_over_says_why():
    _, missed = candidates("auto", BF16, PLAIN_H100, deterministic=True)
    assert missed["flash3"] == "the module flash_attn_interface is not installed"
    assert "training.deterministic=true" in missed["cudnn"]
    assert candidates("auto", BF16, Device(80, 91000, frozenset()), deterministic=False)[1] == {}
    assert "sm_90" in candidates("auto", BF16, A100, deterministic=False)[1]["flash3"]


def test_float32_takes_a_fixed_order_when_told():
    assert candidates("flash3", torch.float32, H100, deterministic=False)[0] == ["sdpa"]
    assert candidates("flash3", torch.float32, H100, deterministic=True)[0] == ["math"]


def test_what_is_asked_for_by_name_is_never_replaced():
    with pytest.raises(UserError, match=r"kernels.attention=flash3: needs a GPU of sm_90"):
        candidates("flash3", BF16, A100, deterministic=False)
    with pytest.raises(UserError, match=r"kernels.attention=fast: expected one of auto, flash3"):
        attention_choice.request_attention("fast")


def plain(query, key, value):
    return _packed("sdpa", query, key, value, attention_choice.CHECK_LENGTHS)


def noisy(query, key, value):
    return plain(query, key, value) + 1e-3 * torch.rand(())


def broken(query, key, value):
    raise RuntimeError("No available kernel.")


def asserting(q, k, v):
    raise AssertionError


@pytest.mark.parametrize(
    ("attend", "expected"),
    [
        (plain, ""),
        (lambda q, k, v: plain(q, k, 1.05 * v), "output differs"),
        (lambda q, k, v: plain(q, k, v.detach()) + 0 * v, "dv differs"),
        (noisy, "two equal passes differ"),
        (broken, "RuntimeError: No available kernel."),
        (asserting, "AssertionError: "),
    ],
)
def test_an_implementation_is_compared_with_plain_attention(attend, expected):
    assert disagreement(attend, CPU, BF16, 16, deterministic=True).startswith(expected)
    assert bool(disagreement(attend, CPU, BF16, 16, deterministic=True)) == bool(expected)


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Device, "here", classmethod(lambda cls, device: H100))
    monkeypatch.setattr(
        attention_choice, "_activate", lambda name: "ImportError: libcudart" if name == "flash3" else ""
    )


def attend(name, query, key, value, lengths):
    return broken(query, key, value) if name == "flash4" else _packed("sdpa", query, key, value, lengths)


def test_one_that_fails_gives_way_to_the_next_on_record(h100):
    settle(CPU, BF16, 16, attend)
    assert attention_choice.chosen(BF16) == "cudnn"
    assert attention_choice.report() == {
        "requested": "auto",
        "chosen": {"bfloat16": "cudnn"},
        "passed_over": {"flash3": "ImportError: libcudart", "flash4": "RuntimeError: No available kernel."},
    }


def test_one_that_fails_ends_the_job_when_it_was_asked_for(h100):
    attention_choice.request_attention("flash4")
    with pytest.raises(UserError, match=r"kernels.attention=flash4: RuntimeError: No available kernel."):
        settle(CPU, BF16, 16, attend)


def test_exact_implementations_agree_by_segment():
    tensors = [torch.randn(9, 2, 8) for _ in range(3)]
    plan = AttentionPlan.build([5, 4])
    torch.testing.assert_close(segment_attention(*tensors, plan, "math"), segment_attention(*tensors, plan, "sdpa"))


@pytest.mark.gpu
def test_everything_on_this_gpu_agrees():
    device = torch.device("cuda")
    names, _ = candidates("auto", BF16, Device.here(device), deterministic=False)
    for name in [*names, "sdpa"]:
        assert not attention_choice._activate(name)
        found = disagreement(
            lambda *tensors, name=name: _packed(name, *tensors, attention_choice.CHECK_LENGTHS), device, BF16, 128
        )
        assert not found, name
