"""Where jobs, uploads and results are: a SQLite file, a Postgres database, or memory."""

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import (
    JSON,
    Column,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    UniqueConstraint,
    func,
    insert,
    select,
    update,
)
from sqlalchemy import delete as sql_delete
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from loomvideo.pipelines.media.decode import MediaInfo
from loomvideo.pipelines.serving.jobs import UNFINISHED, Job, Result, StoreAwayError, StoreFullError
from loomvideo.pipelines.serving.requests import GenerationRequest, RequestLimits
from loomvideo.pipelines.serving.store_lock import HELD, NEXT, Lock, acquire, is_held, release
from loomvideo.pipelines.serving.uploads import Upload, UploadLimits
from loomvideo.platform.errors import UserError, full_disk_behind, how_to_add

logger = logging.getLogger(__name__)
MEMORY = "memory"
CONNECT_S = 5
"""Seconds that a database may take to answer a new connection."""
_TABLES = MetaData()
_UPLOADS = sqlalchemy.Table(
    "uploads",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("created_s", Float, nullable=False, index=True),
    Column("media_type", String, nullable=False),
    Column("info", JSON, nullable=False),
    Column("num_bytes", Integer, nullable=False),
    Column("content", LargeBinary, nullable=False),
)
_JOBS = sqlalchemy.Table(
    "jobs",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("asked_as", String),  # what its sender calls it, so that asking twice makes one
    Column("request", JSON, nullable=False),
    Column("status", String, nullable=False, index=True),
    Column("error", String, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("created_s", Float, nullable=False),
    Column("started_s", Float),
    Column("finished_s", Float, index=True),
    Column("media_type", String),
    Column("num_bytes", Integer, nullable=False),
    UniqueConstraint("owner", "asked_as"),
)
_RESULTS = sqlalchemy.Table(
    "results",
    _TABLES,
    Column("job", String, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)
_MEDIA = sqlalchemy.Table(
    "job_media",
    _TABLES,
    Column("job", String, primary_key=True),
    Column("number", Integer, primary_key=True),  # 0 is the source
    Column("upload", String, nullable=False, index=True),
)
_ASKED = sqlalchemy.Table(
    "asked",
    _TABLES,
    Column("job", String, primary_key=True),
    Column("owner", String, index=True),
    Column("created_s", Float, index=True),
)


class ServiceStore:
    """Jobs with their media and results.

    Args:
        place: A SQLite file, a URL of Postgres (``postgresql://…``), or ``memory``.

    Raises:
        UserError: if it cannot be opened.
    """

    def __init__(self, place: str = MEMORY) -> None:
        self.place = place
        # A URL's password is for nobody's eyes.
        self.shown = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", place)
        self._lock: Lock | None = None
        self._unsure = self._is_lost = False
        try:
            self._engine = _engine(place)
            sqlalchemy.event.listen(self._engine, "connect", self._connected)
            # A SQLite file that is there has its tables, and another machine may be writing to it.
            if place == MEMORY or "://" in place or not Path(place).exists():
                _TABLES.create_all(self._engine)
        except ImportError as error:
            raise UserError(
                f"store={self.shown}: Postgres needs the package {error.name}: {how_to_add('server')}"
            ) from error
        except (SQLAlchemyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"store={self.shown}: cannot be opened ({reason}); name a file, postgresql://… or {MEMORY}"
            ) from error

    def take(self, wait_s: float = 0.0, ask: bool = False) -> None:
        """Become the only server on it: two would do the same jobs.

        Args:
            wait_s: How long a server that is ending may take to let go.
            ask: Let the server that has it know that this one waits; see :meth:`is_asked_for`.

        Raises:
            UserError: if another server has it.
        """
        if self.place == MEMORY or self._lock is not None:
            return
        end, asking = time.monotonic() + wait_s, None
        try:
            while (lock := acquire(self._engine, self.place, HELD)) is None:
                if ask and asking is None:
                    asking = acquire(self._engine, self.place, NEXT)
                if time.monotonic() >= end:
                    raise UserError(f"store={self.shown}: another server uses it; stop that one or name another store")
                time.sleep(0.1)
        finally:
            release(asking)
        self._lock = lock
        _TABLES.create_all(self._engine)

    def is_asked_for(self) -> bool:
        """Whether a server waits to take it over; one that died meanwhile does not count."""
        if self.place == MEMORY:
            return False
        lock = acquire(self._engine, self.place, NEXT)
        release(lock)
        return lock is None

    def close(self) -> None:
        """Let go of it."""
        release(self._lock)
        self._lock = None
        self._engine.dispose()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._answering(), self._engine.begin() as connection:
            self._be_sure()
            yield connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._answering(), self._engine.connect() as connection:
            self._be_sure()
            yield connection

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Say in one line that the disk is full or the database away."""
        try:
            yield
        except OperationalError as error:
            if full_disk_behind(error) is not None:
                logger.error("store=%s: no space left; free some", self.shown)
                raise StoreFullError("the server has no room left: nothing was kept, tell whoever runs it") from error
            if self._engine.dialect.name == "sqlite":
                raise
            logger.warning("store=%s: does not answer (%s)", self.shown, str(error).splitlines()[0])
            raise StoreAwayError("the server's store does not answer: try again in a moment") from error

    def _connected(self, connection: Any, record: Any) -> None:
        """A new connection may mean that others were lost."""
        self._unsure = True

    def _be_sure(self) -> None:
        """Have the lock again where a lost connection let it go: another server may have taken the store meanwhile."""
        if not self._unsure:
            return
        if self._lock is not None and not is_held(self._lock):
            self._lock, dead = acquire(self._engine, self.place, HELD), self._lock
            release(dead)
            self._is_lost = self._lock is None
        if self._is_lost:
            raise StoreAwayError("another server has taken this one's store over: ask that one")
        self._unsure = False

    def add_upload(self, upload: Upload, limits: UploadLimits, owner: str = "") -> None:
        """Keep an upload; the oldest that no job needs are forgotten when there are too many bytes."""
        values = {"id": upload.id, "owner": owner, "created_s": time.time(), "media_type": upload.media_type}
        values |= {"info": dataclasses.asdict(upload.info), "content": upload.content}
        with self._writing() as connection:
            connection.execute(insert(_UPLOADS).values(**values, num_bytes=len(upload.content)))
            _forget_uploads(connection, limits, spared=upload.id)

    def upload(self, upload_id: str, limits: UploadLimits, owner: str = "") -> Upload:
        """An upload by its id.

        Raises:
            UserError: if it was never its owner's or is forgotten.
        """
        if "\0" in upload_id:  # no id, and nothing that Postgres could be asked for
            raise UserError("that upload is gone: upload the file again")
        recent = _UPLOADS.c.created_s >= time.time() - limits.kept_s
        with self._reading() as connection:
            row = connection.execute(
                select(_UPLOADS).where(_UPLOADS.c.id == upload_id, _UPLOADS.c.owner == owner, recent)
            ).first()
        if row is None:
            raise UserError("that upload is gone: upload the file again")
        return _upload(row)

    def add_job(self, job: Job) -> None:
        """Keep a new job; when this returns, a restart does not lose it."""
        request = job.request
        values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        media = [values.pop("source"), *values.pop("references")]
        with self._writing() as connection:
            connection.execute(
                insert(_JOBS).values(
                    id=job.id, owner=job.owner, asked_as=job.asked_as, request=values, status=job.status,
                    error="", attempts=0, step=0, steps=0, created_s=job.created_s, num_bytes=0,
                )
            )  # fmt: skip
            connection.execute(insert(_ASKED).values(job=job.id, owner=job.owner, created_s=job.created_s))
            for number, upload in enumerate(media):
                if upload is not None:
                    connection.execute(insert(_MEDIA).values(job=job.id, number=number, upload=upload.id))

    def start(self, job_id: str, attempts: int, started_s: float) -> None:
        """Note that a generator began a job."""
        with self._writing() as connection:
            changes = {"status": "running", "attempts": attempts, "started_s": started_s}
            connection.execute(update(_JOBS).where(_JOBS.c.id == job_id).values(**changes))

    def put_back(self, job_id: str, attempts: int) -> None:
        """Note that a job was stopped for no fault of its own."""
        with self._writing() as connection:
            connection.execute(update(_JOBS).where(_JOBS.c.id == job_id).values(status="queued", attempts=attempts))

    def finish(self, job: Job, status: str, error: str = "", result: Result | None = None) -> bool:
        """Record a job's end with its result, once.

        Returns:
            False where the job is deleted, ended already, or was begun again since.
        """
        changes = {"status": status, "error": error, "finished_s": time.time(), "step": job.step, "steps": job.steps}
        if result is not None:
            changes |= {"media_type": result.media_type, "num_bytes": len(result.content)}
        mine = (_JOBS.c.id == job.id) & (_JOBS.c.attempts == job.attempts) & _JOBS.c.status.in_(UNFINISHED)
        with self._writing() as connection:
            if not connection.execute(update(_JOBS).where(mine).values(**changes)).rowcount:
                return False
            if result is not None:
                connection.execute(insert(_RESULTS).values(job=job.id, content=result.content))
        return True

    def job(self, job_id: str) -> Job | None:
        """A job without the content of its media; None when unknown or forgotten."""
        if "\0" in job_id:
            return None
        with self._reading() as connection:
            row = connection.execute(select(_JOBS).where(_JOBS.c.id == job_id)).first()
            return None if row is None else _job(row, _media(connection, job_id, with_content=False))

    def asked_as(self, owner: str, name: str) -> str | None:
        """The id of the job that somebody asked for under a name of theirs."""
        with self._reading() as connection:
            query = select(_JOBS.c.id).where(_JOBS.c.owner == owner, _JOBS.c.asked_as == name)
            return connection.execute(query).scalar_one_or_none()

    def unfinished(self) -> list[Job]:
        """Jobs that have no end yet, oldest first, with their media."""
        with self._reading() as connection:
            rows = connection.execute(
                select(_JOBS).where(_JOBS.c.status.in_(UNFINISHED)).order_by(_JOBS.c.created_s, _JOBS.c.id)
            ).all()
            return [_job(row, _media(connection, row.id, with_content=True)) for row in rows]

    def result(self, job_id: str) -> Result | None:
        """A finished job's file."""
        query = select(_RESULTS.c.content, _JOBS.c.media_type).join(_JOBS, _JOBS.c.id == _RESULTS.c.job)
        with self._reading() as connection:
            row = connection.execute(query.where(_RESULTS.c.job == job_id)).first()
        return None if row is None else Result(bytes(row.content), row.media_type)

    def source(self, job_id: str) -> Upload | None:
        """A job's source."""
        with self._reading() as connection:
            return _media(connection, job_id, with_content=True).get(0)

    def asked_since(self, owner: str, since_s: float) -> int:
        """How many jobs somebody asked for, forgotten ones counted."""
        query = select(func.count()).select_from(_ASKED).where(_ASKED.c.owner == owner, _ASKED.c.created_s >= since_s)
        with self._reading() as connection:
            return connection.execute(query).scalar_one()

    def delete(self, job_id: str) -> None:
        """Forget a job with its result."""
        with self._writing() as connection:
            _delete_jobs(connection, [job_id])

    def forget(self, limits: RequestLimits) -> None:
        """Forget finished jobs that are old or too many, and what was asked for over a day ago."""
        with self._writing() as connection:
            rows = connection.execute(
                select(_JOBS.c.id, _JOBS.c.finished_s, _JOBS.c.num_bytes)
                .where(_JOBS.c.finished_s.is_not(None))
                .order_by(_JOBS.c.finished_s)
            ).all()
            oldest, kept, gone = time.time() - limits.kept_s, sum(row.num_bytes for row in rows), []
            for index, row in enumerate(rows):
                if row.finished_s >= oldest and len(rows) - index <= limits.kept_results and kept <= limits.kept_bytes:
                    break
                kept -= row.num_bytes
                gone.append(row.id)
            _delete_jobs(connection, gone)
            connection.execute(sql_delete(_ASKED).where(_ASKED.c.created_s < time.time() - 86_400))


def _engine(place: str) -> Engine:
    if place == MEMORY:
        options = {"connect_args": {"check_same_thread": False}, "poolclass": StaticPool}
        return sqlalchemy.create_engine("sqlite://", **options)
    if "://" in place:
        url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", place)
        options = {"connect_args": {"connect_timeout": CONNECT_S}} if url.startswith("postgresql+psycopg2") else {}
        return sqlalchemy.create_engine(url, pool_pre_ping=True, **options)
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(f"sqlite:///{place}")

    @sqlalchemy.event.listens_for(engine, "connect")
    def durable(connection: Any, record: Any) -> None:
        connection.execute("pragma journal_mode=wal")
        connection.execute("pragma synchronous=full")
        connection.execute("pragma busy_timeout=30000")

    return engine


def _upload(row: Any, with_content: bool = True) -> Upload:
    content = bytes(row.content) if with_content else b""
    return Upload(row.id, content, row.media_type, MediaInfo(**row.info), row.num_bytes)


def _media(connection: Connection, job_id: str, with_content: bool) -> dict[int, Upload]:
    """The uploads of a job by number; without content they only describe themselves."""
    columns = [column for column in _UPLOADS.c if with_content or column.name != "content"]
    query = select(_MEDIA.c.number, *columns).join(_UPLOADS, _UPLOADS.c.id == _MEDIA.c.upload)
    rows = connection.execute(query.where(_MEDIA.c.job == job_id).order_by(_MEDIA.c.number))
    return {row.number: _upload(row, with_content) for row in rows}


def _job(row: Any, media: dict[int, Upload]) -> Job:
    references = [media[number] for number in sorted(media) if number]
    request = GenerationRequest(**row.request, source=media.get(0), references=references)
    names = ("owner", "status", "error", "media_type", "attempts", "step", "steps",
             "created_s", "started_s", "finished_s")  # fmt: skip
    return Job(row.id, request, **{name: getattr(row, name) for name in names})


def _delete_jobs(connection: Connection, ids: Sequence[str]) -> None:
    for table, column in ((_RESULTS, "job"), (_MEDIA, "job"), (_JOBS, "id")):
        connection.execute(sql_delete(table).where(table.c[column].in_(ids)))


def _forget_uploads(connection: Connection, limits: UploadLimits, spared: str) -> None:
    """Delete uploads that are old or too many, oldest first, but none that a job needs."""
    needed = select(_MEDIA.c.upload)
    rows = connection.execute(
        select(_UPLOADS.c.id, _UPLOADS.c.created_s, _UPLOADS.c.num_bytes)
        .where(_UPLOADS.c.id != spared, _UPLOADS.c.id.not_in(needed))
        .order_by(_UPLOADS.c.created_s)
    ).all()
    kept = connection.execute(select(func.sum(_UPLOADS.c.num_bytes))).scalar_one() or 0
    gone = []
    for row in rows:
        if row.created_s >= time.time() - limits.kept_s and kept <= limits.kept_bytes:
            break
        kept -= row.num_bytes
        gone.append(row.id)
    connection.execute(sql_delete(_UPLOADS).where(_UPLOADS.c.id.in_(gone)))
