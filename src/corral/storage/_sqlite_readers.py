"""The threads that read beside the writer, each on a connection of its own that cannot write."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from corral import cores
from corral.storage._sqlite_connections import (
    NoTransaction,
    dispose,
    driver,
    error_code,
    is_unavailable,
    open_reader,
)
from corral.storage.api import StoreUnavailable

T = TypeVar("T")

Query = Callable[[Connection], Any]

READERS = 4

_CANNOT_READ = "the store cannot be read now (the disk or the file fails)"
_CLOSED = "the store is closed"


class Readers:
    """At most `READERS` threads, started when they are needed, that carry out queries for the event loop.

    A pool of `concurrent.futures` does the same with futures of its own between the thread and the
    loop, which cost a turn more than the reading. `submit` belongs to the loop's thread, `close` to any other.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._queue: SimpleQueue[tuple[Query, asyncio.Future[Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        # How many queries are submitted and not answered; the loop's alone.
        self._asked = 0
        # Orders `submit` and `close`: what was submitted before is carried out, and nothing lies in the queue after.
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, query: Callable[[Connection], T]) -> asyncio.Future[T]:
        """Run `query` in a snapshot of what is committed; what it returns or raises is the future's.

        Raises StoreUnavailable once closed; so does the future if the disk or the file fails.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        with self._lock:
            if self._closed:
                raise StoreUnavailable(_CLOSED)
            self._asked += 1
            if self._asked > len(self._threads) < READERS:
                name = f"corral-read-{len(self._threads)}"
                # Daemons, as the writer is.
                thread = threading.Thread(target=self._read_until_closed, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
            self._queue.put((query, future))
        return future

    def close(self) -> None:
        """Carry out what was submitted, then end. Blocks. May be called again."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
            for _ in threads:
                self._queue.put(None)
        for thread in threads:
            thread.join()

    def _read_until_closed(self) -> None:
        reader = _Reader(self._engine)
        try:
            while (asked := self._queue.get()) is not None:
                query, future = asked
                result, error = None, None
                if not future.cancelled():
                    try:
                        result = reader.in_snapshot(query)
                    except BaseException as problem:  # whatever it is, it is the caller's
                        error = problem
                # If the loop is closed, nobody waits any more.
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._answer, future, result, error)
                # The next one may be long in coming.
                del asked, query, future, result, error
        finally:
            reader.disconnect()

    def _answer(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._asked -= 1
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)


class _Reader:
    """One thread's connection, opened when it is needed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def in_snapshot(self, query: Callable[[Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = open_reader(self._engine)
            connection = self._connection
            raw = driver(connection)
            raw.control("BEGIN")
            try:
                return query(connection)
            finally:
                raw.rollback()
                cores.come_back()
        except StopIteration as error:
            raise RuntimeError("StopIteration in a query") from error  # no future takes that one
        except (sqlite3.Error, DBAPIError, NoTransaction) as error:
            # Read-only is what this connection is: a query that writes is a mistake in the program.
            if is_unavailable(error) and error_code(error) != sqlite3.SQLITE_READONLY:
                self.disconnect()
                raise StoreUnavailable(_CANNOT_READ) from error
            raise

    def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            dispose(connection)
