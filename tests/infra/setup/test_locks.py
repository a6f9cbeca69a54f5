"""The lock files are whole, name no index, and the check finds what does not hold."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import locks

REPO = Path(__file__).parents[3]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def _names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements} - {"loomvideo"}


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_every_direct_dependency_is_locked(extra):
    wanted = _names(PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])
    pinned = {pin.name for pin in locks.read_locks()["base"]}
    pinned |= {pin.name for pin in locks.read_locks()[extra]} if extra else set()
    assert wanted - pinned == set()


def test_no_lock_names_an_index_or_a_local_build():
    for path in locks.LOCKS.iterdir():
        text = path.read_text()
        assert not re.search(r"https?:|file:|--index|--find-links|\+cpu|\+cu", text), path.name


def test_the_pins_of_torch_and_triton_belong_together():
    pins = {pin.name: pin.version for pin in locks.read_locks()["torch-cuda"]}
    assert pins["triton"] == next(pin.version for pin in locks.read_locks()["dev"] if pin.name == "triton")
    # A machine without a CPU build needs all of these, one with it none: so none may hide in the base set.
    assert not {pin.name for pin in locks.read_locks()["base"]} & set(pins)


def test_lines_of_a_lock_are_read_with_their_markers():
    text = "# comment\nA.b==1.0 ; sys_platform == 'linux'  # via torch, -c c.txt, loomvideo (/x/pyproject.toml)\nc==2\n"
    assert locks.parse(text) == [
        locks.Pin("a-b", "1.0", "sys_platform == 'linux'", "loomvideo, torch"),
        locks.Pin("c", "2", "", ""),
    ]


def test_markers_decide_what_a_machine_gets():
    pin = locks.Pin("decord", "0.6.0", "platform_machine == 'x86_64' and python_full_version < '3.12'", "")
    assert locks.Combination("cpu", "3.11", "x86_64").holds(pin)
    assert not locks.Combination("cpu", "3.12", "x86_64").holds(pin)
    assert not locks.Combination("cpu", "3.11", "aarch64").holds(pin)


@pytest.mark.slow
def test_a_wrong_triton_is_found_by_name():
    """The pin that made the project uninstallable from a plain index."""
    wrong = {
        name: [locks.Pin(p.name, "3.9.0" if p.name == "triton" else p.version, p.marker, p.via) for p in pins]
        for name, pins in locks.read_locks().items()
    }
    try:
        problems = locks.check_combination(locks.Combination("cuda", "3.11", "x86_64"), wrong)
    except locks.NoIndexError as error:
        pytest.skip(f"no package index can be reached: {str(error)[-200:]}")
    assert "triton" in problems[0]
    assert "3.9.0" in problems[0]


def test_an_unreachable_index_is_no_pass(monkeypatch, capsys):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    monkeypatch.setattr("sys.argv", ["locks.py", "check"])
    assert locks.main() == 0
    assert capsys.readouterr().out.startswith("SKIPPED: no package index can be reached")
