"""The one table of tasks, and that nothing beside it lists them."""

import re
from pathlib import Path

import pytest

from loomvideo.model import tasks
from loomvideo.model.guidance import Guidance
from loomvideo.model.tasks import REQUESTED, TASKS, WORDINGS, requested_task
from loomvideo.platform.errors import UserError

ROOT = Path(tasks.__file__).parent.parent


def test_a_task_says_everything_about_itself():
    assert {"t2i", "t2v", "image_edit", "video_edit", "ref_edit", "mi2v"} <= set(TASKS)
    assert {"t2i", "t2v", "edit", "ref_edit", "mi2v"} <= set(REQUESTED)
    assert not {"image_edit", "video_edit", "mi2i"} & set(REQUESTED)
    for task in WORDINGS.values():
        assert (task.visual_scale is not None) == task.has_media == ("visual" in task.branches)
        assert task.opening.endswith(": ")
        assert set(Guidance.default(task.name).weights()) <= set(task.branches)
    assert Guidance.default("ref_edit") == Guidance(2.5, 1.5)
    assert Guidance.default("t2v") == Guidance(5.0)
    assert Guidance.default("mi2v") == Guidance(5.0, 1.5)


def test_an_edit_is_of_what_its_source_is():
    assert requested_task("edit").name == "video_edit"
    assert requested_task("edit", "image").name == "image_edit"
    assert requested_task("ref_edit", "video").needs_references
    with pytest.raises(UserError, match="the source is a picture; use task=edit"):
        requested_task("video_edit", "image")
    with pytest.raises(UserError, match="choose one of edit, t2i, t2v"):
        requested_task("mi2i")


def test_no_other_table_of_tasks():
    names = "|".join(TASKS)
    listed = re.compile(rf"[(\[{{]\s*['\"]({names})['\"]\s*,\s*['\"]({names})['\"]")
    found = [
        str(path.relative_to(ROOT))
        for room in ("model", "pipelines", "jobs")
        for path in (ROOT / room).rglob("*.py")
        if listed.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []
