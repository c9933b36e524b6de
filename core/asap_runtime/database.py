"""A database by URL, SQLite in a file or PostgreSQL: transactions and clock. Knows no table.

SQLite allows one writer: a lock per process queues the threads, `BEGIN IMMEDIATE` the processes.
After a power loss the last second may be missing, never consistency (`synchronous=NORMAL`).
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from asap.errors import Misconfigured, UpstreamUnavailable
from asap_runtime.telemetry import DB_SECONDS

__all__ = ["SECOND", "Database", "after", "now", "open_engine"]

SECOND = 1_000_000
"""Microseconds in a second; the unit of every time column."""

STATEMENT_TIMEOUT_S = 10
BUSY_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 5
SWEEPER_LOCK = 0x61736170
"""Key of PostgreSQL's advisory lock: "asap" in ASCII."""


class now(FunctionElement[int]):
    """The database's clock, in microseconds since the epoch; one value per statement."""

    type = BigInteger()
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **options: Any) -> str:
    # Stable within the statement, so that an index can serve comparisons with it.
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) * 1000000 AS BIGINT)"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **options: Any) -> str:
    # Milliseconds; `unixepoch('now', 'subsec')` needs SQLite 3.42.
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000) * 1000 AS INTEGER)"


def open_engine(url: str, *, pool_size: int = 5) -> Engine:
    """An engine for `sqlite:///PATH` or `postgresql+psycopg://…`; nothing connects yet.

    Statements log no parameters and errors show none: they may hold model text. `pool_size` is the
    most connections this process opens; keep replicas x pool_size below the server's limit.
    """
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise Misconfigured("the database URL cannot be read; expected SCHEME://…") from error
    if address.drivername == "sqlite":
        if address.database in (None, "", ":memory:"):
            raise Misconfigured(
                "SQLite in memory is not shared between threads; expected sqlite:///PATH"
            )
        engine = create_engine(address, hide_parameters=True, pool_size=pool_size)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if address.drivername == "postgresql+psycopg":
        return create_engine(
            address,
            hide_parameters=True,
            isolation_level="READ COMMITTED",
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=CONNECT_TIMEOUT_S,
            pool_recycle=1800,
            pool_pre_ping=True,  # a restarted server costs a reconnect, not an error
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "options": f"-c statement_timeout={STATEMENT_TIMEOUT_S}s",
            },
        )
    raise Misconfigured(
        f"the database scheme {address.drivername!r} is unknown; "
        "expected sqlite:///PATH or postgresql+psycopg://…"
    )


def _configure_sqlite(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # BEGIN is ours, see _begin_sqlite
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
    _enter_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead logging, a lasting property of the file.

    The first switch needs the file for itself and does not wait by the busy time-out: several
    processes that open a new file at once would fail here.
    """
    end = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later fails at once when another one wrote meanwhile
    # and no busy time-out helps; a writer therefore takes the write lock at its beginning.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class Database:
    """An engine with its two kinds of transaction. Safe to share between threads.

    Trouble with the connection (server gone, restarted, pool or statement timed out) is raised as
    UpstreamUnavailable with the code `database-unavailable`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writer = threading.Lock()
        self._sweeper = threading.Lock()

    @property
    def is_sqlite(self) -> bool:
        """Whether one writer at a time is all there can be."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with DB_SECONDS.labels("read").time(), _translated(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end of the block and rolls back on an exception."""
        with DB_SECONDS.labels("write").time(), self._writing() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        if not self.is_sqlite:
            with _translated(), self.engine.begin() as connection:
                yield connection
            return
        with self._writer, _translated(), self.engine.connect() as connection:
            writing = connection.execution_options(writes=True)
            with writing.begin():
                yield writing

    @contextmanager
    def sweeping(self) -> Iterator[bool]:
        """Whether this holder is the one active sweeper until the block ends; never waits.

        SQLite: one per process, enough because every sweep is idempotent.
        """
        if self.is_sqlite:
            held = self._sweeper.acquire(blocking=False)
            try:
                yield held
            finally:
                if held:
                    self._sweeper.release()
            return
        with _translated(), self.engine.connect() as connection:
            # Without a transaction: an idle one would hold back the vacuum of the whole database.
            session = connection.execution_options(isolation_level="AUTOCOMMIT")
            held = bool(session.scalar(select(func.pg_try_advisory_lock(SWEEPER_LOCK))))
            try:
                yield held
            finally:
                if held:
                    session.execute(select(func.pg_advisory_unlock(SWEEPER_LOCK)))

    def time(self) -> int:
        """The database's time in microseconds since the epoch."""
        with self.read() as connection:
            return connection.execute(select(now())).scalar_one()

    def close(self) -> None:
        """Give all pooled connections back."""
        self.engine.dispose()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        raise _unavailable() from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise _unavailable() from error
        raise


def _unavailable() -> UpstreamUnavailable:
    return UpstreamUnavailable(
        "the database does not answer in time; the request can be repeated",
        code="database-unavailable",
    )


def after(delay_s: float) -> ColumnElement[int]:
    """The moment `delay_s` seconds from now, by the database's clock."""
    return now() + round(delay_s * SECOND)
