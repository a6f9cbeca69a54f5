"""A session's own signals, in a process of its own: the test process has a session already."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, time
from loomvideo.platform.ray_session import ray_session

try:
    with ray_session(num_cpus=1):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_sigterm_leaves_like_ctrl_c():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted"]), done.stderr
