"""Examples to click on the page: chosen over kinds, with their media."""

import json

import pytest
from starlette.testclient import TestClient

from loomvideo.pipelines.serving.app import PageConfig, create_app
from loomvideo.pipelines.serving.examples import read_examples
from loomvideo.platform.errors import UserError


def row(key, task, split="heldout", kind="", **fields):
    text = {"instruction": f"edit {key}"} if "edit" in task else {"caption": f"caption {key}"}
    return {"key": key, "task": task, "dataset": "d", "target": "t.mp4", "split": split, **text,
            "extra": {"edit": {"kind": kind}} if kind else {}, **fields}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    rows = [
        row("a", "image_edit", source="s.png", kind="recolour"),
        row("b", "video_edit", source="s.mp4", kind="recolour"),
        row("c", "video_edit", source="s.mp4", kind="background"),
        row("d", "ref_edit", source="s.mp4", references=["r.png", "r.png"]),
        row("e", "t2v"),
        row("f", "t2v", split="train"),
    ]
    for name in ("s.png", "s.mp4", "r.png"):
        (tmp_path / name).write_bytes(name.encode())
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_one_of_every_kind_comes_first(file):
    examples = read_examples(file, count=4)
    assert [(e.task, e.prompt) for e in examples] == [
        ("edit", "edit b"), ("edit", "edit c"), ("ref_edit", "edit d"), ("t2v", "caption e"),
    ]  # fmt: skip
    assert examples[0].source.media_type == "video/mp4"
    assert [m.content for m in examples[2].references] == [b"r.png", b"r.png"]
    assert len(read_examples(file)) == 5
    assert "t2v" not in {e.task for e in read_examples(file, left_out={"t2v"})}


def test_missing_or_unsplit_files_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    file.write_text(json.dumps(row("x", "t2v", split="train")) + "\n")
    with pytest.raises(UserError, match="split=heldout"):
        read_examples(file)


def test_the_page_serves_them(file):
    page = PageConfig(examples=read_examples(file))
    with TestClient(create_app(None, page), base_url="http://localhost") as client:
        told = client.get("/api/options").json()["examples"]
        assert told[0] == {"task": "edit", "prompt": "edit b", "source": "video/mp4", "references": 0}
        assert client.get("/api/examples/0/source").content == b"s.mp4"
        assert client.get("/api/examples/2/1").headers["content-type"] == "image/png"
        for path in ("0/1", "9/source", "3/source"):
            assert client.get(f"/api/examples/{path}").status_code == 404
