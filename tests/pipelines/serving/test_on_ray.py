"""The page on Ray Serve: progress, errors and cancelling through real replicas."""

import os
import socket
import time

import httpx2
import pytest

from loomvideo.pipelines.serving.app import PageConfig
from loomvideo.pipelines.serving.jobs import Result
from loomvideo.platform.errors import UserError

pytestmark = pytest.mark.slow
# Read when Ray starts: a busy machine takes longer than Serve's 5 s to start its proxy.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")


class SlowGenerator:
    """Steps of 50 ms: ten, a thousand for "long", 240 for "a while"; counts the requests it finished."""

    def __init__(self):
        self.finished = 0

    def generate(self, request, on_step):
        if request.prompt == "fail":
            raise UserError("width 33 is no multiple of 32")
        steps = {"long": 1000, "a while": 240}.get(request.prompt, 10)
        for step in range(steps):
            time.sleep(0.05)
            on_step(step + 1, steps)
        self.finished += 1
        return Result(f"{request.prompt} {self.finished}".encode(), "image/png")


@pytest.fixture(scope="module")
def client(ray_cluster, tmp_path_factory):
    from ray import serve

    from loomvideo.pipelines.serving.deployment import APPLICATION, ReplicaConfig, build_application

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    page = PageConfig(store=str(tmp_path_factory.mktemp("store") / "jobs.sqlite"), stop_s=60.0)
    application = build_application(SlowGenerator, page, ReplicaConfig())
    serve.run(application, name=APPLICATION, route_prefix="/")
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        client.store = page.store
        yield client
    serve.shutdown()


def follow(client, prompt, until=("done", "failed")):
    job = client.post("/api/jobs", json={"task": "t2i", "prompt": prompt}).json()
    seen = [job]
    end = time.monotonic() + 60
    while job["status"] not in until:
        assert time.monotonic() < end
        time.sleep(0.05)
        job = client.get(f"/api/jobs/{job['id']}").json()
        seen.append(job)
    return seen


def test_progress_result_and_errors(client):
    seen = follow(client, "a coat")
    assert {job["step"] for job in seen} & set(range(1, 10))
    assert seen[-1]["steps"] == 10
    assert client.get(f"/api/jobs/{seen[-1]['id']}/result").content == b"a coat 1"
    assert follow(client, "fail")[-1]["error"] == "width 33 is no multiple of 32"
    health = client.get("/health")
    assert (health.status_code, health.json()["generators"]) == (200, 1)
    assert "<title>LoomVideo</title>" in client.get("/").text
    assert 'status="done",task="t2i"} 1.0' in client.get("/metrics").text


def test_one_at_a_time_and_cancel(client):
    running = follow(client, "long", until=("running",))[-1]
    waiting = client.post("/api/jobs", json={"task": "t2i", "prompt": "second"}).json()
    assert client.get(f"/api/jobs/{waiting['id']}").json()["status"] == "queued"
    client.delete(f"/api/jobs/{running['id']}")
    assert client.get(f"/api/jobs/{running['id']}").status_code == 404
    end = time.monotonic() + 60
    while client.get(f"/api/jobs/{waiting['id']}").json()["status"] != "done":
        assert time.monotonic() < end
        time.sleep(0.05)
    result = client.get(f"/api/jobs/{waiting['id']}/result").content.decode()
    # The cancelled generation stopped at a step: it is not among the finished ones.
    assert result == "second 2"


def test_replaced_in_place_it_ends_what_it_makes(client):
    """A new version of page and generator: the old ones make the running one, the new ones what comes later."""
    from ray import serve

    from loomvideo.pipelines.serving.deployment import APPLICATION, ReplicaConfig, build_application

    running = follow(client, "a while", until=("running",))[-1]
    page = PageConfig(title="the next", store=client.store, stop_s=60.0)
    serve.run(build_application(SlowGenerator, page, ReplicaConfig()), name=APPLICATION, route_prefix="/")
    assert client.get("/api/options").json()["title"] == "the next"
    state = client.get(f"/api/jobs/{running['id']}").json()
    assert (state["status"], state["steps"]) == ("done", 240)
    # The old generator's count: it had finished two before.
    assert client.get(f"/api/jobs/{running['id']}/result").content.decode() == "a while 3"
    assert follow(client, "a coat")[-1]["status"] == "done"


def test_told_to_stop_it_lets_the_running_end(client):
    """Last: the page takes no more afterwards."""
    from loomvideo.pipelines.serving.deployment import drain

    running = follow(client, "a coat", until=("running",))[-1]
    assert drain(30.0) == 0
    assert client.get(f"/api/jobs/{running['id']}").json()["status"] == "done"
    assert client.post("/api/jobs", json={"task": "t2i", "prompt": "x"}).status_code == 503
