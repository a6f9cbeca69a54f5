"""The Triton kernels without a GPU: right by the interpreter, and compiled for every architecture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_kernel_is_right_in_the_interpreter():
    script = Path(__file__).with_name("triton_interpreter_cases.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    cases = json.loads(result.stdout.splitlines()[-1])
    assert len(cases) > 20
    assert {name: error for name, error in cases.items() if error is not None} == {}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_every_kernel_compiles_for_every_architecture(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from loomvideo.model.kernels import triton_compile

    compiled = triton_compile.compile_kernels(architecture, dim=256, num_heads=2, dtype=torch.bfloat16)
    assert len({kernel.name for kernel in compiled}) == 8
    for kernel in compiled:
        assert kernel.metadata.target.arch == architecture
        assert kernel.asm["cubin"][:4] == b"\x7fELF"
    assert os.listdir(tmp_path)


@pytest.mark.gpu
def test_every_operation_agrees_with_eager_on_the_gpu():
    from loomvideo.model import kernels
    from loomvideo.model.kernels import eager
    from loomvideo.model.kernels.selfcheck import TOLERANCE, relative_error, results_and_gradients, training_calls

    with kernels.use_backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            for name, arguments, keywords in training_calls(3072, 24, dtype, "cuda", tokens=1000):
                values = results_and_gradients(getattr(kernels, name), arguments, keywords)
                references = results_and_gradients(getattr(eager, name), arguments, keywords)
                for value, reference in zip(values, references, strict=True):
                    assert relative_error(value, reference) <= TOLERANCE[dtype], name
