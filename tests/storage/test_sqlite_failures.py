"""The SQLite store when the process, the disk or a thread fails: real ones."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from corral.storage._sqlite_connections import CACHE_KIB, driver
from corral.storage.api import StoreUnavailable
from corral.storage.repositories import Transaction
from corral.storage.sqlite import SqliteStore
from tests.storage.make import A, FixedClock, append, audit, session
from tests.support import needs

MEGABYTE = 1024 * 1024


async def open_store(path: Path) -> SqliteStore:
    return await SqliteStore.open(path, FixedClock())


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await open_store(tmp_path / "corral.db")
    await store.write(lambda tx: tx.sessions.insert(session()))
    yield store
    await store.close()


async def versions(store: SqliteStore, session_id: str = "s_1") -> list[int]:
    entries = await store.read(lambda tx: tx.journal.after(A, session_id, 0, 1_000_000))
    return [entry.version for entry in entries]


@pytest.mark.parametrize("lines", [1, 50, 700])
async def test_what_was_acknowledged_is_there_after_kill_9(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "corral.db"
    acknowledged = write_until_killed(path, lines)
    store = await open_store(path)
    try:
        assert store.clean_start is False
        assert await store.quick_check() == []
        for name, version in acknowledged.items():
            there = await versions(store, name)
            assert there == list(range(1, len(there) + 1))
            assert len(there) >= version
            row = await store.read(lambda tx, name=name: tx.sessions.get(A, name))  # type: ignore[misc]
            assert row is not None
            assert row.state_version == len(there)
    finally:
        await store.close()


def write_until_killed(path: Path, lines: int) -> dict[str, int]:
    """Kill a writing process after `lines` acknowledgements; the last version acknowledged of each session."""
    argv = [sys.executable, "-m", "tests.storage.crash_writer", str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        output = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        output += process.stdout.readlines()
    acknowledged: defaultdict[str, int] = defaultdict(int)
    for line in output:
        name, version = line.decode().split()
        acknowledged[name] = max(acknowledged[name], int(version))
    assert len(output) >= lines
    return acknowledged


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    needs.mount()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "corral-test", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", path], check=True)


def fill_disk(path: Path) -> Path:
    """Fill the file system with one file; its path."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 512):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler


async def test_a_full_disk_is_unavailable_nothing_is_half_written_and_it_recovers(small_disk: Path) -> None:
    store = await open_store(small_disk / "corral.db")
    heard: list[object] = []
    store.add_listener(heard.extend)
    try:
        await store.write(lambda tx: tx.sessions.insert(session()))
        assert await store.write(lambda tx: append(tx).version) == 1
        filler = fill_disk(small_disk)

        def work(tx: Transaction) -> None:
            append(tx)
            tx.outputs.insert(A, "s_1", "call_1", b"y" * MEGABYTE)
            append(tx)

        failed = await asyncio.gather(*(store.write(work) for _ in range(5)), return_exceptions=True)
        for error in failed:
            assert isinstance(error, StoreUnavailable)
            assert str(small_disk) not in str(error)
            assert error.retryable
        assert len(heard) == 1
        assert await versions(store) == [1]
        assert await store.read(lambda tx: tx.outputs.read(A, "call_1", 0, 9)) is None

        filler.unlink()
        assert await store.check_writable() is True
        assert await store.write(lambda tx: append(tx).version) == 2
        assert await store.quick_check() == []
    finally:
        await store.close()


async def test_a_unit_too_large_for_the_disk_fails_alone(small_disk: Path) -> None:
    store = await open_store(small_disk / "corral.db")
    try:
        await store.write(lambda tx: tx.sessions.insert(session()))

        def large(tx: Transaction) -> None:
            tx.outputs.insert(A, "s_1", "call_1", b"y" * (3 * MEGABYTE))

        results = await asyncio.gather(
            *(store.write(large) if n == 3 else store.write(lambda tx: append(tx).version) for n in range(8)),
            return_exceptions=True,
        )
        assert isinstance(results.pop(3), StoreUnavailable)
        assert results == list(range(1, 8))
        assert await versions(store) == list(range(1, 8))
    finally:
        await store.close()


async def in_one_group(store: SqliteStore, *works: Callable[[Transaction], object]) -> list[object]:
    """The results or exceptions of units that are committed together if they can be."""
    queued = threading.Event()
    first = asyncio.create_task(store.write(lambda tx: queued.wait(30)))
    tasks = [asyncio.create_task(store.write(work)) for work in works]
    await asyncio.sleep(0)  # all are handed over; they wait behind the first
    queued.set()
    assert await first
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)


async def test_a_connection_that_became_read_only_fails_one_unit_and_holds_up_no_other(store: SqliteStore) -> None:
    """Here SQLite keeps the transaction, with its lock, after the error."""

    def read_only(tx: Transaction) -> None:
        append(tx)
        driver(tx.sessions._connection._connection).control("PRAGMA query_only = ON")
        append(tx)

    append_one: Callable[[Transaction], object] = lambda tx: append(tx).version  # noqa: E731
    results = await in_one_group(store, append_one, read_only, append_one)
    assert isinstance(results[1], StoreUnavailable)
    assert [results[0], results[2]] == [1, 2]
    assert await versions(store) == [1, 2]


async def test_a_database_at_its_largest_is_unavailable_to_the_unit_that_would_make_it_larger(
    store: SqliteStore,
) -> None:
    """SQLite ends the whole transaction here; the other units of the group are carried out all the same."""

    def limit(tx: Transaction) -> None:
        raw = driver(tx.sessions._connection._connection)
        (pages,) = raw.control("PRAGMA page_count").fetchone()
        raw.control(f"PRAGMA max_page_count = {pages + 10}")

    await store.write(limit)
    results = await in_one_group(
        store,
        lambda tx: append(tx).version,
        lambda tx: tx.outputs.insert(A, "s_1", "call_1", b"y" * MEGABYTE),
        lambda tx: append(tx).version,
    )
    assert isinstance(results[1], StoreUnavailable)
    assert [results[0], results[2]] == [1, 2]
    assert await versions(store) == [1, 2]


async def test_readyz_says_no_on_a_full_disk(small_disk: Path) -> None:
    store = await open_store(small_disk / "corral.db")
    try:
        fill_disk(small_disk)
        # The log may have pages to spare; each write takes some of them.
        for _ in range(2000):
            if not await store.check_writable():
                break
        assert await store.check_writable() is False
    finally:
        await store.close()


async def test_a_unit_that_goes_on_after_the_disk_was_full_writes_nothing(small_disk: Path) -> None:
    store = await open_store(small_disk / "corral.db")
    try:
        await store.write(lambda tx: tx.sessions.insert(session()))
        filler = fill_disk(small_disk)

        def stubborn(tx: Transaction) -> str:
            append(tx)
            try:
                # Larger than SQLite's cache, so that it must be written before the commit.
                tx.outputs.insert(A, "s_1", "call_1", b"y" * (CACHE_KIB * 1024 + MEGABYTE))
            except Exception:
                filler.unlink(missing_ok=True)  # from here on there would be room
                append(tx)
            return "done"

        with pytest.raises(StoreUnavailable):
            await store.write(stubborn)
        assert await versions(store) == []
        assert await store.write(lambda tx: append(tx).version) == 1
    finally:
        await store.close()


async def test_a_unit_that_hides_the_loss_of_its_transaction_behind_an_error_is_unavailable(store: SqliteStore) -> None:
    def hiding(tx: Transaction) -> None:
        append(tx)
        driver(tx.sessions._connection._connection).rollback()  # as SQLite does by itself on some errors
        raise LookupError

    with pytest.raises(StoreUnavailable):
        await store.write(hiding)
    assert await store.write(lambda tx: append(tx).version) == 1


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes meanwhile: writing then fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_an_input_output_error_is_unavailable_and_the_store_recovers(store: SqliteStore) -> None:
    assert await store.write(lambda tx: append(tx).version) == 1
    with file_size_limit(0):
        results = await asyncio.gather(*(store.write(append) for _ in range(5)), return_exceptions=True)
        assert [type(result) for result in results] == [StoreUnavailable] * 5
        assert await store.check_writable() is False
        assert await versions(store) == [1]
    assert await store.check_writable() is True
    assert await store.write(lambda tx: append(tx).version) == 2
    assert await versions(store) == [1, 2]


async def test_a_read_only_disk_is_unavailable_and_the_store_recovers(small_disk: Path) -> None:
    path = small_disk / "corral.db"
    await (await open_store(path)).close()
    remount(small_disk, "ro")
    with pytest.raises(StoreUnavailable) as refused:
        await open_store(path)
    assert str(small_disk) not in str(refused.value)
    remount(small_disk, "rw")
    store = await open_store(path)
    try:
        assert await store.check_writable() is True
    finally:
        await store.close()


async def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "corral.db"
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(StoreUnavailable):
        await open_store(path)
    assert path.read_bytes() == b"this is no database" * 1000


async def test_a_damaged_file_is_found_by_the_quick_check(tmp_path: Path) -> None:
    path = tmp_path / "corral.db"
    store = await open_store(path)
    for number in range(300):
        await store.write(lambda tx, n=number: tx.sessions.insert(session(f"s_{n}", title="x" * 500)))  # type: ignore[misc]
    assert await store.quick_check() == []
    await store.close()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size * 3 // 4)
        file.write(b"\xff" * 20_000)
    store = await open_store(path)
    try:
        assert await store.quick_check() != []
    finally:
        await store.close()


async def test_a_tenant_whose_name_is_no_text_is_no_tenant_and_no_other_error_passes_for_that(
    store: SqliteStore, tmp_path: Path
) -> None:
    """What walks all chains would else find all in order where it has seen none of them."""
    for number in (1, 2):
        await store.write(lambda tx, n=number: tx.audit.append(audit(n)))  # type: ignore[misc]
    with closing(sqlite3.connect(tmp_path / "corral.db", isolation_level=None)) as database:
        database.execute("UPDATE audit_log SET tenant_id = CAST(x'ff41' AS TEXT) WHERE id = 2")
        assert await store.read(lambda tx: tx.audit.tenants()) == [A]
        database.execute("ALTER TABLE audit_log RENAME TO gone")
        with pytest.raises(OperationalError, match="no such table"):
            await store.read(lambda tx: tx.audit.tenants())


async def test_nobody_waits_for_ever_when_the_writer_dies(store: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
    thread = store._thread
    assert thread.ident is not None
    with caplog.at_level(logging.ERROR):
        # The interpreter raises it in that thread at its next step, which is to take the unit.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        results = await asyncio.wait_for(
            asyncio.gather(*(store.write(append) for _ in range(3)), return_exceptions=True), 30
        )
    assert [type(result) for result in results] == [StoreUnavailable] * 3
    assert [getattr(record, "action", None) for record in caplog.records] == ["store.writer_died"]
    assert await store.check_writable() is False
    await asyncio.wait_for(store.close(), 30)


async def test_a_connection_that_is_closed_under_the_writer_is_opened_anew(store: SqliteStore) -> None:
    def close_it(tx: Transaction) -> None:
        driver(tx.sessions._connection._connection).close()

    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.write(close_it), 30)
    assert await asyncio.wait_for(store.write(lambda tx: append(tx).version), 30) == 1

    def pragma(tx: Transaction, name: str) -> object:
        return driver(tx.sessions._connection._connection).control(f"PRAGMA {name}").fetchone()[0]

    assert await store.write(lambda tx: (pragma(tx, "foreign_keys"), pragma(tx, "synchronous"))) == (1, 2)


async def test_the_exception_of_a_unit_whose_caller_has_gone_is_logged(
    store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    def work(tx: Transaction) -> None:
        raise LookupError

    with caplog.at_level(logging.WARNING):
        task = asyncio.create_task(store.write(work))
        await asyncio.sleep(0)  # the unit is handed over
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.write(append)
    assert [getattr(record, "action", None) for record in caplog.records] == ["store.abandoned_unit_failed"]
