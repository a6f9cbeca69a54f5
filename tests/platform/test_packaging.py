"""The rooms import as loomvideo.*, and never shadow the standard library."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_import_platform_from_repo_root_is_the_standard_library():
    code = "import platform; print(platform.python_version())"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ".".join(map(str, sys.version_info[:3]))


def test_platform_room_has_no_init():
    assert not (REPO / "platform" / "__init__.py").exists()


def test_every_package_folder_is_listed():
    import tomllib

    listed = set(tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"loomvideo.platform"}
    for room in ("platform", "model", "pipelines", "jobs"):
        for init in (REPO / room).rglob("__init__.py"):
            found.add("loomvideo." + ".".join(init.parent.relative_to(REPO).parts))
    assert listed == found


def test_every_direct_dependency_is_explained():
    import re
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.match(r"[\w.-]+", line).group() for line in requirements} - {"loomvideo"}
    table = (REPO / "docs" / "development.md").read_text().partition("## Dependencies")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    explained = {word for row in rows for word in re.findall(r"[\w.-]+", row)}
    assert names - explained == set(), "add a row to docs/development.md"
