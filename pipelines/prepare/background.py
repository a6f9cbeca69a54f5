"""Iterators that work ahead of whoever reads them, in a thread."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


@contextlib.contextmanager
def working_ahead(items: Iterator[T], size: int) -> Iterator[Iterator[T]]:
    """Items in order, of which so many wait ready; what the iterator raises is raised where its item would be.

    At the end of the block the iterator is closed, in its own thread, wherever it stands.

    Args:
        items: A generator; only the thread runs it.
        size: Items ready at most.
    """
    ready: queue.Queue = queue.Queue(size)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def work() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put((item, None))
                    if stopped.is_set():
                        return
            put(_END)
        except BaseException as error:  # handed to the reader, which raises it
            put((None, error))

    def read() -> Iterator[T]:
        while (found := ready.get()) is not _END:
            item, error = found
            if error is not None:
                raise error
            yield item

    thread = threading.Thread(target=work, name="working ahead", daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        stopped.set()
        thread.join()


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """Items in order, the next of which is worked on while one is used; errors are raised where an item would be.

    Args:
        items: An iterator; only the thread runs it.
    """
    with ThreadPoolExecutor(1, "one ahead") as pool:
        upcoming = pool.submit(next, items, _END)
        while (item := upcoming.result()) is not _END:
            upcoming = pool.submit(next, items, _END)
            yield item
