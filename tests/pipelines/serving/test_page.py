"""The page in a real browser, over a fake generator."""

import pytest
from fixtures.browser import browser_page, requires_browser, served
from fixtures.fake_generator import generate, mp4, png

from loomvideo.pipelines.serving.app import PageConfig, create_app


def check_completion(page):
    """Typing @ offers the references; keys choose one; Ctrl+Enter sends."""
    press = "document.querySelector('#prompt').dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}))"
    page.evaluate(
        "(box => { box.value = 'wear @im'; box.setSelectionRange(8, 8); box.dispatchEvent(new Event('input')) })"
        "(document.querySelector('#prompt'))"
    )
    assert page.evaluate("document.querySelectorAll('#mentions li').length") == 2
    page.evaluate(press % "ArrowDown")
    page.evaluate(press % "Enter")
    assert page.evaluate("document.querySelector('#prompt').value") == "wear @Image 2 "
    assert page.evaluate("document.querySelector('#mentions').hidden")
    page.evaluate("document.querySelector('#prompt').value = 'Dress her in @Image 2'")


@requires_browser
@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    clip, picture, large = (tmp_path / name for name in ("clip.mp4", "picture.png", "large.png"))
    clip.write_bytes(mp4())
    picture.write_bytes(png())
    large.write_bytes(png(4200, 16))
    app = create_app(generate, PageConfig(token="secret", defaults={"steps": 50}))
    with served(app) as url, browser_page(tmp_path / "profile") as page:
        page.open(url)
        page.wait_for("document.querySelector('#ask').open")
        page.evaluate("document.querySelector('#token').value = 'secret'")
        page.evaluate("document.querySelector('#ask button').click()")
        page.wait_for("document.querySelectorAll('#tasks label').length === 5")
        assert page.evaluate("document.querySelector('#steps').placeholder") == "50"

        page.evaluate("document.querySelector('#task-ref_edit').click()")
        page.choose_files("#source-file", clip)
        page.wait_for("document.querySelector('#source-media video')")
        page.choose_files("#reference-file", picture, picture)
        page.wait_for("document.querySelectorAll('#reference-media img').length === 2")
        page.evaluate("document.querySelector('#prompt').value = 'Dress her in'")
        page.evaluate("document.querySelectorAll('#reference-media button')[3].click()")
        assert page.evaluate("document.querySelector('#prompt').value").strip() == "Dress her in @Image 2"
        page.evaluate("document.querySelector('#submit').click()")
        page.wait_for("!document.querySelector('#player').hidden")
        page.wait_for("document.querySelector('#player img').naturalHeight === 8")
        page.wait_for("document.querySelector('#player video').videoWidth === 96")
        assert "done" in page.evaluate("document.querySelector('#history').innerText")

        page.evaluate("document.querySelector('#view').click()")
        page.wait_for("document.querySelectorAll('.compare > *').length === 2")
        page.evaluate("(s => { s.value = 20; s.dispatchEvent(new Event('input')) })(document.querySelector('#split'))")
        assert page.evaluate("document.querySelector('.compare').style.getPropertyValue('--at')") == "20%"
        check_completion(page)

        page.choose_files("#source-file", large)
        page.wait_for("document.querySelector('#error').textContent.includes('4200x16 pixels are too many')")
        page.evaluate("document.querySelector('#task-t2v').click()")
        page.evaluate("document.querySelector('#prompt').value = '<img src=x onerror=alert(1)> @Image 9'")
        page.evaluate("document.querySelector('#submit').click()")
        page.wait_for("document.querySelector('#error').textContent.includes('@Image 9')")
        page.evaluate("document.querySelector('#prompt').value = 'fail: user'")
        page.evaluate("document.querySelector('#submit').click()")
        page.wait_for("document.querySelector('#state').textContent.includes('no multiple of 32')")

        page.open(url)
        page.wait_for("document.querySelectorAll('#history button').length === 2")
        page.evaluate("document.querySelectorAll('#history button')[1].click()")
        page.wait_for("!document.querySelector('#player').hidden")
        page.evaluate("document.querySelector('#again').click()")
        assert page.evaluate("document.querySelector('#prompt').value").strip() == "Dress her in @Image 2"
        assert page.errors == []


@requires_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_every_task_in_a_browser(tmp_path, width):
    """Each is chosen, filled in, sent and shown, and nothing is wider than the screen."""
    clip, picture = tmp_path / "clip.mp4", tmp_path / "picture.png"
    clip.write_bytes(mp4())
    picture.write_bytes(png())
    config = PageConfig(defaults={"num_frames": 5}, left_out=frozenset({"t2v"}))
    with served(create_app(generate, config)) as url, browser_page(tmp_path / "profile", width) as page:
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500
        )
        page.open(url)
        page.wait_for("document.querySelectorAll('#tasks label').length === 5")
        tasks = page.evaluate("[...document.querySelectorAll('#tasks input')].map((input) => input.value)")
        assert tasks[-1] == "t2v"
        for count, task in enumerate(tasks, 1):
            page.evaluate(f"document.querySelector('#task-{task}').click()")
            assert page.evaluate("document.querySelector('#untrained').hidden") == (task != "t2v")
            shown = {part: not page.evaluate(f"document.querySelector('#{part}-part').hidden")
                     for part in ("source", "reference")}  # fmt: skip
            assert shown == {"source": "edit" in task, "reference": task in ("ref_edit", "mi2v")}
            if shown["source"] and not page.evaluate("document.querySelectorAll('#source-media .chip').length"):
                page.choose_files("#source-file", clip)
                page.wait_for("document.querySelectorAll('#source-media .chip').length === 1")
            if shown["reference"] and not page.evaluate("document.querySelectorAll('#reference-media img').length"):
                page.choose_files("#reference-file", picture)
                page.wait_for("document.querySelectorAll('#reference-media img').length === 1")
            page.wait_for("!document.querySelector('#submit').disabled")
            page.evaluate(f"document.querySelector('#prompt').value = 'task {task}'")
            if task == "edit":
                assert page.evaluate("document.querySelector('#whole-hint').textContent").startswith("Edit all 0.4 s")
                page.evaluate("document.querySelector('#whole').click()")
            page.evaluate("document.querySelector('#submit').click()")
            done = f"document.querySelectorAll('#history .item').length === {count} && "
            page.wait_for(done + "document.querySelector('#history .state').textContent.endsWith('done')")
            page.wait_for("!document.querySelector('#player').hidden")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        sent = page.evaluate("JSON.parse(localStorage.jobs).map((job) => [job.task, Boolean(job.body.whole)])")
        assert dict(sent)["edit"]
        assert page.errors == []
