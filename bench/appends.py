"""Durable appends to the journal against bare SQLite that commits in groups from a thread of its own."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from queue import Empty, SimpleQueue

from bench.numbers import Numbers
from bench.stats import Row
from corral.clock import SystemClock
from corral.storage.repositories import Transaction
from corral.storage.rows import SessionRow
from corral.storage.sqlite import GROUP_LIMIT, SqliteStore

_PAYLOAD = b'{"sessionId":"s_1","runId":"run_1","text":"%b"}' % (b"x" * 200)
_NOW = 1_700_000_000_000


class BareWriter:
    """One thread, one connection, one INSERT for each append; all that wait share a COMMIT."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[tuple[tuple[object, ...], asyncio.Future[None]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="bare-writer", daemon=True)
        self._thread.start()

    async def append(self, session: str, version: int) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        row = ("t_1", "w_1", session, version, "agent.message", "run_1", _PAYLOAD, _NOW)
        self._queue.put((row, future))
        await future

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(
            "CREATE TABLE journal (feed_id INTEGER PRIMARY KEY, tenant_id, workspace_id, session_id, version, "
            "event, run_id, payload, created_at, UNIQUE (tenant_id, session_id, version))"
        )
        columns = "tenant_id, workspace_id, session_id, version, event, run_id, payload, created_at"
        insert = f"INSERT INTO journal ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        while (first := self._queue.get()) is not None:
            group = [first]
            while len(group) < GROUP_LIMIT:
                try:
                    more = self._queue.get_nowait()
                except Empty:
                    break
                if more is None:
                    self._queue.put(None)
                    break
                group.append(more)
            db.execute("BEGIN IMMEDIATE")
            for row, _ in group:
                db.execute(insert, row)
            db.execute("COMMIT")
            self._loop.call_soon_threadsafe(_answer, [future for _, future in group])
        db.close()


def _answer(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _session(session_id: str) -> SessionRow:
    return SessionRow(
        tenant_id="t_1",
        id=session_id,
        workspace_id="w_1",
        agent_id="a_1",
        owner_user_id="u_1",
        session_key="workspace:w_1/agent:a_1/main",
        visibility="private",
        title="",
        preview="",
        runtime_mode="local",
        created_at=_NOW,
        updated_at=_NOW,
    )


async def measure(folder: Path, numbers: Numbers) -> list[Row]:
    row = Row(
        f"durable appends, {numbers.writers} writers",
        "/s",
        "one INSERT each into a table of the same columns, by sqlite3 in a writer thread that commits in groups",
        note="`Store.write` of one `journal.append`, which also counts the session's version up. Each writer waits "
        "for its commit before the next; both are synchronous=FULL.",
    )
    store = await SqliteStore.open(folder / "appends.db", SystemClock())
    bare = BareWriter(folder / "appends-bare.db")
    sessions = [f"s_{number}" for number in range(numbers.writers)]

    def insert(tx: Transaction) -> None:
        for session in sessions:
            tx.sessions.insert(_session(session))

    async def append(session: str, _version: int) -> None:
        await store.write(
            lambda tx: tx.journal.append("t_1", session, "agent.message", _PAYLOAD, run_id="run_1", now_ms=_NOW)
        )

    try:
        await store.write(insert)
        for number in range(numbers.append_rounds + 1):
            ours = await _rate(append, sessions, numbers.appends_each, number)
            limit = await _rate(bare.append, sessions, numbers.appends_each, number)
            if number:  # the first compiles statements and makes files
                row.add(ours, limit)
    finally:
        await store.close()
        await asyncio.to_thread(bare.close)
    return [row]


async def _rate(append: Callable[[str, int], Awaitable[None]], sessions: list[str], each: int, number: int) -> float:
    """Appends/s of one writer for each session."""

    async def writer(session: str) -> None:
        for version in range(number * each, (number + 1) * each):
            await append(session, version)

    begin = time.perf_counter()
    await asyncio.gather(*(writer(session) for session in sessions))
    return len(sessions) * each / (time.perf_counter() - begin)
