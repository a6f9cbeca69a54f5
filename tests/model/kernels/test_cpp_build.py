"""Building the C++ library: wrong processors, broken compilers, and the time a warm start takes."""

import subprocess
import sys

import pytest

from loomvideo.model.kernels import cpp, cpp_build
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.artifacts import ArtifactStore

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")


def test_a_library_for_another_processor_is_refused_and_replaced(tmp_path):
    store = ArtifactStore(tmp_path)
    path = cpp.prepare(store).path / cpp_build.LIBRARY
    code = bytearray(path.read_bytes())
    code[18:20] = (183).to_bytes(2, "little")  # aarch64
    path.write_bytes(code)
    with pytest.raises(ValueError, match="is for ELF machine 183"):
        cpp_build.check(path.parent)
    again = cpp.prepare(store)
    assert again.origin == "built"
    cpp_build.check(again.path)


def test_a_compiler_error_is_one_line(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    script = ["#!/bin/sh", '[ "$1" = --version ] && echo broken 1.0 && exit', "echo 'x.cpp:1: error: no' >&2", "exit 1"]
    broken.write_text("\n".join(script))
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert cpp_build.compiler_identity() == "broken 1.0"
    with pytest.raises(UserError, match=r"compiling the kernels with .*broken failed: x.cpp:1: error: no"):
        cpp.prepare(ArtifactStore(tmp_path / "cache"))


def test_a_warm_start_only_loads(tmp_path):
    cpp.prepare(ArtifactStore(tmp_path))
    script = "from loomvideo.model import kernels;print(kernels.set_backend('cpp', required=True)['cpp']['origin'])"
    environment = {"LOOMVIDEO_KERNEL_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["cache"]
