"""The images take their packages from the lock files, and list what they hold with its licences."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
IMAGES = REPO / "infra" / "images"
FILES = sorted(IMAGES.glob("Dockerfile.*"))
EXTRAS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def licences(monkeypatch):
    monkeypatch.syspath_prepend(str(IMAGES))
    import licences

    yield licences
    sys.modules.pop("licences")


def instructions(path):
    return [line for line in re.sub(r"\\\n", " ", path.read_text()).splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_packages_come_from_the_locks(path):
    """By the environment script, or by pip held to the locks; a tool outside them has its version in the line."""
    scripts = [
        found
        for line in instructions(path)
        for found in re.findall(r"python\S* infra/setup/environment\.py ([^&]*)", line)
    ]
    for words in scripts:
        extras = [word for word in re.sub(r"--(venv|accelerator|part) \S+|--\S+", "", words).split() if word]
        assert set(extras) <= set(EXTRAS)
    loose = []
    for line in instructions(path):
        for words in re.findall(r"pip install ([^&]*)", line):
            held = re.findall(r"--constraint \S*locks/(\S+)\.txt", words)
            names = re.sub(r"--constraint \S+|--\S+", "", words).split()
            assert all((REPO / "locks" / f"{name}.txt").is_file() for name in held)
            loose += [name for name in names if not held and "==" not in name]
    assert loose == []
    assert scripts or any("--constraint" in line for line in instructions(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_base_is_pinned_and_the_user_is_nobody_special(path):
    lines = instructions(path)
    assert all(re.search(r"@sha256:[0-9a-f]{64}$", line) for line in lines if line.startswith("ARG BASE="))
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"


def test_licences_of_python_packages(licences):
    sbom = {
        "components": [
            {"name": "a", "version": "1", "licenses": [{"license": {"id": "MIT"}}, {"expression": "Apache-2.0"}]},
            {"name": "b", "version": "2", "licenses": [{"license": {"name": "BSD License\nCopyright …"}}]},
            {"name": "c", "version": "3"},
        ]
    }
    found = list(licences.python_packages(sbom))
    assert found == [("a", "1", "MIT AND Apache-2.0"), ("b", "2", "BSD License"), ("c", "3", "not stated")]


def test_licences_of_debian_packages(licences, tmp_path):
    for name, text in {
        "structured": "Files: *\nLicense: GPL-2+\n more\n\nFiles: debian/*\nLicense: MIT\n\nLicense: MIT\n",
        "prose": "the full text is in `/usr/share/common-licenses/LGPL-2.1'.\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "copyright").write_text(text)
    found = list(licences.debian_packages("structured 1.0-1\nprose 2\nbare 3", tmp_path))
    assert found == [("structured", "1.0-1", "GPL-2+, MIT"), ("prose", "2", "LGPL-2.1"), ("bare", "3", "not stated")]
