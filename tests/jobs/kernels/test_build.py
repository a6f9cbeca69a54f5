"""Kernels of a job: every node once, later nodes too, ranks only load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loomvideo.jobs.kernels.build import summary
from loomvideo.model import kernels
from loomvideo.model.kernels import cpp, cpp_build
from loomvideo.model.kernels.node import prepare_this_node, use_kernels
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.config import KernelConfig
from loomvideo.platform.nodes.jit_caches import SUBFOLDERS

needs_compiler = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    for variable in SUBFOLDERS:
        monkeypatch.setenv(variable, "")
    for variable in ("SHARED", "PREBUILT", "LOCK_TIMEOUT_S"):
        monkeypatch.setenv(f"LOOMVIDEO_KERNEL_{variable}", "")
    monkeypatch.setenv("LOOMVIDEO_KERNEL_CACHE", str(tmp_path / "cache"))
    cpp.library.cache_clear()
    yield
    cpp.library.cache_clear()


@needs_compiler
def test_a_node_is_prepared_once_and_a_rank_only_loads(tmp_path):
    config = KernelConfig(backend="cpp")
    first, second = prepare_this_node(config), prepare_this_node(config)
    assert first["artifacts"]["cpp"]["origin"] == "built"
    assert second["artifacts"]["cpp"]["origin"] == "cache"
    assert second["seconds"] < 1
    assert first["jit_caches"]["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "jit" / "triton")
    with kernels.use_backend("eager"):
        assert use_kernels(config)["cpp"]["origin"] == "cache"
    record = {"n1": first, "n2": second, "n3": {"error": "gone", "seconds": 2.0}}
    numbers = summary(record)
    assert (numbers["kernels/nodes"], numbers["kernels/built"], numbers["kernels/cached"]) == (3, 1, 1)
    assert numbers["kernels/missing"] == 1


def test_a_missing_compiler_stops_a_required_job_and_is_recorded_otherwise(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = KernelConfig(backend="cpp", required=True)
    with pytest.raises(UserError, match=r"no C\+\+ compiler on this node"):
        prepare_this_node(config)
    config.required = False
    assert "no C++ compiler" in prepare_this_node(config)["missing"]["cpp"]
    with kernels.use_backend("eager"):
        assert use_kernels(config)["backend"]["cpu"] == "eager"


@needs_compiler
@pytest.mark.slow
def test_two_nodes_build_once_each_and_a_third_when_it_joins(tmp_path):
    script = Path(__file__).with_name("two_nodes_script.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout.splitlines()[-1])
    origins = {
        when: [node["artifacts"]["cpp"]["origin"] for node in outcome[when].values()]
        for when in ("first", "all", "again")
    }
    assert origins == {"first": ["built"] * 2, "all": ["built"] * 3, "again": ["cache"] * 3}
    assert all(len(names) == 1 for names in outcome["built"].values())
    assert [rank["cpp"]["origin"] for rank in outcome["ranks"]] == ["cache"] * 2
    assert outcome["summary"]["kernels/slowest_node_s"] < 1
