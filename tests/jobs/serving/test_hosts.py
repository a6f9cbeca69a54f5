"""Names that the server answers as: loopback ones where it listens on loopback, any in a RayService."""

import pytest

from loomvideo.jobs.serving import job
from loomvideo.jobs.serving.config import ServeConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import save_dit


@pytest.fixture
def weights(tmp_path):
    dit = LoomVideoDiT(model_size("tiny").dit)
    save_dit(dit, dit.config, tmp_path / "weights")
    return str(tmp_path / "weights")


def test_names(weights, monkeypatch):
    pages = []
    monkeypatch.setattr(job, "build_application", lambda load, page, replicas: pages.append(page))
    base = {"checkpoint": weights, "model": "tiny"}
    job._application(ServeConfig(**base))
    job._application(ServeConfig(**base, host="0.0.0.0"))
    job._application(ServeConfig(**base, hosts=["films.example.com"]))
    job.build({"arguments": ["preset=tiny", f"checkpoint={weights}", "model=tiny"]})
    assert [page.hosts for page in pages] == [("localhost", "127.0.0.1", "::1"), (), ("films.example.com",), ()]
    assert pages[0].grid == model_size("tiny").grid
