"""``loomvideo kernels``: what a user sees."""

import pytest
import torch
from typer.testing import CliRunner

from loomvideo.jobs.kernels.commands import app
from loomvideo.model import kernels
from loomvideo.model.kernels import cpp, cpp_build
from loomvideo.platform.errors import UserError

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    for variable in ("CACHE", "SHARED", "PREBUILT", "LOCK_TIMEOUT_S"):
        monkeypatch.setenv(f"LOOMVIDEO_KERNEL_{variable}", "")
    monkeypatch.setenv("LOOMVIDEO_KERNEL_CACHE", str(tmp_path / "cache"))
    cpp.library.cache_clear()
    with kernels.use_backend("eager"):
        yield
    cpp.library.cache_clear()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_build_status_clear(tmp_path):
    shared = f"kernels.shared_store={tmp_path / 'shared'}"
    assert "built" in run("build", shared)
    assert "cache" in run("build")
    status = run("status")
    assert "cpu: cpp" in status
    assert "glibc" in status
    assert "removed 1 artefacts" in run("clear")
    assert "shared" in run("build", shared)
    assert len(list((tmp_path / "shared").glob("*.tar"))) == 1


def test_bench_prints_a_line_for_each_operation_and_phase():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = run("bench", "tokens=8", "model=tiny", "dtypes=[float32]", "repeats=1")
    torch.set_num_threads(threads)
    lines = output.splitlines()
    assert len(lines) == 2 + 6 * 2
    assert sum("qk_norm_rope" in line for line in lines) == 2


def test_mistakes_name_the_key():
    with pytest.raises(UserError, match="nodes=some: expected this or all"):
        run("build", "nodes=some")
    with pytest.raises(UserError, match=r"unknown key kernels.cache; did you mean kernels.cache_dir"):
        run("status", "kernels.cache=x")
