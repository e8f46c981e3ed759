"""SQLite connections as the store wants them, and which of SQLite's errors mean that it cannot go on."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from corral import cores

BUSY_TIMEOUT_MS = 5_000
CACHE_KIB = 16 * 1024
"""What the writer keeps of the file in memory, at most. With SQLite's own 2 MiB a turn costs a twentieth more."""

JOURNAL_SIZE_LIMIT = 64 * 1024 * 1024
"""Bytes that the write-ahead log's file keeps after a checkpoint; it may grow past that meanwhile."""

LONG_STATEMENT = 200_000
"""SQLite's steps, some 3 ms of work, after which a statement need not share a core any more.

They are counted over all executions of a prepared statement, so that one in many short ones goes for a moment too."""

_UNAVAILABLE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOTADB,
    }
)


class NoTransaction(Exception):
    """A statement came after SQLite had rolled the transaction back by itself, or before it was begun.

    Were it carried out, it would commit alone.
    """


class Driver(sqlite3.Connection):
    """A connection on which a unit's statements run within a transaction or not at all.

    SQLite ends a transaction by itself on some errors (disk full). A unit of work that goes on
    after one would write each further row durably and alone.
    """

    guarded = False

    def control(self, sql: str) -> sqlite3.Cursor:
        """Run a statement of the store's own: BEGIN, COMMIT, SAVEPOINT, PRAGMA."""
        return super().cursor().execute(sql)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        if self.guarded and not self.in_transaction:
            raise NoTransaction
        return super().cursor(*args, **kwargs)


def error_code(error: BaseException | None) -> int | None:
    """SQLite's primary result code behind `error`, None if there is none."""
    if isinstance(error, DBAPIError):
        error = error.orig
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        return None if code is None else code & 0xFF
    return None


def is_unavailable(error: BaseException | None) -> bool:
    """Whether `error` speaks of the disk or the file and not of the statement."""
    return isinstance(error, NoTransaction) or error_code(error) in _UNAVAILABLE


def make_engine(path: Path) -> Engine:
    """An engine whose connections begin and end no transaction: their user says BEGIN and COMMIT.

    One engine for all connections of a store, since it keeps the compiled statements.
    """

    def connect() -> Driver:
        # isolation_level None: neither the driver nor SQLAlchemy's pool of one puts in a BEGIN.
        # A reader's connection is closed by the thread that closes the store.
        return sqlite3.connect(
            path,
            isolation_level=None,
            timeout=BUSY_TIMEOUT_MS / 1000,
            check_same_thread=False,
            cached_statements=256,
            factory=Driver,
        )

    # What is bound is what people and models said: it has no place in an exception's text or a log.
    return create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)


def driver(connection: Connection) -> Driver:
    """The driver's own connection behind SQLAlchemy's."""
    return cast(Driver, connection.connection.dbapi_connection)


def open_writer(engine: Engine) -> Connection:
    """A connection that writes durably: a commit returns when it is on the disk."""
    return _opened(
        engine,
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        "PRAGMA foreign_keys = ON",
        f"PRAGMA cache_size = -{CACHE_KIB}",
        f"PRAGMA journal_size_limit = {JOURNAL_SIZE_LIMIT}",
    )


def open_reader(engine: Engine) -> Connection:
    """A connection that cannot write."""
    return _opened(engine, "PRAGMA query_only = ON")


def _opened(engine: Engine, *pragmas: str) -> Connection:
    connection = engine.connect()
    try:
        raw = driver(connection)
        for pragma in pragmas:
            raw.control(pragma)
        # The interpreter's lock is free while SQLite works. Its user takes the thread back: `cores.come_back`.
        raw.set_progress_handler(cores.roam, LONG_STATEMENT)
        raw.guarded = True
    except BaseException:
        dispose(connection)
        raise
    return connection


def dispose(connection: Connection) -> None:
    """Close the connection, whatever state it is in."""
    connection.invalidate()
    connection.close()


def create_file(path: Path) -> None:
    """Make the file if it is not there, for its owner alone: it holds what was said and hashes of tokens.

    SQLite gives its log and shared memory the same mode.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
