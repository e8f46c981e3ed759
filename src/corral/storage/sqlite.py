"""The store in one SQLite file: one thread that writes in groups, a few that read beside it.

A durable commit costs an fsync, whatever is in it. So the writer takes all units that wait, runs
them in one transaction, and commits them together: a hundred waiting writers cost one fsync. A unit
that raises is undone alone: where it has changed something, the group is rolled back and run once
more, each unit in a savepoint, which are not set before they are needed. Every method belongs to
the event loop's thread; `_Writer` belongs to its own.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from corral import cores, faults
from corral.clock import Clock
from corral.storage._sqlite_connections import (
    Driver,
    create_file,
    dispose,
    driver,
    error_code,
    is_unavailable,
    make_engine,
    open_writer,
)
from corral.storage._sqlite_readers import Readers
from corral.storage.api import Listener, Store, StoreUnavailable, Work
from corral.storage.repositories import AuditHead, Transaction
from corral.storage.rows import JournalEntry
from corral.storage.schema import SchemaRefused, prepare

T = TypeVar("T")

logger = logging.getLogger(__name__)

GROUP_LIMIT = 128
"""Units in one commit at most: bounds how long the first of them waits for the others."""

_CANNOT_WRITE = "the store cannot write now (disk full, read-only or failing); nothing was changed"
_CLOSED = "the store is closed"


@dataclass(slots=True, eq=False)
class _Unit:
    """One call of `write`, its outcome, and who waits for it."""

    work: Work[Any]
    on_commit: Callable[[Any], None] | None
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None
    entries: Sequence[JournalEntry] = field(default=())


class _GroupLost(Exception):
    """The transaction is gone, with every unit in it."""


class _UnitToUndo(Exception):
    """A unit has raised after it had changed something, and shares its transaction with others."""


class _Writer:
    """The connection that writes. Everything here runs in the writer's thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def open(self) -> bool:
        """Make or migrate the schema. Says whether the last process closed the store in order."""
        connection = self._connected()
        raw = driver(connection)
        # A migration may rebuild tables that others refer to; within a transaction this cannot be set.
        raw.control("PRAGMA foreign_keys = OFF")
        raw.control("BEGIN IMMEDIATE")
        try:
            if prepare(connection) and raw.control("PRAGMA foreign_key_check").fetchone() is not None:
                raise SchemaRefused("after the migration rows refer to others that are not there; it was undone")
            meta = Transaction(connection).meta
            clean = meta.get("clean") != "no"
            meta.set("clean", "no")
        except BaseException:
            raw.rollback()
            raise
        raw.control("COMMIT")
        raw.control("PRAGMA foreign_keys = ON")
        return clean

    def carry_out(self, units: Sequence[_Unit]) -> None:
        """Commit the units together, or failing that each by itself; the outcome is left in them."""
        try:
            try:
                self._attempt(units, _run_bare)
            except _UnitToUndo:
                # It was rolled back with its group, which is all that is due to a unit that was alone in it.
                if len(units) > 1:
                    self._attempt(units, _run_in_savepoint)
            return
        except _GroupLost as lost:
            logger.warning(
                "a group of %d units was lost, each is tried alone",
                len(units),
                extra={"action": "store.group_lost", "sqlite_code": error_code(lost.__cause__)},
            )
        # One unit may be what is too much for the disk; the others need not fail with it.
        for unit in units:
            try:
                self._attempt([unit], _run_in_savepoint)
            except _GroupLost as lost:
                unit.result, unit.entries = None, ()
                unit.error = StoreUnavailable(_CANNOT_WRITE)
                unit.error.__cause__ = lost.__cause__

    def _attempt(self, units: Sequence[_Unit], run: Callable[[_Group, _Unit], None]) -> None:
        """One transaction for `units`.

        Raises _GroupLost, with what SQLite said as its cause, and what `run` raises; nothing is changed then.
        """
        try:
            connection = self._connected()
            raw = driver(connection)
            raw.control("BEGIN IMMEDIATE")
            group = _Group(connection, raw)
            for unit in units:
                run(group, unit)
            _pass("commit.before", units)
            raw.control("COMMIT")
            _pass("commit.after", units)
        except _UnitToUndo:
            self._recover(None, keep=True)
            raise
        except _GroupLost as lost:
            self._recover(lost.__cause__)
            raise
        except (sqlite3.Error, DBAPIError) as error:
            self._recover(error)
            raise _GroupLost from error

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = open_writer(self._engine)
        return self._connection

    def _recover(self, error: BaseException | None, *, keep: bool = False) -> None:
        """Leave no transaction open, and no connection that would go on failing when the disk is well again."""
        if self._connection is None:
            return
        raw = driver(self._connection)
        try:
            # First of all the rollback: a connection closed within a transaction may keep its lock
            # for as long as a traceback keeps one of its cursors.
            if raw.in_transaction:
                raw.control("ROLLBACK")
            keep = keep or error_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)
        except sqlite3.Error:
            logger.warning("rollback failed", exc_info=True, extra={"action": "store.rollback_failed"})
            keep = False
        if not keep:
            # A file that was opened read-only stays so for its connection.
            self.abandon()

    def abandon(self) -> None:
        """Close the connection as it is."""
        connection, self._connection = self._connection, None
        if connection is not None:
            dispose(connection)

    def close(self) -> None:
        """Note that this was an orderly stop, put the log into the database, close it."""
        try:
            connection = self._connected()
            raw = driver(connection)
            raw.control("BEGIN IMMEDIATE")
            Transaction(connection).meta.set("clean", "yes")
            raw.control("COMMIT")
            raw.control("PRAGMA wal_checkpoint(TRUNCATE)")
        except (sqlite3.Error, DBAPIError) as error:
            # What was acknowledged is in the log; the next process reads it from there.
            logger.warning("no checkpoint at close", exc_info=True, extra={"action": "store.close_failed"})
            self._recover(error)
        self.abandon()


def _pass(point: faults.Point, units: Sequence[_Unit]) -> None:
    if faults.armed():
        entries = [entry for unit in units for entry in unit.entries]
        faults.reached(
            point, *(each for entry in entries for each in (entry.event, f"{entry.event}/{entry.session_id}"))
        )


@dataclass(slots=True)
class _Group:
    """The one transaction of several units, and what they know in common."""

    connection: Connection
    raw: Driver
    heads: dict[str, AuditHead] = field(default_factory=dict)


def _run_bare(group: _Group, unit: _Unit) -> None:
    """Run a unit without a savepoint, two statements less.

    Most that raise have only read by then: nothing is to be undone. Raises _UnitToUndo for one that has not.
    """
    before = group.raw.total_changes
    _run(group, unit)
    if unit.error is not None and group.raw.total_changes != before:
        raise _UnitToUndo


def _run_in_savepoint(group: _Group, unit: _Unit) -> None:
    group.raw.control("SAVEPOINT unit")
    _run(group, unit)
    if unit.error is not None:
        group.raw.control("ROLLBACK TO unit")
        group.heads.clear()
    group.raw.control("RELEASE unit")


def _run(group: _Group, unit: _Unit) -> None:
    """The unit's work; what it returned or raised is left in it. Raises _GroupLost."""
    transaction = Transaction(group.connection, group.heads)
    unit.result, unit.entries, unit.error = None, (), None
    try:
        unit.result = unit.work(transaction)
        unit.entries = transaction.appended
    except BaseException as error:  # whatever it is, it is the caller's, not the writer's
        if is_unavailable(error):
            raise _GroupLost from error
        unit.error = error
    # SQLite ends the whole transaction by itself on some errors, of which a unit may take no notice.
    if not group.raw.in_transaction:
        raise _GroupLost from unit.error


def _quick_check(connection: Connection) -> list[str]:
    try:
        # One step to SQLite, which may take minutes.
        with cores.roaming():
            found = [str(row[0]) for row in driver(connection).control("PRAGMA quick_check")]
    except sqlite3.DatabaseError as error:
        # Some damage is found as an error and not as a row.
        if error_code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        return [str(error)]
    return [] if found == ["ok"] else found


class SqliteStore(Store):
    """The journal and its projections in one SQLite file. Made by `open`."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._engine = make_engine(path)
        self._queue: SimpleQueue[_Unit | None] = SimpleQueue()
        self._waiting: set[_Unit] = set()
        self._listeners: list[Listener] = []
        self._readers = Readers(self._engine, self._loop)
        self._closed = False
        self._opened: asyncio.Future[bool] = self._loop.create_future()
        self._stopped = asyncio.Event()
        # A daemon, so that a store that nobody closed does not keep the process from ending.
        self._thread = threading.Thread(target=self._write_until_closed, name="corral-write", daemon=True)
        self.clean_start = True
        """Whether the last process closed the store in order; if not, `quick_check` is due."""

    @classmethod
    async def open(cls, path: Path, clock: Clock) -> SqliteStore:
        """Open the database at `path`, which is made if it is not there, and bring its schema up to date.

        One process at a time: the caller holds the data directory's lock. Raises StoreUnavailable
        if it cannot be opened or written, SchemaRefused if it is not for this program.
        """
        store = cls(path, clock)
        store._thread.start()
        try:
            store.clean_start = await asyncio.shield(store._opened)
            # A reader that stays keeps the log and its index in place when the writer has to open
            # anew on a full disk, where they could not be made again; and reads go on meanwhile.
            await store.read(lambda tx: tx.meta.get("clean"))
        except BaseException:
            await store.close()
            raise
        return store

    async def write(self, work: Work[T], on_commit: Callable[[T], None] | None = None) -> T:
        if self._closed:
            raise StoreUnavailable(_CLOSED)
        unit = _Unit(work, on_commit, self._loop.create_future())
        self._waiting.add(unit)
        self._queue.put(unit)
        result: T = await unit.future
        return result

    async def read(self, query: Work[T]) -> T:
        if self._closed:
            raise StoreUnavailable(_CLOSED)
        return await self._readers.submit(lambda connection: query(Transaction(connection)))

    def add_listener(self, listener: Listener) -> Callable[[], None]:
        self._listeners.append(listener)

        def remove() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return remove

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def check_writable(self) -> bool:
        now = str(self._clock.now_ms())
        try:
            await self.write(lambda tx: tx.meta.set("checked_at", now))
        except StoreUnavailable:
            return False
        return True

    async def quick_check(self) -> list[str]:
        """What SQLite's `quick_check` finds wrong with the file, on a reader; empty if it is sound.

        Reads the whole database. Raises StoreUnavailable if the disk fails.
        """
        if self._closed:
            raise StoreUnavailable(_CLOSED)
        return await self._readers.submit(_quick_check)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await self._stopped.wait()

    # --- the writer's thread -------------------------------------------------------------------

    def _write_until_closed(self) -> None:
        writer = _Writer(self._engine)
        try:
            try:
                if self._open(writer):
                    while units := self._next_group():
                        writer.carry_out(units)
                        cores.come_back()
                        self._on_loop(self._deliver, units)
                    self._readers.close()
                    writer.close()
            finally:
                self._readers.close()
                writer.abandon()
        except BaseException:
            logger.exception("the writer has died", extra={"action": "store.writer_died"})
        finally:
            # Whoever still waits must not wait for ever, whatever ended the thread. If the loop is
            # closed, nobody waits any more.
            with suppress(RuntimeError):
                self._on_loop(self._on_stopped)

    def _open(self, writer: _Writer) -> bool:
        try:
            create_file(self._path)
            clean = writer.open()
        except BaseException as error:
            unavailable = isinstance(error, OSError) or is_unavailable(error)
            self._on_loop(self._fail_open, StoreUnavailable(_CANNOT_WRITE) if unavailable else error, error)
            return False
        self._on_loop(self._opened.set_result, clean)
        return True

    def _next_group(self) -> list[_Unit]:
        """What waits now, up to the limit; blocks until there is something. Empty once closed."""
        unit = self._queue.get()
        units: list[_Unit] = []
        while unit is not None:
            units.append(unit)
            if len(units) == GROUP_LIMIT:
                return units
            try:
                unit = self._queue.get_nowait()
            except Empty:
                return units
        if units:
            self._queue.put(None)  # closed: first this group, then the end; nothing is put after it
        return units

    def _on_loop(self, callback: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(callback, *args)

    # --- back on the loop ----------------------------------------------------------------------

    def _fail_open(self, error: BaseException, cause: BaseException) -> None:
        if error is not cause:
            error.__cause__ = cause
        self._opened.set_exception(error)

    def _deliver(self, units: Sequence[_Unit]) -> None:
        """In commit order: what the unit's own caller sends first, then its events, then its result."""
        for unit in units:
            self._waiting.discard(unit)
            if unit.error is not None:
                self._fail(unit, unit.error)
                continue
            _pass("publish.before", [unit])
            if unit.on_commit is not None:
                self._call(unit.on_commit, unit.result)
            _pass("publish.between", [unit])
            if unit.entries:
                for listener in tuple(self._listeners):
                    self._call(listener, unit.entries)
            if not unit.future.done():
                unit.future.set_result(unit.result)

    def _fail(self, unit: _Unit, error: BaseException) -> None:
        if isinstance(error, StopIteration):
            cause, error = error, RuntimeError("StopIteration in a unit of work")  # no future takes that one
            error.__cause__ = cause
        if unit.future.done():
            logger.warning(
                "a unit failed whose caller was cancelled",
                exc_info=error,
                extra={"action": "store.abandoned_unit_failed"},
            )
        else:
            unit.future.set_exception(error)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        # The unit is committed: a mistake in one hearer changes nothing for the others.
        try:
            function(argument)
        except Exception:
            logger.exception("a hearer of a commit failed", extra={"action": "store.hearer_failed"})

    def _on_stopped(self) -> None:
        self._closed = True
        for unit in self._waiting:
            self._fail(unit, StoreUnavailable(_CLOSED))
        self._waiting.clear()
        self._stopped.set()
