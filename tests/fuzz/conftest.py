"""How long fuzzing lasts: moments in the test suite, the minutes that ``make fuzz`` gives otherwise.

Hypothesis keeps every input that failed in ``.hypothesis`` and tries it first the next time.
"""

import os
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


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """With minutes to spend, go round and round through the tests, each time with other inputs."""
    if not MINUTES or session.config.option.collectonly:
        return None
    ends, rounds = time.monotonic() + 60 * MINUTES, 0
    while time.monotonic() < ends and not session.shouldfail and not session.shouldstop:
        for number, item in enumerate(session.items):
            following = session.items[number + 1] if number + 1 < len(session.items) else None
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail or session.shouldstop or time.monotonic() > ends:
                break
        rounds += 1
    print(f"\n{rounds} rounds through {len(session.items)} tests")
    return True
