"""Reproducible USTAR archives, written member by member without holding a shard, or a copy of a member, in memory."""

import hashlib
import tarfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

BLOCK_BYTES = tarfile.BLOCKSIZE
# From here on a checksum takes longer than handing it to another thread.
_LARGE_BYTES = 1 << 19


class TarWriter:
    """Appends members to a stream and keeps its SHA-256.

    Owner, mode and time are constants, so that equal content makes equal bytes. The checksum of a large chunk is
    computed by a thread while the next one is made and written: chunks must not change after they were added.
    """

    def __init__(self, out: BinaryIO):
        self._out = out
        self._hash = hashlib.sha256()
        self._unhashed = bytearray()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checksum")
        self._running: Future | None = None
        self.num_bytes = 0

    def add(self, name: str, chunks: Iterable[bytes | memoryview], num_bytes: int) -> int:
        """Append a member from its chunks.

        Args:
            name: A name of at most 100 bytes, so that every reader sees it whole in the header.
            chunks: The content in order.
            num_bytes: Its total size, below 8 GiB (the USTAR limit).

        Returns:
            The offset of the content in the archive.

        Raises:
            ValueError: if the name does not fit or the chunks do not add up to ``num_bytes``.
        """
        if len(name.encode()) > 100:
            raise ValueError(f"tar member name longer than 100 bytes: {name}")
        member = tarfile.TarInfo(name)
        member.size, member.mode, member.mtime = num_bytes, 0o644, 0
        self._write(member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
        offset = self.num_bytes
        for chunk in chunks:
            self._write(chunk)
        if self.num_bytes - offset != num_bytes:
            raise ValueError(f"{name}: {self.num_bytes - offset} bytes written, {num_bytes} announced")
        self._write(bytes(-num_bytes % BLOCK_BYTES))
        return offset

    def finish(self) -> str:
        """Write the end of the archive and return the SHA-256 of all of it as hex."""
        self._write(bytes(2 * BLOCK_BYTES))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        self._update(b"")
        self._thread.shutdown()
        return self._hash.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._out.write(data)
        num_bytes = memoryview(data).nbytes
        self.num_bytes += num_bytes
        if num_bytes >= _LARGE_BYTES:
            self._update(data)
            return
        self._unhashed += data
        if len(self._unhashed) >= _LARGE_BYTES:
            self._update(b"")

    def _update(self, data: bytes | memoryview) -> None:
        """Hash what has gathered and ``data`` after it, one chunk behind the writer."""
        if self._running is not None:
            self._running.result()
        gathered, self._unhashed = self._unhashed, bytearray()
        self._running = self._thread.submit(self._hash_parts, gathered, data)

    def _hash_parts(self, *parts: bytes | bytearray | memoryview) -> None:
        for part in parts:
            self._hash.update(part)
