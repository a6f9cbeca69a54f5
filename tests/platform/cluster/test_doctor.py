"""The doctor: each check finds its problem, nodes are compared, and a whole cluster is examined through its token."""

import http.server
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from loomvideo.platform.cluster import doctor, node_checks
from loomvideo.platform.cluster.doctor import Diagnosis, preflight
from loomvideo.platform.cluster.node_checks import Check
from loomvideo.platform.errors import UserError


def disk_of(mib, monkeypatch):
    usage = SimpleNamespace(total=mib * 1024**2, free=mib * 1024**2)
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda path: usage)


def test_default_shared_memory_of_a_container_fails(monkeypatch):
    disk_of(64, monkeypatch)
    assert node_checks.shared_memory().status == "fail"
    assert "shared_memory_gib" in node_checks.shared_memory().detail
    disk_of(4096, monkeypatch)
    assert node_checks.shared_memory().status == "ok"


def test_full_disk_fails(monkeypatch):
    disk_of(1024, monkeypatch)
    check = node_checks.disk()
    assert (check.status, check.detail.split(" free")[0]) == ("fail", "1.0 GiB")
    disk_of(100 * 1024, monkeypatch)
    assert node_checks.disk().status == "ok"


def test_missing_compiler_is_a_warning(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert node_checks.compiler().status == "warn"


@pytest.mark.parametrize(
    ("version", "cuda", "made_for", "has_gpu", "triton", "status", "words"),
    [
        ("2.13.0+cpu", None, "cpu", False, None, "ok", "cpu: torch 2.13.0+cpu, a CPU build"),
        ("2.13.0", "13.0", "cuda", True, "3.7.1", "ok", "cuda: torch 2.13.0, built for CUDA 13.0"),
        ("2.13.0", "13.0", "cpu", False, "3.7.1", "ok", "cpu: torch 2.13.0, built for CUDA 13.0"),
        ("2.13.0+cpu", None, "cpu", True, None, "warn", "there is a GPU: make setup ACCELERATOR=cuda"),
        ("2.13.0", "13.0", "cuda", False, "3.7.1", "warn", "nvidia-smi lists no GPU"),
        ("2.13.0", "13.0", "cuda", True, "3.9.0", "warn", "Triton 3.9.0 is installed"),
    ],
)
def test_accelerator_says_what_it_is_and_warns(
    monkeypatch, tmp_path, version, cuda, made_for, has_gpu, triton, status, words
):
    import torch

    (tmp_path / ".accelerator").write_text(made_for + "\n")
    monkeypatch.setattr(node_checks.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(node_checks, "_triton_of_torch", lambda: "3.7.1" if cuda else None)
    monkeypatch.setattr(node_checks, "_installed", lambda package: triton)
    monkeypatch.setattr(node_checks.shutil, "which", lambda name: name if has_gpu else None)
    monkeypatch.setattr(node_checks, "_run", lambda command: "GPU 0: NVIDIA H100")
    check = node_checks.accelerator()
    assert check.status == status
    assert words in check.detail


def test_storage_is_written_read_and_cleaned(tmp_path):
    assert node_checks.shared_storage(str(tmp_path / "runs")).status == "ok"
    assert list((tmp_path / "runs").iterdir()) == []


def test_unwritable_storage_is_a_finding_not_a_crash(tmp_path):
    (tmp_path / "file").write_text("")

    def storage():
        return node_checks.shared_storage(str(tmp_path / "file" / "runs"))

    (result,) = node_checks.run_probes([storage])
    assert (result["name"], result["status"]) == ("storage", "fail")
    assert "Error" in result["detail"]


@pytest.fixture
def server():
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"experiments": []}).encode()
            authorised = "Authorization" in self.headers
            code = answers.get(self.path.partition("?")[0], answers["default"])
            self.send_response(200 if authorised and code == 401 else code)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", answers
        running.shutdown()


@pytest.mark.parametrize(
    ("health", "default", "status", "said"),
    [
        (200, 200, "warn", "answers without a user"),
        (200, 401, "ok", "refuses anonymous requests (401)"),
        (403, 200, "fail", "extend --allowed-hosts"),
    ],
)
def test_tracking_server(server, monkeypatch, health, default, status, said):
    url, answers = server
    answers |= {"/health": health, "default": default}
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "password")
    check = node_checks.tracking(url)
    assert check.status == status
    assert said in check.detail


@pytest.mark.parametrize(("code", "status"), [(200, "fail"), (401, "ok"), (403, "ok")])
def test_dashboard_that_answers_strangers_fails(server, code, status):
    url, answers = server
    answers["default"] = code
    assert doctor._guarded(url).status == status


def test_unequal_nodes_are_found():
    rows = [(n, Check("versions", "ok", v, value=v)) for n, v in (("a", "ray 1"), ("b", "ray 1"), ("c", "ray 2"))]
    (check,) = doctor._compare(rows)
    assert (check.name, check.status, check.detail) == ("same versions", "fail", "ray 1 | ray 2")
    assert doctor._compare(rows[:2]) == []


def test_reason_of_an_unexamined_node():
    assert doctor._failure(TimeoutError(), 60) == "no answer within 60 s"
    remote = RuntimeError("ray::_examine_node() (pid=1)\n  File ...\nModuleNotFoundError: No module named 'loomvideo'")
    assert doctor._failure(remote, 60) == "ModuleNotFoundError: No module named 'loomvideo'"


def test_preflight_stops_before_the_job():
    rows = (("n1", Check("disk", "fail", "full")), ("n2", Check("gpu", "ok", "none")), ("n2", Check("x", "fail", "y")))
    with pytest.raises(UserError, match="doctor: n1: disk: full and 1 more"):
        preflight(lambda: Diagnosis(rows, 1.0))
    assert preflight(lambda: Diagnosis(rows[1:2], 1.0)).failed == []


@pytest.mark.slow
def test_whole_cluster_is_examined(token_cluster, tmp_path):
    variables = token_cluster.variables() | {"RAY_ADDRESS": token_cluster.gcs_address}
    out = tmp_path / "doctor.json"
    command = [sys.executable, "-m", "loomvideo.jobs.cli", "doctor", "--cluster", "--timeout", "300"]
    command += ["--storage", str(tmp_path / "runs")]
    result = subprocess.run([*command, "--output", str(out)], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())
    by_node = {}
    for check in found["checks"]:
        by_node.setdefault(check["node"], {})[check["check"]] = check["status"]
    cluster = by_node.pop("cluster")
    assert cluster["dashboard"] == "ok"
    assert len(by_node) == 2
    for checks in by_node.values():
        assert {"versions", "abi", "gpu", "disk", "storage", "clock", "kernels"} <= checks.keys()


DRAIN = """
import os, time
import ray
from loomvideo.platform.cluster.drain import drain
ray.init(address="auto", log_to_driver=False)
node = next(n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU"))
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Pin
@ray.remote
def work():
    return "ran"
assert ray.get(work.options(scheduling_strategy=Pin(node["NodeID"], soft=False)).remote(), timeout=60) == "ran"
drain(node["NodeID"], ray.get_runtime_context().gcs_address, 60)
try:
    ray.get(work.options(scheduling_strategy=Pin(node["NodeID"], soft=False)).remote(), timeout=20)
except (ray.exceptions.TaskUnschedulableError, ray.exceptions.GetTimeoutError) as error:
    print("refused", type(error).__name__)
"""


@pytest.mark.slow
def test_drained_node_takes_no_new_work(token_cluster):
    token_cluster.start_worker("doomed", num_cpus=1)
    variables = token_cluster.variables() | {"RAY_ADDRESS": token_cluster.gcs_address}
    result = subprocess.run([sys.executable, "-c", DRAIN], env=variables, capture_output=True, text=True, timeout=120)
    assert "refused" in result.stdout, result.stdout + result.stderr


def test_a_slow_network_fails_with_what_was_wanted():
    assert doctor.judge_bandwidth("all-reduce train", 8, "nccl", 41.0, 20.0).status == "ok"
    assert doctor.judge_bandwidth("all-reduce train", 8, "gloo", 0.2, 0.0).status == "ok"
    slow = doctor.judge_bandwidth("all-reduce train", 8, "nccl", 1.1, 20.0)
    assert slow.status == "fail"
    assert "1.10 GB/s, and min_bus_gb_per_s is 20" in slow.detail
