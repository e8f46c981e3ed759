"""A copy of a database in use: one instant of it, whatever is written meanwhile."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from corral.storage.snapshot import Unreadable, abort_unfinished, snapshot, unfinished
from corral.storage.sqlite import SqliteStore
from tests.storage.make import FixedClock, run, session


def fill(path: Path, rows: int) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE t (x, filler)")
    with database:
        database.executemany("INSERT INTO t VALUES (0, ?)", ((bytes(4000),) for _ in range(rows)))
    return database


def test_commits_between_its_steps_neither_get_into_it_nor_make_it_begin_again(tmp_path: Path) -> None:
    seen: list[int] = []
    with closing(fill(tmp_path / "a.db", 10_000)) as database:

        def progress(done: int, whole: int) -> None:
            seen.append(done)
            database.execute("UPDATE t SET x = x + 1")  # every page is written anew

        snapshot(tmp_path / "a.db", tmp_path / "b.db", progress)
        assert len(seen) > 3
        assert seen == sorted(set(seen))
    with closing(sqlite3.connect(tmp_path / "b.db")) as copy:
        assert copy.execute("SELECT DISTINCT x FROM t").fetchall() == [(0,)]
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert stat.S_IMODE((tmp_path / "b.db").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("b.db-")] == []


def test_a_file_that_is_no_database_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"x" * 8192)
    with pytest.raises(Unreadable):
        snapshot(tmp_path / "a.db", tmp_path / "b.db")


async def test_only_runs_that_are_on_are_noted_to_be_aborted(tmp_path: Path) -> None:
    path = tmp_path / "corral.db"
    store = await SqliteStore.open(path, FixedClock())
    await store.write(lambda tx: tx.sessions.insert(session()))
    await store.write(lambda tx: tx.runs.insert(run("on", status="running")))
    await store.write(lambda tx: tx.runs.insert(run("over", status="completed")))
    await store.close()
    assert unfinished(path) == 1
    assert abort_unfinished(path, 7) == 1
    with closing(sqlite3.connect(path)) as database:
        assert dict(database.execute("SELECT id, abort_requested_at FROM runs")) == {"on": 7, "over": None}
