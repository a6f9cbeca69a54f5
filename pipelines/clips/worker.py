"""The process that cuts films: ``python -m loomvideo.pipelines.clips.worker``, replaced when it hangs or dies.

A request is a film with its parts; answers are how far it is read, a clip, or None where the film is done.
"""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from loomvideo.pipelines.clips.cutter import CutClip, CutOptions, Part, Reading, cut_film
from loomvideo.pipelines.media.child_process import ChildProcess
from loomvideo.pipelines.media.decode_worker import receive, send
from loomvideo.pipelines.media.media_info import READER_ERRORS, DecodeError, first_line
from loomvideo.platform.machine import patience

_END = "end"
_RESTART = "restart"
# Frequent enough for a limit of seconds, seldom enough to cost nothing.
_REPORT_S = 0.5


class FilmProcess:
    """:func:`~loomvideo.pipelines.clips.cutter.cut_film` in a process with a time limit for each piece of a film.

    Args:
        options: How clips are written.
        piece_timeout_s: How long a film may give no sign of progress on an ordinary machine; a slow one gets more.
    """

    def __init__(self, options: CutOptions, piece_timeout_s: float):
        self.options, self.piece_timeout_s = options, patience(piece_timeout_s)
        self._child = ChildProcess("loomvideo.pipelines.clips.worker")

    def cut(
        self, path: str, parts: Sequence[Part], shots: bool, scratch: Path
    ) -> Iterator[tuple[CutClip | None, Reading]]:
        """Clips with how far the film is read; a clip of None says that those before it do not count.

        Raises:
            DecodeError: with a reason code, ``timeout`` and ``decoder_crash`` among them; clips before it are whole.
        """
        process = self._child.start()
        reading, finished = Reading(), False
        try:
            send(process.stdin, (path, list(parts), shots, self.options, str(scratch)))
            while True:
                kind, value = self._answer(process, path)
                if isinstance(value, DecodeError):
                    finished = True
                    raise value
                if isinstance(value, Reading):
                    reading = value
                if kind == _END:
                    finished = True
                    yield CutClip(""), reading
                    return
                if kind == _RESTART or isinstance(value, CutClip):
                    yield value, reading
        except (EOFError, BrokenPipeError) as error:
            code = process.wait()
            raise DecodeError("decoder_crash", f"{path}: the process that cuts it ended with code {code}") from error
        finally:
            if not finished:
                self.close()

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def _answer(self, process: subprocess.Popen, path: str) -> tuple[str, object]:
        readable, _, _ = select.select([process.stdout], [], [], self.piece_timeout_s)
        if not readable:
            raise DecodeError("timeout", f"{path}: no progress in {self.piece_timeout_s:g} s")
        return receive(process.stdout)


def serve() -> None:
    """Answer until the requests end; whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            path, parts, shots, options, scratch = receive(sys.stdin.buffer)
        except EOFError:
            return
        _serve(answers, path, parts, shots, options, Path(scratch))


def _serve(answers: BinaryIO, path: str, parts: list[Part], shots: bool, options: CutOptions, scratch: Path) -> None:
    import cv2

    from loomvideo.pipelines.prepare.curation.shots import build_detector

    cv2.setNumThreads(1)
    last, latest = time.monotonic(), Reading()

    def report(reading: Reading) -> None:
        nonlocal last, latest
        latest = reading
        if time.monotonic() - last >= _REPORT_S:
            send(answers, ("reading", reading))
            last = time.monotonic()

    try:
        detector = build_detector(options.shots) if shots else None
        for clip in cut_film(path, parts, detector, options, scratch, report):
            send(answers, (_RESTART if clip is None else "clip", clip))
        send(answers, (_END, latest))
    except DecodeError as error:
        send(answers, ("error", error))
    except READER_ERRORS as error:
        message = f"{path}: {type(error).__name__}: {first_line(error)}"
        send(answers, ("error", DecodeError("decoder_error", message)))


if __name__ == "__main__":
    serve()
