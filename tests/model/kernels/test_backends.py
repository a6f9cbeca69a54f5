"""Choosing a back end: by name and device, never silently."""

import logging
from types import SimpleNamespace

import pytest
import torch

from loomvideo.model import kernels
from loomvideo.model.kernels import backends, cpp, cpp_build, eager
from loomvideo.platform.errors import UserError

X = torch.randn(4, 24)
ROWS = torch.zeros(4, dtype=torch.int32)
GATE = torch.randn(1, 24)
needs_compiler = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def restored():
    with kernels.use_backend("eager"):
        yield


def test_eager_until_another_is_chosen():
    assert kernels.report()["backend"]["cpu"] == "eager"
    with pytest.raises(UserError, match=r"kernels.backend=cuda: expected one of eager, cpp, triton, auto"):
        kernels.set_backend("cuda")


@needs_compiler
def test_first_use_is_checked_once_and_reported():
    with kernels.use_backend("auto"):
        kernels.gated_residual(X, X, GATE, ROWS)
        kernels.gated_residual(X, X, GATE, ROWS)
        assert kernels.report()["checked"] == 1
        assert kernels.report()["backend"]["cpu"] == "cpp"
        assert kernels.report()["cpp"]["isa"].startswith("x86-64-v")
    assert kernels.report()["requested"] == "eager"


@pytest.fixture
def wrong_operations(monkeypatch):
    """A back end whose gradient is wrong, its forward right."""

    def gated_residual(x, y, gate, row_ids):
        return eager.gated_residual(x, y.detach() * 0.5 + y * 0.5, gate, row_ids)

    monkeypatch.setattr(backends, "load_operations", lambda name: SimpleNamespace(gated_residual=gated_residual))


@needs_compiler
def test_a_wrong_gradient_stops_the_job_when_the_back_end_is_required(wrong_operations):
    kernels.set_backend("cpp", required=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cpp gated_residual .* disagrees with eager: value 2 .* error 5.0e-01"):
            kernels.gated_residual(X, X, GATE, ROWS)


def test_a_wrong_gradient_is_replaced_by_eager_with_one_warning_when_it_is_not(wrong_operations, monkeypatch, caplog):
    monkeypatch.setattr(backends, "report", lambda: {})
    kernels.set_backend("cpp", required=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = kernels.gated_residual(X, X, GATE, ROWS)
    assert torch.equal(out, eager.gated_residual(X, X, GATE, ROWS))
    assert len(caplog.records) == 1
    assert "disagrees with eager" in backends._state.replaced["cpp.gated_residual"]


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LOOMVIDEO_KERNEL_CACHE", str(tmp_path / "cache"))
    cpp.library.cache_clear()
    yield
    cpp.library.cache_clear()


def test_without_a_compiler_a_required_back_end_names_the_fix(no_compiler):
    with pytest.raises(UserError, match=r"kernels.backend=cpp cannot .*no C\+\+ compiler.*install g\+\+"):
        kernels.set_backend("cpp", required=True)


def test_without_a_compiler_an_optional_back_end_is_replaced_and_recorded(no_compiler, caplog):
    with caplog.at_level(logging.WARNING):
        report = kernels.set_backend("auto")
    assert report["backend"]["cpu"] == "eager"
    assert "no C++ compiler" in report["replaced"]["cpp"]
    assert len(caplog.records) == 1
    assert torch.equal(kernels.gated_residual(X, X, GATE, ROWS), eager.gated_residual(X, X, GATE, ROWS))


@needs_compiler
def test_dtypes_and_devices_without_kernels_are_errors_not_fallbacks():
    with kernels.use_backend("cpp"):
        with pytest.raises(UserError, match=r"no kernels for torch.float16"):
            kernels.gated_residual(X.half(), X.half(), GATE, ROWS)
        with pytest.raises(UserError, match=r"no kernels for meta tensors"):
            kernels.rms_norm(X.to("meta"), GATE[0].to("meta"), 1e-6)
