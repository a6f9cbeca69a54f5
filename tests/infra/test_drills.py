"""Parts of the rehearsals that need no cluster; the rehearsals themselves are ``make drill``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import requests

sys.path.insert(0, str(Path(__file__).parents[2] / "infra" / "drills"))


@pytest.fixture
def store():
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    from faulty_store import FaultyStore

    running = FaultyStore("127.0.0.1")
    yield running
    running.stop()


def test_faulty_store_answers_errors_at_its_rate_and_works_otherwise(store):
    url = store.environment()["AWS_ENDPOINT_URL"] + "/rehearsal/a"
    assert requests.put(url, data=b"1", timeout=10).status_code == 200
    store.error_rate = 1.0
    answer = requests.put(url, data=b"2", timeout=10)
    assert (answer.status_code, "InternalError" in answer.text) == (500, True)
    assert store.read("a") == "1"
    store.error_rate = 0.5
    failed = [requests.get(url, timeout=10).status_code == 500 for _ in range(20)]
    assert set(failed) == {True, False}
    assert (store.requests, store.errors) == (22, 1 + sum(failed))


def test_nodes_have_the_dependencies_and_not_the_code(tmp_path):
    pytest.importorskip("moto.server")
    from rehearsal import nodes_python

    python = nodes_python(tmp_path / "venv")
    code = "import ray, torch, importlib.util as u; print(u.find_spec('loomvideo.jobs.cli'))"
    result = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "None" or "No module named 'loomvideo'" in result.stderr


def test_results_are_kept_in_order_and_replaced_by_newer_ones(tmp_path):
    pytest.importorskip("moto.server")
    from drill import keep

    result = {"what": "w", "passed": False, "seconds": 1.0, "outcome": "o"}
    for name in ("head", "data"):
        keep(tmp_path, result | {"drill": name})
    keep(tmp_path, result | {"drill": "head", "passed": True})
    kept = json.loads((tmp_path / "drills.json").read_text())
    assert [(entry["drill"], entry["passed"]) for entry in kept] == [("data", False), ("head", True)]
    assert "| head | w | yes | 1 | o |" in (tmp_path / "drills.md").read_text()
