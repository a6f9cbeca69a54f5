"""Which server has a store: locks beside a SQLite file, or in a Postgres database."""

import contextlib
import fcntl
from pathlib import Path
from typing import IO

from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

HELD, NEXT = "lock", "next"
"""Two locks of a store: its server has one, a server that waits to take it over has the other."""
_KEYS = {HELD: 0x10_0A_71DE0, NEXT: 0x10_0A_71DE1}
"""Their names in a Postgres database; beside a SQLite file they are files."""

Lock = IO[str] | Connection


def acquire(engine: Engine, place: str, name: str) -> Lock | None:
    """One of the two locks, or None while another server has it.

    Args:
        engine: The database.
        place: The SQLite file; a URL has no meaning here.
        name: :data:`HELD` or :data:`NEXT`.
    """
    if engine.dialect.name == "sqlite":
        file = Path(f"{place}.{name}").open("w")  # noqa: SIM115 - held until it is released
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        file.close()
        return None
    # Without a transaction that would be open as long as the lock is held.
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    if connection.execute(text("select pg_try_advisory_lock(:key)"), {"key": _KEYS[name]}).scalar_one():
        return connection
    connection.close()
    return None


def is_held(lock: Lock) -> bool:
    """Whether a lock still holds: one of Postgres ends with its connection."""
    if not isinstance(lock, Connection):
        return True
    if lock.closed or lock.invalidated:  # asked again it would connect anew, without the lock
        return False
    try:
        lock.execute(text("select 1"))
    except DBAPIError:
        return False
    return True


def release(lock: Lock | None) -> None:
    """Let another server have it."""
    if isinstance(lock, Connection):
        # A lock of Postgres is held as long as the connection, which would go on living in the pool.
        lock.invalidate()
    if lock is not None:
        lock.close()
