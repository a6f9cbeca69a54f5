"""The web page is given everything people bring: an upload that can be used, or one line."""

import asyncio
import contextlib
import time

import pytest
from fixtures.browser import browser_page, requires_browser, served
from fixtures.mixed_folder import everything, reasons_of_files
from fixtures.untrained import untrained_pipeline
from starlette.testclient import TestClient

from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.serving.app import PageConfig, create_app
from loomvideo.pipelines.serving.model_generator import PageGenerator
from loomvideo.pipelines.serving.uploads import UploadLimits, UploadReader
from loomvideo.platform.errors import UserError

# Kinds of files that a browser's user has no use for; raw streams and noise are told by no first bytes.
UNKNOWN = {"raw.h264", "page.mp4", "pointer.mp4", "noise.mp4"}


def test_every_file_is_taken_or_one_line(tmp_path):
    rows = everything(tmp_path)
    wanted = reasons_of_files(rows)
    reader = UploadReader(UploadLimits())
    try:
        for path in sorted(tmp_path.iterdir()):
            said = ""
            try:
                frame = reader.frames(reader.check(path.read_bytes()), [0])
                assert frame.shape[-1] == 3
            except UserError as error:
                said = str(error)
            assert bool(said) == bool(wanted.get(path.name) or path.name in UNKNOWN), (path.name, said)
            assert ("unknown file type" in said) == (path.name in UNKNOWN), (path.name, said)
            assert "\n" not in said
            assert "/tmp" not in said
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x08wide\0\0\0\0mdat", "video/quicktime"),
        (b"G" + bytes(187) + b"G", "video/mp2t"),
        (b"MM\0*", "image/tiff"),
    ],
)
def test_files_are_told_by_their_first_bytes(content, kind):
    from loomvideo.pipelines.serving.uploads import media_type

    assert media_type(content) == kind
    with pytest.raises(UserError, match="unknown file type"):
        media_type(b"ffconcat version 1.0\nfile x")


def refusals(rows):
    """The names of the files that the page refuses."""
    return {name for name, reason in reasons_of_files(rows).items() if reason} - {"absent.png"} | UNKNOWN


def follow(client, job):
    end = time.monotonic() + 300
    while job["status"] in ("queued", "running"):
        assert time.monotonic() < end
        time.sleep(0.05)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


@pytest.mark.slow
def test_every_file_through_the_pages_interface_is_a_result_or_one_line(tmp_path):
    """Uploaded as the page does it, edited by the real pipeline with untrained weights, and fetched."""
    rows = everything(tmp_path)
    settings = Settings(buckets=[64], default_size=[64, 64], num_frames=5, steps=1)
    generator = PageGenerator(FileGenerator(untrained_pipeline(), settings, {"name": "random"}))

    async def backend(request):
        yield await asyncio.to_thread(generator.generate, request, lambda step, of: None)

    refused, results = {}, {}
    with contextlib.closing(generator), TestClient(create_app(backend, PageConfig())) as client:
        for path in sorted(tmp_path.iterdir()):
            answer = client.post("/api/uploads", content=path.read_bytes())
            if answer.status_code != 201:
                assert answer.status_code == 422, answer.text
                refused[path.name] = answer.json()["error"]
                continue
            request = {"task": "edit", "prompt": "make it blue", "source": answer.json()["id"]}
            job = follow(client, client.post("/api/jobs", json=request).json())
            assert job["status"] == "done", (path.name, job)
            results[path.name] = client.get(f"/api/jobs/{job['id']}/result").content
    assert set(refused) == refusals(rows)
    assert not any("\n" in text or "/tmp" in text for text in refused.values())
    for name, content in results.items():
        is_picture = name.endswith((".jpg", ".png", ".webp"))
        assert content.startswith(b"\x89PNG") if is_picture else content[4:8] == b"ftyp", name


@requires_browser
@pytest.mark.slow
def test_every_file_in_a_browser_is_shown_or_one_line(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    rows = everything(folder)

    async def backend(request):
        yield await asyncio.sleep(3600)

    shown, said = set(), {}
    with served(create_app(backend, PageConfig())) as url, browser_page(tmp_path / "profile") as page:
        page.open(url)
        page.wait_for("document.querySelectorAll('#tasks label').length === 5")
        page.evaluate("document.querySelector('#task-edit').click()")
        for path in sorted(folder.iterdir()):
            page.evaluate("document.querySelector('#error').textContent = ''")
            page.evaluate("document.querySelector('#source-media').replaceChildren()")
            page.choose_files("#source-file", path)
            page.wait_for("document.querySelector('#error').textContent || document.querySelector('#source-media *')")
            text = page.evaluate("document.querySelector('#error').textContent")
            if text:
                said[path.name] = text
            else:
                shown.add(path.name)
        assert not page.errors
    assert set(said) == refusals(rows)
    assert all(text.startswith(f"{name}: ") and "\n" not in text for name, text in said.items()), said
    assert shown == {path.name for path in folder.iterdir()} - set(said)
