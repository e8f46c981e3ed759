"""A database as a whole: copied while a gateway writes to it, and looked over while nobody does.

All functions block, some for as long as it takes to read the file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.exc import DBAPIError

from corral.storage._sqlite_connections import (
    BUSY_TIMEOUT_MS,
    create_file,
    dispose,
    driver,
    make_engine,
    open_reader,
    open_writer,
)
from corral.storage.repositories import Transaction
from corral.storage.schema import HEAD, SchemaRefused, prepare

Progress = Callable[[int, int], None]
"""Called with what is done and the whole, in pages."""

_PAGES_AT_ONCE = 2_048
_SHOWN = 5


class Unreadable(Exception):
    """The file is no database that can be read to its end; the text is SQLite's."""


def snapshot(source: Path, target: Path, progress: Progress = lambda _done, _whole: None) -> None:
    """Copy the database `source` as it is at one instant to `target`, a new file of mode 0600, on the disk.

    The gateway may write meanwhile and is not held up: the copy is read from one snapshot of the log,
    which only cannot be emptied until the copy is made. Raises Unreadable, OSError.
    """
    create_file(target)
    try:
        # Not read-only: what a gateway that was killed left in the log may have to be read in first.
        with closing(_connect(source, "rw")) as reader, closing(_connect(target, "rw")) as copy:
            reader.execute("PRAGMA query_only = ON")
            copy.execute("PRAGMA synchronous = OFF")
            # Within a transaction the snapshot stays the same from one step to the next; without one, each
            # commit of the gateway would make the copy begin anew.
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
            reader.backup(
                copy,
                pages=_PAGES_AT_ONCE,
                progress=lambda _status, left, whole: progress(whole - left, whole),
                sleep=0.01,
            )
            reader.rollback()
            copy.execute("PRAGMA synchronous = FULL")
            # One file without a log: the gateway that opens it takes up a log again.
            copy.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        raise Unreadable(str(error)) from error


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None
    )


@contextmanager
def reading(path: Path) -> Iterator[Transaction]:
    """A transaction that only reads, on a database that no gateway has open."""
    connection = open_reader(make_engine(path))
    try:
        driver(connection).control("BEGIN")
        yield Transaction(connection)
    finally:
        dispose(connection)


def schema_of(path: Path) -> str:
    """The revision of a database's schema. Raises Unreadable if it has none that this program knows."""
    try:
        with closing(_connect(path, "ro")) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise Unreadable(str(error)) from error
    if row is None or not str(row[0]).isdigit():
        raise Unreadable("it has no schema of Corral's")
    if str(row[0]) > HEAD:
        raise Unreadable(f"it was written by a newer Corral (schema {row[0]}, this one knows {HEAD})")
    return str(row[0])


def last_records(path: Path) -> dict[str, int]:
    """The last audit record of each tenant, in a database of any schema. Raises Unreadable."""
    try:
        with closing(_connect(path, "ro")) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'audit_log'").fetchone():
                return {}
            return dict(connection.execute("SELECT tenant_id, max(id) FROM audit_log GROUP BY tenant_id"))
    except sqlite3.Error as error:
        raise Unreadable(str(error)) from error


def bring_up_to_date(path: Path) -> None:
    """Migrate a database that no gateway has open to this program's schema. Raises Unreadable."""
    connection = open_writer(make_engine(path))
    try:
        raw = driver(connection)
        # A migration may rebuild tables that others refer to; within a transaction this cannot be set.
        raw.control("PRAGMA foreign_keys = OFF")
        raw.control("BEGIN IMMEDIATE")
        prepare(connection)
        raw.control("COMMIT")
        raw.control("PRAGMA journal_mode = DELETE")
    except (SchemaRefused, sqlite3.Error, DBAPIError) as error:
        raise Unreadable(str(getattr(error, "orig", error))) from error
    finally:
        dispose(connection)


def damage(path: Path, *, thorough: bool) -> list[str]:
    """What SQLite finds wrong with the file, and rows that refer to others that are not there; empty if sound.

    `thorough` also compares every index with its table, which takes several times as long.
    """
    try:
        with closing(_connect(path, "ro")) as connection:
            check = "PRAGMA integrity_check(5)" if thorough else "PRAGMA quick_check(5)"
            found = [str(row[0]) for row in connection.execute(check)]
            problems = [] if found == ["ok"] else found
            for table, row_id, parent, _ in connection.execute("PRAGMA foreign_key_check").fetchmany(_SHOWN):
                problems.append(f"row {row_id} of {table} refers to a row of {parent} that is not there")
    except sqlite3.Error as error:
        return [str(error)]
    return problems


# Each text as it stands: none is put together.
_INVARIANTS = {
    "the journal of session {1} has a gap or does not end where the session does": """
        SELECT s.tenant_id, s.id FROM sessions s LEFT JOIN (
            SELECT tenant_id, session_id, count(*) AS n, min(version) AS first, max(version) AS last
            FROM journal GROUP BY tenant_id, session_id
        ) j ON j.tenant_id = s.tenant_id AND j.session_id = s.id
        WHERE s.state_version <> coalesce(j.last, 0) OR s.state_version <> coalesce(j.n, 0) OR coalesce(j.first, 1) <> 1
    """,
    "run {1} has ended without an event that says so, with two, or with one before its end": """
        SELECT r.tenant_id, r.id FROM runs r
        WHERE (SELECT count(*) FROM journal j WHERE j.tenant_id = r.tenant_id AND j.session_id = r.session_id
               AND j.run_id = r.id AND j.run_id IS NOT NULL AND j.event IN ('agent.completed', 'agent.failed'))
            <> (CASE WHEN r.status NOT IN ('completed', 'failed', 'aborted') THEN 0 ELSE 1 END)
    """,
    "run {1} is on and its session does not know it": """
        SELECT r.tenant_id, r.id FROM runs r JOIN sessions s ON s.tenant_id = r.tenant_id AND s.id = r.session_id
        WHERE r.status NOT IN ('completed', 'failed', 'aborted') AND s.active_run_id IS NOT r.id
    """,
    "session {1} is said to run a run that has ended": """
        SELECT s.tenant_id, s.id FROM sessions s WHERE s.active_run_id IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM runs r WHERE r.tenant_id = s.tenant_id AND r.id = s.active_run_id
                AND r.status NOT IN ('completed', 'failed', 'aborted'))
    """,
    "call {1} was started though it had been denied": """
        SELECT tenant_id, id FROM tool_runs WHERE started_at IS NOT NULL AND decision = 'deny'
    """,
}


def contradictions(path: Path) -> list[str]:
    """Where rows contradict each other, in words with ids: the invariants of a store that a query can check."""
    found = []
    try:
        with closing(_connect(path, "ro")) as connection:
            for words, query in _INVARIANTS.items():
                found += [words.format(*row) for row in connection.execute(query).fetchmany(_SHOWN)]
    except sqlite3.Error as error:
        raise Unreadable(str(error)) from error
    return found


def abort_unfinished(path: Path, now_ms: int) -> int:
    """Note of every run that has not ended that it is to be aborted; how many.

    The next gateway ends them when it takes them up. For a database that no gateway has open.
    """
    with closing(_connect(path, "rw")) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        return connection.execute(
            "UPDATE runs SET abort_requested_at = coalesce(abort_requested_at, ?) "
            "WHERE status NOT IN ('completed', 'failed', 'aborted')",
            (now_ms,),
        ).rowcount


def note(path: Path, name: str, value: str) -> None:
    """Set one of `store_meta`'s names. For a database that no gateway has open."""
    with closing(_connect(path, "rw")) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("INSERT OR REPLACE INTO store_meta (name, value) VALUES (?, ?)", (name, value))


def unfinished(path: Path) -> int:
    """How many runs have not ended."""
    with closing(_connect(path, "ro")) as connection:
        query = "SELECT count(*) FROM runs WHERE status NOT IN ('completed', 'failed', 'aborted')"
        count: int = connection.execute(query).fetchone()[0]
        return count
