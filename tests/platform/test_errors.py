"""How to add what is missing: by make where there is a clone, by pip where there is none."""

import tomllib
from pathlib import Path

import pytest

from loomvideo.platform import errors

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "extra", tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
)
def test_a_clone_adds_extras_by_make(extra):
    assert errors.how_to_add(extra) == f"make setup EXTRAS={extra}"


def test_an_image_or_a_wheel_adds_extras_by_pip(monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "loomvideo" / "platform" / "errors.py"))
    assert errors.how_to_add("eval") == "pip install 'loomvideo[eval]'"


def test_no_message_names_pip_for_an_extra_itself():
    """They all ask the one helper, so that a clone never gets packages past its locks."""
    found = [
        str(path.relative_to(REPO))
        for room in ("platform", "model", "pipelines", "jobs")
        for path in (REPO / room).rglob("*.py")
        if "pip install 'loomvideo[" in path.read_text() and path.name != "errors.py"
    ]
    assert found == []
