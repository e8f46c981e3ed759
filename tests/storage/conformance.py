"""What every store must do, whatever is behind it: units of work, their order, and the end.

A backend's test module makes subclasses of the classes here and of `conformance_rows` with a fixture
`store` that gives an open, empty store.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable

import pytest
from sqlalchemy.exc import IntegrityError

from corral.storage.api import Store, StoreUnavailable
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry
from tests.storage.make import NOW, A, append, session


class Oops(Exception):
    """Raised by units that are to fail."""


def insert_then_fail(tx: Transaction) -> None:
    tx.sessions.insert(session("s_failed"))
    append(tx, "s_failed")
    append(tx, "s_1")
    raise Oops


async def with_session(store: Store, session_id: str = "s_1") -> None:
    await store.write(lambda tx: tx.sessions.insert(session(session_id)))


class UnitsOfWork:
    async def test_what_a_unit_returns_is_returned_and_what_it_wrote_is_read(self, store: Store) -> None:
        def work(tx: Transaction) -> int:
            tx.sessions.insert(session())
            return append(tx).version

        assert await store.write(work) == 1
        found = await store.read(lambda tx: tx.sessions.get(A, "s_1"))
        assert found == session(state_version=1)
        assert [entry.version for entry in await store.read(lambda tx: tx.journal.after(A, "s_1", 0, 10))] == [1]

    async def test_a_unit_that_raises_leaves_nothing_behind_and_raises_at_its_caller(self, store: Store) -> None:
        await with_session(store)
        heard: list[JournalEntry] = []
        store.add_listener(heard.extend)
        with pytest.raises(Oops):
            await store.write(insert_then_fail, on_commit=lambda _: heard.append(None))  # type: ignore[arg-type]
        assert heard == []
        assert await store.read(lambda tx: tx.sessions.get(A, "s_failed")) is None
        assert await store.read(lambda tx: tx.journal.after(A, "s_1", 0, 10)) == []
        assert await store.write(lambda tx: append(tx).version) == 1

    async def test_a_failing_unit_takes_none_of_those_committed_with_it_along(self, store: Store) -> None:
        await with_session(store)
        units = [
            store.write(insert_then_fail) if n % 3 == 1 else store.write(lambda tx: append(tx).version)
            for n in range(30)
        ]
        results = await asyncio.gather(*units, return_exceptions=True)
        assert all(isinstance(result, Oops) for result in results[1::3])
        assert sorted(r for r in results if isinstance(r, int)) == list(range(1, 21))
        entries = await store.read(lambda tx: tx.journal.after(A, "s_1", 0, 100))
        assert [entry.version for entry in entries] == list(range(1, 21))

    async def test_a_unit_may_catch_a_row_that_is_taken_and_go_on(self, store: Store) -> None:
        await with_session(store)

        def work(tx: Transaction) -> int:
            append(tx)
            with pytest.raises(IntegrityError):
                tx.sessions.insert(session("s_1"))
            return append(tx).version

        if store_keeps_transaction_after_error(store):
            assert await store.write(work) == 2

    async def test_stop_iteration_from_a_unit_or_a_query_reaches_the_caller_as_a_runtime_error(
        self, store: Store
    ) -> None:
        def work(tx: Transaction) -> object:
            return next(iter(()))

        with pytest.raises(RuntimeError):
            await asyncio.wait_for(store.write(work), 30)
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(store.read(work), 30)

    async def test_a_query_sees_one_state_of_the_store(self, store: Store) -> None:
        await with_session(store)
        stop = False

        async def write() -> None:
            while not stop:
                await store.write(append)

        async def read() -> None:
            def query(tx: Transaction) -> tuple[int, int]:
                row = tx.sessions.get(A, "s_1")
                assert row is not None
                return row.state_version, len(tx.journal.after(A, "s_1", 0, 100_000))

            for _ in range(50):
                version, entries = await store.read(query)
                assert version == entries

        writer = asyncio.create_task(write())
        try:
            await asyncio.gather(read(), read())
        finally:
            stop = True
            await writer

    async def test_a_query_that_writes_changes_nothing(self, store: Store) -> None:
        def query(tx: Transaction) -> None:
            tx.sessions.insert(session("s_by_query"))

        with pytest.raises(Exception):  # noqa: B017, PT011 - which one is the backend's
            await store.read(query)
        assert await store.read(lambda tx: tx.sessions.get(A, "s_by_query")) is None

    async def test_versions_have_no_gap_and_no_repeat_under_64_writers(self, store: Store) -> None:
        names = [f"s_{n}" for n in range(8)]
        for name in names:
            await with_session(store, name)
        heard: defaultdict[str, list[int]] = defaultdict(list)
        feed: list[int] = []

        def listen(entries: object) -> None:
            for entry in entries:  # type: ignore[attr-defined]
                heard[entry.session_id].append(entry.version)
                feed.append(entry.feed_id)

        store.add_listener(listen)

        async def writer(number: int) -> None:
            for _ in range(10):
                await store.write(lambda tx: append(tx, names[number % 8]).version)

        await asyncio.gather(*(writer(number) for number in range(64)))
        for name in names:
            entries = await store.read(lambda tx, name=name: tx.journal.after(A, name, 0, 1000))  # type: ignore[misc]
            assert [entry.version for entry in entries] == list(range(1, 81))
            row = await store.read(lambda tx, name=name: tx.sessions.get(A, name))  # type: ignore[misc]
            assert row is not None
            assert row.state_version == 80
            assert heard[name] == list(range(1, 81))
        assert feed == sorted(set(feed))


def store_keeps_transaction_after_error(store: Store) -> bool:
    """Whether a failed statement leaves its transaction usable: SQLite yes, PostgreSQL no."""
    return type(store).__name__ == "SqliteStore"


class OrderOfDelivery:
    async def test_on_commit_precedes_the_listeners_and_they_precede_the_return(self, store: Store) -> None:
        await with_session(store)
        order: list[str] = []
        store.add_listener(lambda entries: order.append(f"event {entries[0].version}"))
        version = await store.write(lambda tx: append(tx).version, on_commit=lambda v: order.append(f"res {v}"))
        order.append(f"returned {version}")
        assert order == ["res 1", "event 1", "returned 1"]

    async def test_units_are_delivered_in_the_order_of_their_commits(self, store: Store) -> None:
        await with_session(store)
        order: list[tuple[str, int]] = []
        store.add_listener(lambda entries: order.append(("event", entries[0].version)))
        await asyncio.gather(
            *(
                store.write(lambda tx: append(tx).version, on_commit=lambda version: order.append(("res", version)))
                for _ in range(50)
            )
        )
        assert order == [(kind, version) for version in range(1, 51) for kind in ("res", "event")]

    async def test_what_on_commit_hears_of_is_committed(self, store: Store) -> None:
        await with_session(store)
        reads: list[asyncio.Task[list[JournalEntry]]] = []

        def on_commit(_: object) -> None:
            reads.append(asyncio.create_task(store.read(lambda tx: tx.journal.after(A, "s_1", 0, 10))))

        await store.write(append, on_commit)
        assert [entry.version for entry in await reads[0]] == [1]

    async def test_listeners_get_all_entries_of_a_unit_at_once_in_order(self, store: Store) -> None:
        await with_session(store)
        calls: list[list[int]] = []
        store.add_listener(lambda entries: calls.append([entry.version for entry in entries]))

        def work(tx: Transaction) -> None:
            append(tx)
            append(tx)

        await store.write(work)
        await store.write(lambda tx: tx.sessions.update(A, "s_1", title="no event"))
        assert calls == [[1, 2]]

    async def test_a_removed_listener_hears_nothing_more(self, store: Store) -> None:
        await with_session(store)
        heard: list[JournalEntry] = []
        remove = store.add_listener(heard.extend)
        await store.write(append)
        remove()
        remove()
        await store.write(append)
        assert [entry.version for entry in heard] == [1]

    async def test_a_hearer_that_raises_is_logged_and_stops_no_other(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        await with_session(store)
        heard: list[JournalEntry] = []

        def broken(_: object) -> None:
            raise Oops

        store.add_listener(broken)
        store.add_listener(heard.extend)
        with caplog.at_level(logging.ERROR):
            entries = await asyncio.gather(store.write(append, broken), store.write(append))
        assert [entry.version for entry in entries] == [1, 2]
        assert [entry.version for entry in heard] == [1, 2]
        actions = [getattr(record, "action", None) for record in caplog.records]
        assert actions == ["store.hearer_failed"] * 3

    async def test_a_unit_whose_caller_is_cancelled_is_carried_out_all_the_same(self, store: Store) -> None:
        await with_session(store)
        heard: list[object] = []
        store.add_listener(heard.extend)
        committed = asyncio.Event()

        def on_commit(_: object) -> None:
            heard.append("res")
            committed.set()

        task = asyncio.create_task(store.write(append, on_commit))
        await asyncio.sleep(0)  # the unit is handed over, the caller waits
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(committed.wait(), 30)
        [entry] = await store.read(lambda tx: tx.journal.after(A, "s_1", 0, 10))
        assert heard == ["res", entry]

    async def test_a_cancelled_caller_keeps_nobody_else_from_its_answer(self, store: Store) -> None:
        await with_session(store)
        queued = threading.Event()
        first = asyncio.create_task(store.write(lambda tx: queued.wait(30)))
        tasks = [asyncio.create_task(store.write(lambda tx: append(tx).version)) for _ in range(3)]
        await asyncio.sleep(0)  # all are handed over; the three wait behind the first
        tasks[1].cancel()
        queued.set()
        results = await asyncio.wait_for(asyncio.gather(first, *tasks, return_exceptions=True), 30)
        assert isinstance(results[2], asyncio.CancelledError)
        assert [results[0], results[1], results[3]] == [True, 1, 3]


class Closing:
    async def test_close_carries_out_what_is_queued(self, store: Store) -> None:
        await with_session(store)
        writes = [asyncio.create_task(store.write(lambda tx: append(tx).version)) for _ in range(300)]
        await asyncio.sleep(0)  # all are handed over
        await store.close()
        assert [await write for write in writes] == list(range(1, 301))

    async def test_after_close_every_call_is_refused_and_close_may_be_called_again(self, store: Store) -> None:
        calls: list[Callable[[], object]] = []
        await store.close()
        await store.close()
        for call in (store.write, store.read):
            with pytest.raises(StoreUnavailable):
                await call(calls.append)  # type: ignore[arg-type]
        assert calls == []
        assert await store.check_writable() is False

    async def test_two_may_close_at_once(self, store: Store) -> None:
        await asyncio.wait_for(asyncio.gather(store.close(), store.close()), 30)
        with pytest.raises(StoreUnavailable):
            await store.write(append)

    async def test_a_query_that_is_on_ends_before_the_store_does(self, store: Store) -> None:
        await with_session(store)
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def query(tx: Transaction) -> int:
            loop.call_soon_threadsafe(begun.set)
            return len([tx.sessions.get(A, "s_1") for _ in range(500)])

        reading = asyncio.create_task(store.read(query))
        await asyncio.wait_for(begun.wait(), 30)
        await store.close()
        assert await reading == 500

    async def test_a_writable_store_says_so(self, store: Store) -> None:
        assert await store.check_writable() is True
        assert await store.read(lambda tx: tx.meta.get("checked_at")) == str(NOW)
