"""The decoder process: ``python -m loomvideo.pipelines.media.decode_worker`` answers requests on its standard streams.

A file that crashes or hangs a decoder takes only this process with it. Requests and answers are pickled, each behind
its size in 8 bytes; frames follow their header as raw bytes.
"""

import os
import pickle
import queue
import sys
import threading
from typing import BinaryIO, Protocol

from loomvideo.pipelines.media.decode import DecodeError, OpenMedia, open_media
from loomvideo.pipelines.media.fragments import split_fragment
from loomvideo.pipelines.media.media_info import READER_ERRORS, first_line

_OPEN_FILES = 4


class Readable(Protocol):
    """What a stream must do to be read from."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill a part of the buffer; returns how much, 0 at the end."""
        ...


def send(stream: BinaryIO, message: object) -> None:
    """Write one message."""
    data = pickle.dumps(message)
    # In one piece: the other side wakes once.
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: Readable) -> object:
    """Read one message.

    Raises:
        EOFError: if the other side is gone.
    """
    return pickle.loads(read_exactly(stream, int.from_bytes(read_exactly(stream, 8), "little")))


def read_exactly(stream: Readable, size: int) -> bytearray:
    """Read ``size`` bytes into one buffer."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    done = 0
    while done < size:
        count = stream.readinto(view[done:])
        if not count:
            raise EOFError("the decoder's pipe closed")
        done += count
    return buffer


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the requests end."""
    pending: queue.Queue = queue.Queue()

    def listen() -> None:
        while True:
            try:
                pending.put(receive(requests))
            except EOFError:
                # The parent is gone: leave even if a decoder hangs.
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    opened: dict[tuple, OpenMedia] = {}
    while True:
        action, location, options = pending.get()
        try:
            version = (location, _version(location[0]))
            if version not in opened:
                while len(opened) >= _OPEN_FILES:
                    opened.pop(next(iter(opened)))
                opened[version] = open_media(*location)
            media = opened[version]
            if action == "probe":
                send(answers, media.info)
                continue
            for chunk in media.read(options):
                send(answers, chunk.shape)
                answers.write(memoryview(chunk.reshape(-1)))
            send(answers, None)
        except DecodeError as error:
            send(answers, error)
        except READER_ERRORS as error:
            send(answers, DecodeError("decoder_error", f"{location[0]}: {type(error).__name__}: {first_line(error)}"))


def _version(path: str) -> tuple[int, int] | None:
    """Size and time of a file, so that one written anew is opened anew."""
    try:
        found = os.stat(split_fragment(path)[0])
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def main() -> None:
    """Serve on stdin and stdout; whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
