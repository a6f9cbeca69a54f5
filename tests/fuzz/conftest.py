"""How long fuzzing lasts: moments in the test suite, the minutes that ``make fuzz`` gives otherwise.

Hypothesis keeps every input that failed in ``.hypothesis`` and tries it first the next time.
"""

import collections
import itertools
import os
import re
import shutil
import time

import pytest

MINUTES = float(os.environ.get("LOOMVIDEO_FUZZ_MINUTES", 0))
try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the tests of this folder are skipped, saying so
    pass
else:
    checks = list(HealthCheck)
    settings.register_profile("moments", deadline=None, suppress_health_check=checks, max_examples=15)
    settings.register_profile("minutes", deadline=None, suppress_health_check=checks, max_examples=50)
    settings.load_profile("minutes" if MINUTES else "moments")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Gives an empty folder of another name for every input, and removes the one before."""
    root, numbers = tmp_path_factory.mktemp("fuzz"), itertools.count()

    def folder():
        for left in root.iterdir():
            shutil.rmtree(left)
        made = root / str(next(numbers))
        made.mkdir()
        return made

    return folder


_TRIED = pytest.StashKey[collections.Counter]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """With minutes to spend, go round and round through the tests, each time with other inputs."""
    if not MINUTES or session.config.option.collectonly or not session.items:
        return None
    ends, tried = time.monotonic() + 60 * MINUTES, session.config.stash.setdefault(_TRIED, collections.Counter())
    while time.monotonic() < ends and not session.shouldfail and not session.shouldstop:
        for number, item in enumerate(session.items):
            following = session.items[number + 1] if number + 1 < len(session.items) else None
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            statistics = str(getattr(item, "hypothesis_statistics", ""))
            tried[item.name] += sum(map(int, re.findall(r"(\d+) passing", statistics)))
            if session.shouldfail or session.shouldstop or time.monotonic() > ends:
                break
    return True


def pytest_terminal_summary(terminalreporter, config):
    """How many inputs each test was given."""
    tried = config.stash.get(_TRIED, None)
    if tried:
        terminalreporter.section(f"{tried.total()} inputs in {MINUTES:g} minutes")
        for name, count in tried.items():
            terminalreporter.write_line(f"{count:8d} {name}")
