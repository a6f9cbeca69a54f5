"""A module of ours that runs as a process of its own and answers over its pipes, so that it may hang or crash."""

import contextlib
import os
import subprocess
import sys


class ChildProcess:
    """``python -m MODULE``, in one thread and with this process's import path; started when it is asked for.

    Args:
        module: The module.
    """

    def __init__(self, module: str):
        self.module = module
        self._process: subprocess.Popen | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> subprocess.Popen:
        """The running process, a new one where there is none."""
        if self._process is None or self._process.poll() is not None:
            environment = dict(os.environ)
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
            environment["OMP_NUM_THREADS"] = "1"
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=environment,
            )
        return self._process

    def close(self) -> None:
        """End it: what is still in its pipes belongs to nobody."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None
