"""Decoding in a child process with a time limit: a hanging or crashing file costs one sample, never the run."""

import contextlib
import fcntl
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence

import numpy as np

from loomvideo.pipelines.media.child_process import ChildProcess
from loomvideo.pipelines.media.decode import DEFAULT_FOLDER_FPS, Backend, DecodeError, MediaInfo
from loomvideo.pipelines.media.decode_worker import read_exactly, receive, send
from loomvideo.platform.machine import patience
from loomvideo.platform.time_limits import DECODER

_PIPE_BYTES = 1 << 20


class IsolatedDecoder:
    """:func:`~loomvideo.pipelines.media.decode.open_media` in a process that is replaced when it hangs or dies.

    One request at a time; not thread-safe.

    Args:
        timeout_s: How long one probe or one read may take on an ordinary machine; a slow one gets more.
        backend: What reads videos.
    """

    def __init__(self, timeout_s: float = DECODER.seconds, backend: Backend = "auto"):
        self.timeout_s, self.backend = patience(timeout_s), backend
        self._child = ChildProcess("loomvideo.pipelines.media.decode_worker")

    def start(self) -> subprocess.Popen:
        """The process, started now instead of at the first request."""
        if self._child.is_running:
            return self._child.start()
        process = self._child.start()
        # Room for the frames of a small clip: fewer switches between the processes.
        with contextlib.suppress(OSError):
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return process

    def probe(self, path: str, folder_fps: float = DEFAULT_FOLDER_FPS) -> MediaInfo:
        """What a file holds.

        Raises:
            DecodeError: with a reason code, ``timeout`` and ``decoder_crash`` among them.
        """
        answers = list(self._request("probe", path, folder_fps, ()))
        return answers[0]

    def read(self, path: str, indices: Sequence[int], folder_fps: float = DEFAULT_FOLDER_FPS) -> Iterator[np.ndarray]:
        """Frames as chunks ``[n, height, width, 3]``; the time limit holds for all of them together.

        Raises:
            DecodeError: as :meth:`probe`.
        """
        return self._request("read", path, folder_fps, list(indices))

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def _request(self, action: str, path: str, folder_fps: float, indices: Sequence[int]) -> Iterator:
        process = self.start()
        answers = _Answers(process.stdout.fileno(), time.monotonic() + self.timeout_s)
        finished = False
        try:
            send(process.stdin, (action, (path, self.backend, folder_fps), indices))
            while True:
                answer = receive(answers)
                if isinstance(answer, DecodeError):
                    finished = True
                    raise answer
                if action == "probe":
                    finished = True
                    yield answer
                    return
                if answer is None:
                    finished = True
                    return
                size = int(np.prod(answer))
                yield np.frombuffer(read_exactly(answers, size), dtype=np.uint8).reshape(answer)
        except TimeoutError as error:
            raise DecodeError("timeout", f"{path}: no answer from the decoder in {self.timeout_s:g} s") from error
        except (EOFError, BrokenPipeError) as error:
            raise DecodeError(
                "decoder_crash", f"{path}: the decoder process ended with code {process.wait()}"
            ) from error
        finally:
            if not finished:
                # Crashed, expired, or the caller left early: what is still in the pipe belongs to nobody.
                self.close()


class _Answers:
    """The readable end of the decoder's pipe, until a moment; a thread with a timer would cost more than the read."""

    def __init__(self, descriptor: int, deadline: float):
        self._descriptor, self._deadline = descriptor, deadline
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def readinto(self, buffer: memoryview) -> int:
        """Read what there is.

        Raises:
            TimeoutError: at the deadline.
        """
        if not self._poll.poll(max(self._deadline - time.monotonic(), 0.0) * 1000):
            raise TimeoutError
        return os.readv(self._descriptor, [buffer])
