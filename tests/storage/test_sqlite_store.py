"""What the SQLite store does besides what every store must do."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from corral.storage._sqlite_connections import driver
from corral.storage._sqlite_readers import READERS
from corral.storage.api import StoreUnavailable, Work
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry
from corral.storage.sqlite import SqliteStore
from tests.storage.make import A, FixedClock, append, audit, session


def modes(directory: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}


async def open_store(path: Path) -> SqliteStore:
    return await SqliteStore.open(path, FixedClock())


def version_after(tx: Transaction) -> int:
    return append(tx).version


async def test_writers_that_wait_together_share_a_commit(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    statements: list[str] = []
    try:
        for number in range(64):
            await store.write(lambda tx, n=number: tx.sessions.insert(session(f"s_{n}")))  # type: ignore[misc]
        await store.write(lambda tx: driver(tx.sessions._connection._connection).set_trace_callback(statements.append))

        async def writer(number: int) -> None:
            for _ in range(10):
                await store.write(lambda tx: append(tx, f"s_{number}"))

        await asyncio.gather(*(writer(number) for number in range(64)))
    finally:
        await store.close()
    commits = [sql for sql in statements if sql.startswith("COMMIT")]
    units = [sql for sql in statements if sql.startswith("INSERT INTO journal")]
    assert len(units) == 640
    assert 10 <= len(commits) <= 128


class Oops(Exception):
    """Raised by units that are to fail."""


async def carried_out_together(store: SqliteStore, *units: Work[object]) -> tuple[list[object], list[str]]:
    """What came of units that were committed as one group; and the group's statements that order transactions."""
    told, go_on, statements = threading.Event(), threading.Event(), list[str]()

    def hold(tx: Transaction) -> None:
        driver(tx.sessions._connection._connection).set_trace_callback(statements.append)
        told.set()
        assert go_on.wait(30)

    holding = asyncio.create_task(store.write(hold))
    try:
        assert await asyncio.to_thread(told.wait, 30)
        together = [asyncio.ensure_future(store.write(unit)) for unit in units]
        await asyncio.sleep(0)
        assert store.waiting == len(units) + 1
    finally:
        go_on.set()
    await holding
    results = await asyncio.gather(*together, return_exceptions=True)
    control = [sql for sql in statements if sql.split()[0] not in ("SELECT", "INSERT", "UPDATE", "DELETE")]
    return list(results), control[control.index("COMMIT") + 1 :]


def write_and_fail(tx: Transaction) -> None:
    append(tx)
    raise Oops


def read_and_fail(tx: Transaction) -> None:
    assert tx.sessions.get(A, "s_1") is not None
    raise Oops


async def test_units_that_succeed_or_have_only_read_cost_no_savepoints(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    try:
        await store.write(lambda tx: tx.sessions.insert(session()))
        results, control = await carried_out_together(store, version_after, read_and_fail, version_after)
        assert [type(result) for result in results] == [int, Oops, int]
        assert (results[0], results[2]) == (1, 2)
        assert control == ["BEGIN IMMEDIATE", "COMMIT"]
    finally:
        await store.close()


async def test_a_unit_that_fails_after_a_change_is_undone_alone(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    heard: list[JournalEntry] = []
    try:
        await store.write(lambda tx: tx.sessions.insert(session()))
        store.add_listener(heard.extend)
        results, control = await carried_out_together(store, version_after, write_and_fail, version_after)
        assert [type(result) for result in results] == [int, Oops, int]
        assert (results[0], results[2]) == (1, 2)
        assert [entry.version for entry in heard] == [1, 2]
        assert await store.read(lambda tx: tx.journal.after(A, "s_1", 0, 9)) == heard
        # Tried together, rolled back, and run again with a way to undo the one that fails.
        assert control[:2] == ["BEGIN IMMEDIATE", "ROLLBACK"]
        assert control.count("SAVEPOINT unit") == 3
        assert control.count("ROLLBACK TO unit") == 1
        assert control[-1] == "COMMIT"
    finally:
        await store.close()


async def test_a_unit_alone_in_its_group_that_fails_after_a_change_is_not_run_again(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    try:
        await store.write(lambda tx: tx.sessions.insert(session()))
        results, control = await carried_out_together(store, write_and_fail)
        assert [type(result) for result in results] == [Oops]
        assert control == ["BEGIN IMMEDIATE", "ROLLBACK"]
        assert await store.write(version_after) == 1
    finally:
        await store.close()


def record(tx: Transaction) -> tuple[int, str]:
    head = tx.audit.head(A)
    number = 1 if head is None else head.id + 1
    row = audit(number, prev_hash="first" if head is None else head.hash, hash=f"hash of {number}")
    tx.audit.append(row)
    return number, row.prev_hash


def record_and_fail(tx: Transaction) -> None:
    record(tx)
    raise Oops


async def test_the_audit_chain_goes_on_from_unit_to_unit_of_a_group_without_what_was_undone(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    try:
        assert await store.write(record) == (1, "first")
        results, _ = await carried_out_together(store, record, record)
        assert results == [(2, "hash of 1"), (3, "hash of 2")]
        results, _ = await carried_out_together(store, record, record_and_fail, record)
        assert [results[0], results[2]] == [(4, "hash of 3"), (5, "hash of 4")]
        assert await store.write(record) == (6, "hash of 5")
        assert await store.write(lambda tx: [record(tx), tx.audit.delete_through(A, 7), record(tx)]) == [
            (7, "hash of 6"),
            7,
            (1, "first"),
        ]
    finally:
        await store.close()


async def test_the_database_is_durable_and_checked_as_the_design_says(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")

    def pragma(tx: Transaction, name: str) -> object:
        return driver(tx.sessions._connection._connection).control(f"PRAGMA {name}").fetchone()[0]

    try:
        found = await store.write(
            lambda tx: {n: pragma(tx, n) for n in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")}
        )
        assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
        assert await store.read(lambda tx: pragma(tx, "query_only")) == 1
    finally:
        await store.close()


async def test_a_journal_entry_needs_its_session(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")

    def fill(tx: Transaction) -> None:
        tx.sessions.insert(session())
        append(tx)

    def work(tx: Transaction) -> None:
        driver(tx.sessions._connection._connection).cursor().execute("DELETE FROM sessions")

    try:
        await store.write(fill)
        with pytest.raises(sqlite3.IntegrityError):
            await store.write(work)
    finally:
        await store.close()


async def test_an_error_of_the_database_does_not_quote_what_was_written(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    try:
        await store.write(lambda tx: tx.sessions.insert(session()))
        with pytest.raises(IntegrityError) as refused:
            await store.write(lambda tx: tx.sessions.insert(session(title="canary-9f2")))
        assert "canary-9f2" not in str(refused.value)
    finally:
        await store.close()


async def test_an_orderly_stop_is_noted_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "corral.db"
    store = await open_store(path)
    assert store.clean_start is True
    await store.write(lambda tx: tx.sessions.insert(session()))
    await store.close()
    assert modes(tmp_path).keys() == {"corral.db"}
    store = await open_store(path)
    assert store.clean_start is True
    assert await store.read(lambda tx: tx.sessions.get(A, "s_1")) == session()
    await store.close()


async def test_the_files_are_the_owners_alone(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    try:
        await store.check_writable()
        assert modes(tmp_path) == dict.fromkeys(("corral.db", "corral.db-wal", "corral.db-shm"), 0o600)
    finally:
        await store.close()


async def test_reads_go_on_while_a_unit_is_written(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    go_on = threading.Event()

    def slow(tx: Transaction) -> None:
        tx.sessions.insert(session())
        assert go_on.wait(30)

    try:
        writing = asyncio.create_task(store.write(slow))
        assert await asyncio.wait_for(store.read(lambda tx: tx.sessions.get(A, "s_1")), 30) is None
        go_on.set()
        await writing
        assert await store.read(lambda tx: tx.sessions.get(A, "s_1")) == session()
    finally:
        go_on.set()
        await store.close()


def reading_threads() -> int:
    return sum(thread.name.startswith("corral-read") for thread in threading.enumerate())


async def test_readers_are_started_as_they_are_needed_up_to_their_number(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "corral.db")
    go_on = threading.Event()
    try:
        for _ in range(9):
            await store.read(lambda tx: tx.sessions.get(A, "s_1"))
        assert reading_threads() == 1
        reads = [asyncio.ensure_future(store.read(lambda _tx: go_on.wait(30))) for _ in range(READERS + 3)]
        await asyncio.sleep(0)
        assert reading_threads() == READERS
        # What nobody waits for any more is let go; the others are answered.
        reads[-1].cancel()
        go_on.set()
        assert await asyncio.gather(*reads[:-1]) == [True] * (READERS + 2)
    finally:
        go_on.set()
        await store.close()
    assert reading_threads() == 0


async def test_readers_that_are_closed_refuse_and_let_nobody_wait(tmp_path: Path) -> None:
    # As it is for a moment when the writer dies: the readers are closed, the store does not know it yet.
    store = await open_store(tmp_path / "corral.db")
    try:
        await asyncio.to_thread(store._readers.close)
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(store.read(lambda tx: tx.sessions.get(A, "s_1")), 30)
    finally:
        await store.close()


async def test_no_thread_is_left_after_close(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    store = await open_store(tmp_path / "corral.db")
    await asyncio.gather(*(store.read(lambda tx: tx.sessions.get(A, "s_1")) for _ in range(8)))
    await store.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert set(threading.enumerate()) <= before


def test_importing_the_store_imports_no_alembic() -> None:
    code = "import sys, corral.storage.sqlite; print([m for m in sys.modules if m.startswith('alembic')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_fresh_database_is_made_without_alembic(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys, pathlib, corral.clock, corral.storage.sqlite as s\n"
        "async def main():\n"
        "    for _ in range(2):\n"
        "        store = await s.SqliteStore.open(pathlib.Path(sys.argv[1]), corral.clock.SystemClock())\n"
        "        await store.close()\n"
        "asyncio.run(main())\n"
        "print('alembic' in sys.modules)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "corral.db")]
    found = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
