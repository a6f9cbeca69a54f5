"""The configuration of a RayService on Ray Serve, as KubeRay sends it: deployed, asked, changed under requests."""

import io
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import yaml
from PIL import Image

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.serving.client import Client
from loomvideo.platform.cluster.profile import load_profile
from loomvideo.platform.cluster.service import ray_service

pytestmark = pytest.mark.slow
PRODUCTION = Path(__file__).parents[3] / "infra" / "profiles" / "production.yaml"
# Read when Ray starts: a busy machine takes longer than Serve's 5 s to start its proxy.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")


def serve_config(folder, title):
    """``serveConfigV2`` of the production profile, with the tiny model."""
    profile = load_profile(str(PRODUCTION))
    profile.service.arguments = [
        "preset=tiny", "model=tiny", f"checkpoint={folder}/weights", f"runs={folder}/runs", f"title={title}", "token=t",
        "generation.steps=2",
    ]  # fmt: skip
    return yaml.safe_load(ray_service(profile, "page")["spec"]["serveConfigV2"])


@pytest.fixture
def url(ray_cluster):
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(config):
    """What Ray's dashboard does with a configuration that KubeRay puts there."""
    from ray.serve import status
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema(**config), _blocking=False)
    end = time.monotonic() + 1200
    while (now := status().applications["loomvideo"]).status != "RUNNING":
        assert now.status != "DEPLOY_FAILED", now.message
        assert time.monotonic() < end, now
        time.sleep(0.5)


def picture(url):
    """Its pixels: the file also says how it was made."""
    return Image.open(io.BytesIO(Client(url, "t").generate("a coat", "t2i", seed=1).content)).tobytes()


def title_of(url):
    answer = httpx2.get(f"{url}/api/options", headers={"authorization": "Bearer t"}, timeout=60)
    return answer.json()["title"]


def test_it_answers_and_is_changed_without_a_lost_request(url, tmp_path):
    dit = LoomVideoDiT(model_size("tiny").dit)
    save_dit(dit, dit.config, tmp_path / "weights")
    deploy(serve_config(tmp_path, "First"))
    expected, changed = picture(url), threading.Event()
    assert title_of(url) == "First"

    def ask():
        made = [picture(url)]
        while not changed.is_set():
            made.append(picture(url))
        return made

    with ThreadPoolExecutor(2) as people:
        asked = [people.submit(ask) for _ in range(2)]
        try:
            deploy(serve_config(tmp_path, "Second"))
        finally:
            changed.set()
        made = [content for person in asked for content in person.result()]
    assert title_of(url) == "Second"
    # Seeded: what the old and the new generator make is one picture.
    assert len(made) > 2
    assert set(made) == {expected}
