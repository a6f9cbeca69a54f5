"""The page's interface over a small fake generator: uploads, the queue, limits, the token."""

import asyncio
import io
import itertools
import tempfile
import time
import wave
from pathlib import Path

import pytest
from fixtures import media
from fixtures.fake_generator import generate, png
from fixtures.fake_generator import mp4 as clip
from PIL import Image
from starlette.testclient import TestClient

from loomvideo.model.codec import LatentGrid
from loomvideo.pipelines.serving.app import PageConfig, create_app
from loomvideo.pipelines.serving.jobs import Progress
from loomvideo.pipelines.serving.requests import GenerationRequest, RequestLimits
from loomvideo.pipelines.serving.store import ServiceStore
from loomvideo.pipelines.serving.uploads import UploadLimits, UploadReader
from loomvideo.platform.errors import UserError


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return clip()


def wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    return buffer.getvalue()


async def wait_for_ever(request: GenerationRequest):
    await asyncio.sleep(3600)
    yield Progress(0, 1)


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(generate, PageConfig(grid=LatentGrid(4, 16)))) as client:
        yield client


@pytest.fixture
def reader():
    reader = UploadReader(UploadLimits())
    yield reader
    reader.close()


def upload(client: TestClient, content: bytes) -> dict:
    answer = client.post("/api/uploads", content=content)
    assert answer.status_code == 201, answer.text
    return answer.json()


def submit(client: TestClient, **body) -> dict:
    answer = client.post("/api/jobs", json={"task": "t2i", "prompt": "a coat"} | body)
    assert answer.status_code == 202, answer.text
    return answer.json()


def finish(client: TestClient, job: dict) -> dict:
    end = time.monotonic() + 20
    while job["status"] in ("queued", "running"):
        assert time.monotonic() < end
        time.sleep(0.02)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


def refusal(answer, status: int) -> str:
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]
    assert "\n" not in message
    assert "/tmp" not in message
    return message


def test_a_picture_from_words(client):
    job = finish(client, submit(client))
    assert (job["status"], job["step"], job["steps"], job["error"]) == ("done", 2, 2, "")
    answer = client.get(f"/api/jobs/{job['id']}/result")
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (6, 8)


def test_an_edit_with_references_keeps_its_source(client, mp4):
    source, reference = upload(client, mp4), upload(client, png())
    assert (source["kind"], source["frames"], source["width"], source["height"]) == ("video", 9, 96, 64)
    parts = {"source": source["id"], "references": [reference["id"]]}
    job = finish(client, submit(client, task="ref_edit", prompt="wear @Image 1", **parts))
    assert job["status"] == "done"
    assert job["references"][0]["kind"] == "image"
    assert client.get(f"/api/jobs/{job['id']}/source").content == mp4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("fail: user", "width 33 is no multiple of 32"),
        ("fail: memory", "out of memory: choose a smaller size or fewer frames"),
        ("fail: bug", "the generation failed (KeyError); the server's log says why"),
    ],
)
def test_failures_are_one_line_without_details(client, prompt, message):
    job = finish(client, submit(client, prompt=prompt))
    assert (job["status"], job["error"]) == ("failed", message)
    assert "failed" in refusal(client.get(f"/api/jobs/{job['id']}/result"), 409)


def test_refused_requests(client, mp4):
    picture, video = upload(client, png())["id"], upload(client, mp4)["id"]
    cases = [
        ({"task": "edit", "prompt": "x"}, "needs a source"),
        ({"task": "t2v", "prompt": "x", "source": video}, "takes no source"),
        ({"task": "mi2v", "prompt": "x"}, "at least one reference"),
        ({"task": "mi2v", "prompt": "x", "references": [picture] * 7}, "7 reference pictures: at most 6"),
        ({"task": "mi2v", "prompt": "x", "references": [video]}, "references are pictures"),
        ({"task": "mi2v", "prompt": "wear @Image 2", "references": [picture]}, "@Image 2"),
        ({"task": "t2v", "prompt": "x" * 100_000}, "100000 characters: at most 2000"),
        ({"task": "t2v", "prompt": "  "}, "prompt is empty"),
        ({"task": "paint", "prompt": "x"}, "choose one of edit, t2i"),
        ({"task": "t2v", "prompt": "x", "steps": 1000}, "choose 1 to 100"),
        ({"task": "edit", "prompt": "x", "source": "../../etc/passwd"}, "upload the file again"),
        ({"task": "t2v"}, "prompt: Field required"),
        ({"task": "t2v", "prompt": "x", "path": "/etc"}, "path: Extra inputs"),
        (
            {"task": "t2v", "prompt": "x", "width": 4096, "height": 4096, "num_frames": 121},
            "width=4096: choose 1 to 1472",
        ),
        ({"task": "t2v", "prompt": "x", "width": 1472, "height": 960}, "1413120 pixels, at most 921600"),
        ({"task": "t2v", "prompt": "x", "width": 64}, "give both"),
        ({"task": "t2v", "prompt": "x", "width": 60, "height": 64}, "multiples of 32"),
        ({"task": "t2v", "prompt": "x", "seed": -1}, "seed: Input should be greater"),
        ({"task": "edit", "prompt": "x", "source": picture, "whole": True}, "whole: is for edits of videos"),
        ({"task": "edit", "prompt": "x", "source": video, "whole": 1}, "whole: Input should be a valid boolean"),
        ({"task": "t2i", "prompt": "x", "guidance_scale": False}, "guidance_scale: Input should be a valid number"),
        ({"task": "t2i", "prompt": "x", "steps": "5"}, "steps: Input should be a valid integer"),
        ({"task": "mi2v", "prompt": "x", "references": [""]}, "upload the file again"),
    ]
    for body, message in cases:
        assert message in refusal(client.post("/api/jobs", json=body), 422)
    assert "request" in refusal(client.post("/api/jobs", content=b"not json"), 422)
    assert "no such generation" in refusal(client.get("/api/jobs/nothing"), 404)


def test_pages_of_other_sites_and_other_names_are_refused():
    config = PageConfig(hosts=("localhost",))
    with TestClient(create_app(generate, config), base_url="http://localhost:8000") as client:
        body = {"task": "t2i", "prompt": "a coat"}
        own = {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
        assert client.post("/api/jobs", json=body, headers=own).status_code == 202
        for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            assert "another site" in refusal(client.post("/api/jobs", json=body, headers=headers), 403)
        form = client.post("/api/jobs", content="{}", headers={"content-type": "text/plain"})
        assert "content-type text/plain" in refusal(form, 415)
        rebound = client.get("/api/options", headers={"host": "evil.example:8000"})
        assert "does not answer as evil.example" in refusal(rebound, 421)
        assert rebound.headers["x-content-type-options"] == "nosniff"


def test_health_knows_whether_anything_generates():
    alive = [0]

    async def count() -> int:
        return alive[0]

    with TestClient(create_app(generate, PageConfig(), count)) as client:
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "no generator")
        alive[0] = 2
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["generators"]) == (200, 2)


def test_openapi_says_bodies_answers_and_errors(client):
    paths = client.get("/openapi.json").json()["paths"]
    job = paths["/api/jobs"]["post"]
    assert "prompt" in job["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert job["responses"]["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/JobState")
    for status in ("401", "403", "413", "415", "421", "422", "429"):
        assert job["responses"][status]["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal")
    assert "application/octet-stream" in paths["/api/uploads"]["post"]["requestBody"]["content"]
    taken = job["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert "edit" in taken["task"]["enum"]
    assert taken["steps"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 100}
    assert set(paths["/api/jobs/{job_id}/result"]["get"]["responses"]["200"]["content"]) == {"image/png", "video/mp4"}
    assert client.options("/api/jobs/x").headers["allow"] == "DELETE, GET"
    documented = paths["/metrics"]["get"]["responses"]["200"]["content"]
    assert client.get("/metrics").headers["content-type"] in documented


def test_refused_uploads(client, mp4, tmp_path):
    cases = [
        (b"", "empty"),
        (b"GIF89a", "cannot be read"),
        (b"ffconcat version 1.0\nfile /etc/passwd", "unknown file type"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unknown file type"),
        (wav(), "unknown file type"),
        (media.write_video(tmp_path / "sound.mp4", None, audio_only=True).read_bytes(), "no video stream"),
        (media.write_frameless(tmp_path / "frameless.mp4").read_bytes(), "no frames"),
        (png(7680, 4320), "7680x4320 pixels are too many"),
        (png()[:200], "cannot be read"),
        (mp4[: len(mp4) // 2], "cannot be"),
        (b"\0\0\0\x18ftypisom" + bytes(64), "cannot be"),
    ]
    for content, message in cases:
        assert message in refusal(client.post("/api/uploads", content=content), 422), content[:20]


def test_decompression_bomb_is_refused_by_its_header(client):
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    assert "too many pixels" in refusal(client.post("/api/uploads", content=bomb), 422)


def test_limits_of_duration_frames_and_bytes(mp4, reader):
    reader.limits = UploadLimits(max_duration_s=0.2)
    with pytest.raises(UserError, match=r"lasts 0\.4 s: at most 0\.2 s"):
        reader.check(mp4)
    reader.limits = UploadLimits(max_frames=5)
    with pytest.raises(UserError, match="9 frames: at most 5"):
        reader.check(mp4)
    with TestClient(create_app(generate, PageConfig(uploads=UploadLimits(max_bytes=100)))) as client:
        assert "too large" in refusal(client.post("/api/uploads", content=bytes(101)), 413)
        pieces = iter([bytes(60), bytes(60)])  # chunked: no length is declared
        assert "too large" in refusal(client.post("/api/uploads", content=pieces), 413)


def test_no_temporary_files_stay(client, mp4, reader):
    before = set(Path(tempfile.gettempdir()).glob("loomvideo-upload-*"))
    upload(client, mp4)
    client.post("/api/uploads", content=png()[:100])
    assert reader.frames(reader.check(mp4), [0, 4, 8]).shape == (3, 64, 96, 3)
    assert set(Path(tempfile.gettempdir()).glob("loomvideo-upload-*")) == before


def test_store_forgets_the_oldest(reader):
    limits, store = UploadLimits(kept_bytes=2 * len(png()) + 100), ServiceStore()
    kept = [reader.check(png()) for _ in range(3)]
    for one in kept:
        store.add_upload(one, limits)
    assert store.upload(kept[2].id, limits) == kept[2]
    with pytest.raises(UserError, match="upload the file again"):
        store.upload(kept[0].id, limits)
    with pytest.raises(UserError, match="gone"):
        store.upload(kept[2].id, limits, "somebody else")
    limits.kept_s = 0
    with pytest.raises(UserError, match="gone"):
        store.upload(kept[2].id, limits)


def test_queue_positions_cancel_and_limit():
    config = PageConfig(requests=RequestLimits(max_waiting=2))
    with TestClient(create_app(wait_for_ever, config)) as client:
        first, second = submit(client), submit(client)
        assert (first["position"], second["position"]) == (0, 1)
        assert "too many" in refusal(client.post("/api/jobs", json={"task": "t2i", "prompt": "x"}), 429)
        assert client.get("/health").json() == {
            "status": "ok", "generators": None, "waiting": 2, "running": 0}  # fmt: skip
        assert client.delete(f"/api/jobs/{first['id']}").status_code == 204
        assert client.get(f"/api/jobs/{second['id']}").json()["position"] == 0
        assert client.get(f"/api/jobs/{first['id']}").status_code == 404
        client.delete(f"/api/jobs/{second['id']}")


def test_a_clock_that_jumps_ends_no_generation(monkeypatch):
    """An hour on and a day back at every look: what is waited for is counted elsewhere."""
    jumps = itertools.cycle((3600.0, -86_400.0))
    now = [time.time()]

    def jumping():
        now[0] += next(jumps)
        return now[0]

    with TestClient(create_app(generate, PageConfig())) as client:
        monkeypatch.setattr(time, "time", jumping)
        jobs = [submit(client, task="t2i", prompt=f"a red dress {number}", deadline_s=30.0) for number in range(3)]
        assert [finish(client, job)["status"] for job in jobs] == ["done"] * 3


@pytest.mark.parametrize(
    "limits", [RequestLimits(kept_results=1), RequestLimits(kept_bytes=1), RequestLimits(kept_s=0)]
)
def test_finished_generations_are_forgotten(limits):
    with TestClient(create_app(generate, PageConfig(requests=limits))) as client:
        first = finish(client, submit(client))
        second = finish(client, submit(client))
        submit(client)
        assert client.get(f"/api/jobs/{first['id']}").status_code == 404
        assert client.get(f"/api/jobs/{second['id']}").status_code == (200 if limits.kept_results == 1 else 404)


def test_token():
    with TestClient(create_app(generate, PageConfig(token="secret"))) as client:
        for path in ("/api/options", "/api/jobs/x", "/api/jobs/x/result"):
            assert "token" in refusal(client.get(path), 401)
        assert client.post("/api/uploads", content=png()).status_code == 401
        assert client.get("/api/options", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/api/options", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/").status_code == client.get("/health").status_code == 200


def test_metrics_and_headers():
    with TestClient(create_app(generate, PageConfig())) as client:
        check_metrics_and_headers(client)


def check_metrics_and_headers(client):
    finish(client, submit(client))
    client.get("/api/jobs/none")
    text = client.get("/metrics").text
    assert 'loomvideo_serve_jobs_total{status="done",task="t2i"} 1.0' in text
    assert 'loomvideo_serve_rejected_requests_total{status="404"} 1.0' in text
    assert "loomvideo_serve_jobs_waiting 0.0" in text
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
