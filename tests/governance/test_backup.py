"""A backup is whole whatever the gateway does between two of its steps, and what is wrong in one is found."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from corral.governance import backup
from corral.governance.anchors import AnchorFiles
from corral.governance.retention import purge_audit
from corral.storage.archive import Reader
from corral.storage.exchange import PLAN
from corral.storage.snapshot import snapshot
from tests.governance.audit_house import AuditHouse
from tests.storage.make import session

Between = Callable[[], None]


async def made_while(
    house: AuditHouse, between: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, *, times: int = 1
) -> Path:
    """A backup in whose making `between()` happens just before the database is copied, the first `times`."""
    loop = asyncio.get_running_loop()
    real, left = snapshot, [times]

    def interrupted(*arguments: Any) -> None:
        if left[0]:
            left[0] -= 1
            asyncio.run_coroutine_threadsafe(between(), loop).result(60)
        real(*arguments)

    monkeypatch.setattr(backup, "snapshot", interrupted)
    draft = house.folder.parent / "b.tar"

    def make() -> None:
        backup.write_backup(house.folder, draft, secrets=False, workspaces=True, told=lambda *_: None)

    await asyncio.to_thread(make)
    return draft


def unpacked(draft: Path, folder: Path) -> Path:
    folder.mkdir()
    with Reader(draft, backup.NAMES) as reader:
        backup.unpack(reader, folder, lambda *_: None)
    return folder


def findings(folder: Path) -> list[str]:
    assert backup.damage_of(folder, lambda *_: None) == []
    return backup.findings_of(folder, lambda *_: None)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


async def test_what_is_signed_while_the_backup_is_made_is_never_ahead_of_its_database(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AuditHouse(data_dir) as house:
        await house.fill(5)
        await house.keeper.sign()

        async def between() -> None:
            await house.fill(5)
            await house.keeper.sign()

        draft = await made_while(house, between, monkeypatch)
        await between()
    folder = unpacked(draft, data_dir.parent / "out")
    assert findings(folder) == []
    [head] = AnchorFiles.open(folder).heads.values()
    with closing(sqlite3.connect(folder / "corral.db")) as database:
        assert database.execute("SELECT max(id) FROM audit_log").fetchone() == (10,)
    assert head.id == 5


async def test_retention_in_the_middle_of_a_backup_makes_it_begin_again(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AuditHouse(data_dir) as house:
        await house.fill(5)
        await house.keeper.sign()

        async def between() -> None:
            house.clock.now += 10 * 86_400_000
            await house.fill(2)
            assert await purge_audit(house.store, house.clock, house.keeper, 5) == 5

        draft = await made_while(house, between, monkeypatch)
    assert findings(unpacked(draft, data_dir.parent / "out")) == []


async def test_a_key_that_is_made_in_the_middle_of_a_backup_is_in_it(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AuditHouse(data_dir) as house:
        await house.fill(2)
        draft = await made_while(house, house.keeper.sign, monkeypatch)
    folder = unpacked(draft, data_dir.parent / "out")
    assert (folder / "audit.key").exists()
    assert findings(folder) == []


async def test_a_beginning_that_never_stands_still_ends_in_an_error(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AuditHouse(data_dir) as house:
        await house.fill(5)
        await house.keeper.sign()

        async def between() -> None:
            house.clock.now += 10 * 86_400_000
            await house.fill(2)
            await purge_audit(house.store, house.clock, house.keeper, 5)

        with pytest.raises(backup.BackupFailed, match="moves all the time"):
            await made_while(house, between, monkeypatch, times=100)
    assert [path.name for path in data_dir.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("when", ["before", "meanwhile", "meanwhile and over"])
async def test_a_directory_into_which_a_backup_is_restored_is_not_backed_up(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its files are of two states, or its database is another one than that whose audit was read."""
    async with AuditHouse(data_dir) as house:
        await house.fill(2)

    async def between() -> None:
        if when == "meanwhile and over":
            shutil.copy(data_dir / "corral.db", data_dir / "other.db")
            (data_dir / "other.db").replace(data_dir / "corral.db")
        else:
            (data_dir / PLAN).write_text("{}")

    if when == "before":
        await between()
    with pytest.raises(backup.BackupFailed, match=r"a restore into|was restored meanwhile"):
        await made_while(house, between, monkeypatch)


WRONG = {
    "UPDATE audit_log SET actor = 'x' WHERE id = 2": "broken at record 2: a record was changed",
    "DELETE FROM audit_log WHERE id = 5": "broken at record 5: the end of the chain is cut off",
    "DELETE FROM audit_log": "broken at record 1: the end of the chain is cut off",
    "UPDATE store_meta SET value = 'x' WHERE name = 'audit_public_key'": "not the one that the database knows",
    "UPDATE sessions SET state_version = 1": "the journal of session s_1 has a gap",
    "UPDATE sessions SET active_run_id = 'run_1'": "session s_1 is said to run a run that has ended",
}


async def test_what_is_wrong_in_a_backup_is_found(data_dir: Path) -> None:
    async with AuditHouse(data_dir) as house:
        await house.fill(5)
        await house.store.write(lambda tx: tx.sessions.insert(session()))
    for number, (sql, words) in enumerate(WRONG.items()):
        folder = data_dir.parent / str(number)
        shutil.copytree(data_dir, folder)
        assert findings(folder) == []
        with closing(sqlite3.connect(folder / "corral.db")) as database:
            database.execute(sql)
            database.commit()
        assert any(words in finding for finding in findings(folder)), sql
    (data_dir / "audit.key").unlink()
    assert findings(data_dir) == ["audit: audit.key is missing"]


async def test_rows_that_refer_to_nothing_count_as_damage(data_dir: Path) -> None:
    async with AuditHouse(data_dir) as house:
        await house.store.write(lambda tx: tx.sessions.insert(session()))
        await house.store.write(
            lambda tx: tx.journal.append("t_a", "s_1", "agent.message", b"{}", run_id=None, now_ms=1)
        )
    with closing(sqlite3.connect(data_dir / "corral.db")) as database:
        database.execute("DELETE FROM sessions")
        database.commit()
    [problem] = backup.damage_of(data_dir, lambda *_: None)
    assert "of journal refers to a row of sessions" in problem


async def test_links_that_an_agent_put_there_are_not_followed(data_dir: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("the owner's own key")
    async with AuditHouse(data_dir):
        work = data_dir / "workspaces" / "t" / "w"
        work.mkdir(parents=True)
        (work / "folder").symlink_to(secret)
        (work / "file").symlink_to(secret / "key")
        (work / "plain").write_text("plain")
        draft = tmp_path / "b.tar"
        made = backup.write_backup(data_dir, draft, secrets=True, workspaces=True, told=lambda *_: None)
    assert made.manifest.skipped == 2
    assert b"the owner's own key" not in draft.read_bytes()
    assert (unpacked(draft, tmp_path / "out") / "workspaces/t/w/plain").read_text() == "plain"
