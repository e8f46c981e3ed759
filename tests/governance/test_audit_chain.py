"""Whatever somebody does to the audit log in the database, or to the files beside it, is found, and audited once."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import UNSET

from corral.governance import anchors
from corral.governance.chain import GENESIS, record_hash
from corral.storage.repositories import Transaction
from corral.storage.repositories import governance as repository
from tests.governance.audit_house import AuditHouse, T
from tests.support.examples import examples

COUNT = 12


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[AuditHouse]:
    async with AuditHouse(tmp_path) as house:
        yield house


async def broken(house: AuditHouse) -> list[Any]:
    """The findings that were audited, as (brokenAt, reason)."""
    rows = [row for row in await house.rows() if row.action == "audit.broken"]
    assert all(row.outcome == "failed" and row.actor == "system:audit" for row in rows)
    return [row.metadata["brokenAt"] for row in rows]


async def test_a_whole_chain_verifies_and_its_head_is_told_with_a_signature(house: AuditHouse) -> None:
    empty = await house.verify()
    assert (empty.ok, empty.checked, empty.head_hash) == (True, 0, GENESIS)
    rows = await house.fill(COUNT)
    for _ in range(2):
        result = await house.verify()
        assert (result.ok, result.checked, result.head_hash, result.broken_at) == (True, COUNT, rows[-1].hash, UNSET)
        assert result.anchor is not UNSET
        assert (result.anchor.id, result.anchor.hash) == (COUNT, rows[-1].hash)
        assert anchors.signed_well(result.anchor)
        await house.restart()
    assert await broken(house) == []


async def test_more_records_than_a_page_holds_verify_while_others_are_written(house: AuditHouse) -> None:
    await house.fill(1_250)

    async def write() -> None:
        for _ in range(10):
            await house.fill(7)

    result, _ = await asyncio.gather(house.verify(), write())
    assert result.ok
    assert result.checked >= 1_250
    assert (await house.verify()).checked == 1_320


# ---- the database

columns = st.sampled_from(
    [
        "action",
        "actor",
        "actor_type",
        "resource_type",
        "resource_id",
        "outcome",
        "metadata",
        "trace_id",
        "created_at",
        "prev_hash",
        "hash",
        "session_id",
        "run_id",
        "tenant_id",
        "id",
    ]
)
literals = st.sampled_from(
    [
        "'other'",
        "NULL",
        "5",
        "x'6f74686572'",
        "'{}'",
        "'null'",
        "{c} || ' '",
        "CAST(x'ff' AS TEXT)",
        "upper({c}) || 'X'",
    ]
)
places = st.integers(1, COUNT)


@st.composite
def tampering(draw: st.DrawFn) -> str:
    """One statement that changes, drops, swaps, inserts or cuts."""
    at = draw(places)
    where = f"tenant_id = '{T}' AND id = {at}"
    kind = draw(st.sampled_from(["change", "drop", "swap", "insert", "cut", "renumber", "head"]))
    if kind == "change":
        column = draw(columns)
        return f"UPDATE OR IGNORE audit_log SET {column} = {draw(literals).replace('{c}', column)} WHERE {where}"
    if kind == "drop":
        return f"DELETE FROM audit_log WHERE {where}"
    if kind == "cut":
        return f"DELETE FROM audit_log WHERE tenant_id = '{T}' AND id >= {at}"
    if kind == "head":
        return f"DELETE FROM audit_log WHERE tenant_id = '{T}' AND id <= {at}"
    if kind == "renumber":
        return f"UPDATE OR IGNORE audit_log SET id = id + {draw(st.sampled_from([100, -100, 1000000]))} WHERE {where}"
    names = ", ".join(repository._COLUMNS)
    if kind == "insert":
        new = draw(st.sampled_from([0, -1, COUNT + 1, COUNT + 2, 2**60, "'x'", "5.5"]))
        values = ", ".join(str(new) if name == "id" else name for name in repository._COLUMNS)
        return f"INSERT INTO audit_log ({names}) SELECT {values} FROM audit_log WHERE {where}"
    other = draw(places.filter(lambda other: other != at))
    swapped = [name for name in repository._COLUMNS if name not in ("tenant_id", "id")]
    return (
        f"UPDATE audit_log SET ({', '.join(swapped)}) = (SELECT {', '.join('o.' + name for name in swapped)} "
        f"FROM audit_log o WHERE o.tenant_id = '{T}' AND o.id = {at} + {other} - audit_log.id) "
        f"WHERE tenant_id = '{T}' AND id IN ({at}, {other})"
    )


@examples(50)
@given(statement=tampering())
@example(statement=f"UPDATE audit_log SET id = CAST(x'ff' AS TEXT) WHERE tenant_id = '{T}' AND id = 2")
@example(statement=f"UPDATE audit_log SET id = CAST(x'ff' AS TEXT) WHERE tenant_id = '{T}' AND id = {COUNT}")
def test_any_one_thing_done_to_the_table_is_found(
    tmp_path_factory: pytest.TempPathFactory, template: Path, statement: str
) -> None:
    folder = tmp_path_factory.mktemp("tampered")

    async def go() -> None:
        shutil.copytree(template, folder, dirs_exist_ok=True)
        before = table(folder)
        async with AuditHouse(folder) as house:
            try:
                house.sql(statement)
            except sqlite3.IntegrityError:
                return  # NOT NULL: nothing was done
            if table(folder) == before:
                return
            result = await house.verify()
            assert not result.ok, statement
            assert result.broken_at is not UNSET
            assert result.anchor is UNSET
            again = await house.verify()
            assert (again.ok, again.broken_at) == (False, result.broken_at)
            await house.restart()
            assert (await house.verify()).broken_at == result.broken_at
            count = f"SELECT count(*) FROM audit_log WHERE tenant_id = '{T}' AND action = 'audit.broken'"
            [(found,)] = house.sql(count)
            assert found in (1, 2), "one finding of the chain, and perhaps one of its signed head"
            await house.verify()
            await house.restart()
            assert house.sql(count) == [(found,)], "a finding is audited once"
            await house.fill(1)  # and the server goes on
            assert not (await house.verify()).ok

    asyncio.run(go())
    shutil.rmtree(folder)


def table(folder: Path) -> list[Any]:
    with sqlite3.connect(folder / "corral.db") as connection:
        connection.text_factory = bytes
        rows = connection.execute("SELECT *, typeof(id), typeof(metadata), typeof(actor) FROM audit_log").fetchall()
    connection.close()
    return sorted(rows, key=repr)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a chain whose head is signed, and one of another tenant."""
    folder = tmp_path_factory.mktemp("template")

    async def make() -> None:
        async with AuditHouse(folder) as house:
            await house.fill(COUNT, session_id="s_1", run_id="run_1")
            await house.fill(2, "t_2")

    asyncio.run(make())
    return folder


@pytest.mark.parametrize(
    "change",
    [
        """metadata = '{"note":"else",' || substr(metadata, 2)""",
        """metadata = metadata || ' '""",
        """metadata = replace(metadata, '"number":6', '"number":6.0')""",
        "session_id = 's_2'",
        "session_id = NULL",
        "run_id = 'run_1'",
    ],
)
async def test_what_other_readers_of_the_table_would_see_differently_is_a_change(
    house: AuditHouse, change: str
) -> None:
    await house.fill(COUNT, session_id="s_1")
    house.sql(f"UPDATE audit_log SET {change} WHERE id = 7")
    result = await house.verify()
    assert (result.ok, result.broken_at) == (False, 7)


def rewritten(connection: sqlite3.Connection, first: int) -> None:
    """Change a record and make all hashes from it on anew, as a careful forger would."""
    names = list(repository._COLUMNS)
    wire = {name: "".join(part.capitalize() if n else part for n, part in enumerate(name.split("_"))) for name in names}
    rows = connection.execute(
        f"SELECT {', '.join(names)} FROM audit_log WHERE tenant_id = '{T}' ORDER BY id"
    ).fetchall()
    before = GENESIS
    for row in rows:
        record = {
            wire[name]: value for name, value in zip(names, row, strict=True) if not name.startswith(("ses", "run"))
        }
        record["metadata"] = __import__("json").loads(record["metadata"])
        if record["id"] == first:
            record["actor"] = "user:forged"
        record["prevHash"] = before
        record["hash"] = before = record_hash(record)
        connection.execute(
            "UPDATE audit_log SET actor = ?, prev_hash = ?, hash = ? WHERE tenant_id = ? AND id = ?",
            (record["actor"], record["prevHash"], record["hash"], T, record["id"]),
        )


@pytest.mark.parametrize("first", [1, 5, COUNT])
async def test_a_chain_forged_with_good_hashes_is_found_by_its_signed_head(house: AuditHouse, first: int) -> None:
    await house.fill(COUNT)
    await house.restart()
    with sqlite3.connect(house.folder / "corral.db") as connection:
        rewritten(connection, first)
    connection.close()
    assert [row.actor for row in await house.rows()][first - 1] == "user:forged"
    result = await house.verify()
    assert (result.ok, result.broken_at, result.reason) == (False, COUNT, "a record is not the one that was signed")


async def test_an_end_cut_off_stays_found_though_new_records_grow_over_the_gap(house: AuditHouse) -> None:
    await house.fill(COUNT)
    await house.restart()
    house.sql("DELETE FROM audit_log WHERE id > 8")
    assert (await house.verify()).broken_at == 9
    for _ in range(3):
        await house.fill(4)
        await house.keeper.sign(everything=True)
        await house.restart()
        result = await house.verify()
        assert (result.ok, result.broken_at) == (False, 9)
    assert await broken(house) == [9]


async def test_the_keeper_finds_a_cut_by_itself_and_does_not_sign_over_it(house: AuditHouse) -> None:
    await house.fill(COUNT)
    await house.restart()
    signed = (house.folder / anchors.HEAD_FILE).read_bytes()
    house.sql("DELETE FROM audit_log WHERE id > 8")
    await house.fill(1)
    await house.keeper.sign()
    assert await broken(house) == [10]
    await house.fill(20)
    await house.keeper.sign()
    await house.restart()
    assert await broken(house) == [10]
    assert (house.folder / anchors.HEAD_FILE).read_bytes() == signed


async def test_all_records_gone_is_found(house: AuditHouse) -> None:
    await house.fill(COUNT)
    await house.restart()
    house.sql(f"DELETE FROM audit_log WHERE tenant_id = '{T}'")
    result = await house.verify()
    assert (result.ok, result.checked, result.broken_at) == (False, 0, 1)


async def test_a_database_of_another_time_put_in_the_place_of_this_one_is_found(house: AuditHouse) -> None:
    await house.fill(4)
    await house.close()
    shutil.copy(house.folder / "corral.db", house.folder / "old.db")
    await house.open()
    await house.fill(4)
    await house.close()
    shutil.copy(house.folder / "old.db", house.folder / "corral.db")
    await house.open()
    result = await house.verify()
    assert (result.ok, result.broken_at) == (False, 5)


async def test_a_database_of_another_house_is_found(house: AuditHouse, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async with AuditHouse(tmp_path / "other") as other:
        await other.fill(COUNT)
    await house.fill(COUNT)
    await house.close()
    shutil.copy(tmp_path / "other" / "corral.db", house.folder / "corral.db")
    await house.open()
    assert not (await house.verify()).ok


# ---- the files


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        place = data.index(b'"hash":"') + 9
        data[place] = ord("0") if data[place] != ord("0") else ord("1")
        (folder / name).write_bytes(data)

    return change


def spoil(name: str) -> Callable[[Path], None]:
    """A byte of a text becomes one that is no UTF-8."""

    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        place = data.index(b'"hash":"') + 9
        (folder / name).write_bytes(data[:place] + b"\xff" + data[place + 1 :])

    return change


def take_tenant_out(folder: Path) -> None:
    heads = json.loads((folder / anchors.HEAD_FILE).read_text())
    del heads["tenants"][T]
    (folder / anchors.HEAD_FILE).write_text(json.dumps(heads))


def remove_all(folder: Path) -> None:
    for name in (anchors.KEY_FILE, anchors.PUBLIC_KEY_FILE, anchors.HEAD_FILE, anchors.CHECKPOINTS_FILE):
        (folder / name).unlink()


DAMAGE = {
    "no head": remove(anchors.HEAD_FILE),
    "no key": remove(anchors.KEY_FILE),
    "nothing": remove_all,
    "empty head": lambda folder: (folder / anchors.HEAD_FILE).write_bytes(b""),
    "changed head": flip(anchors.HEAD_FILE),
    "changed checkpoint": flip(anchors.CHECKPOINTS_FILE),
    "spoilt head": spoil(anchors.HEAD_FILE),
    "spoilt checkpoint": spoil(anchors.CHECKPOINTS_FILE),
    "a tenant taken out": take_tenant_out,
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damage_to_the_signed_files_is_found_and_they_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(anchors, "CHECKPOINT_EVERY", 5)
    async with AuditHouse(tmp_path) as house:
        await house.fill(COUNT)
        await house.close()
        DAMAGE[damage](tmp_path)
        for _ in range(2):
            await house.open()
            await house.fill(1)
            await house.keeper.sign()
            result = await house.verify()
            assert (result.ok, result.broken_at) == (False, 1)
            await house.close()
        await house.open()
        assert await broken(house) == [1]


async def test_a_key_that_is_none_is_told_and_stops_nothing(house: AuditHouse) -> None:
    await house.fill(COUNT)
    await house.close()
    (house.folder / anchors.KEY_FILE).write_text("none")
    await house.open()
    assert not (await house.verify()).ok
    await house.fill(1)


async def test_the_key_is_its_owners_alone_and_the_same_after_a_restart(house: AuditHouse) -> None:
    await house.fill(1)
    first = (await house.verify()).anchor
    await house.restart()
    second = (await house.verify()).anchor
    assert first is not UNSET
    assert second is not UNSET
    assert first.public_key == second.public_key
    assert (house.folder / anchors.PUBLIC_KEY_FILE).read_text().strip() == first.public_key
    for name in (anchors.KEY_FILE, anchors.HEAD_FILE):
        assert (house.folder / name).stat().st_mode & 0o777 == 0o600
    assert list(house.folder.glob(".audit*")) == []


async def test_checkpoints_are_appended_one_for_so_many_records_and_a_torn_line_is_no_finding(
    house: AuditHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors, "CHECKPOINT_EVERY", 5)
    for _ in range(COUNT):
        await house.fill(1)
        await house.keeper.sign()
    path = house.folder / anchors.CHECKPOINTS_FILE
    assert path.read_bytes().count(b"\n") == 2
    await house.close()
    path.write_bytes(path.read_bytes()[:-30])
    await house.open()
    await house.fill(8)
    await house.restart()
    assert path.read_bytes().count(b"\n") >= 3
    assert (await house.verify()).ok
    (house.folder / anchors.HEAD_FILE).unlink()
    house.sql("DELETE FROM audit_log WHERE id > 15")
    await house.restart(sign=False)
    result = await house.verify()
    assert (result.ok, result.broken_at) == (False, 16), "the checkpoint knows of record 20 though the head is gone"


async def test_what_is_committed_after_it_was_looked_for_is_signed_all_the_same(house: AuditHouse) -> None:
    """The hint that a chain has changed comes before the commit."""
    await house.fill(1)
    await house.keeper.sign()

    def work(tx: Transaction) -> None:
        house.record(tx)
        asyncio.run_coroutine_threadsafe(house.keeper.sign(), loop).result(30)

    loop = asyncio.get_running_loop()
    await house.store.write(work)
    await house.keeper.sign()
    await house.close(sign=False)
    await house.open()
    house.sql("DELETE FROM audit_log WHERE id = 2")
    assert (await house.verify()).broken_at == 2


async def test_the_task_signs_by_itself(house: AuditHouse) -> None:
    task = asyncio.create_task(house.keeper.run(interval_s=0.01))
    try:
        rows = await house.fill(3)
        async with asyncio.timeout(30):
            while (  # noqa: ASYNC110 - it is a file that says so
                not (house.folder / anchors.HEAD_FILE).exists()
                or rows[-1].hash not in (house.folder / anchors.HEAD_FILE).read_text()
            ):
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ---- retention


async def test_old_records_go_and_the_chain_that_is_left_verifies(house: AuditHouse) -> None:
    await house.fill(COUNT)
    await house.fill(3, "t_2")
    house.clock.now += 1_000_000
    await house.fill(4)
    assert await house.keeper.purge(500_000) == COUNT + 2
    await house.restart()
    rows = await house.rows()
    assert [row.id for row in rows] == [13, 14, 15, 16, 17]
    assert rows[-1].action == "audit.purged"
    assert rows[-1].metadata["throughId"] == COUNT
    result = await house.verify()
    assert (result.ok, result.checked) == (True, 5)
    assert (await house.verify("t_2")).ok
    assert await house.keeper.purge(500_000) == 1, "the other tenant's last one, that is the last no more"
    assert await house.keeper.purge(500_000) == 0
    house.sql("DELETE FROM audit_log WHERE id = 13")
    assert (await house.verify()).broken_at == 13


async def test_a_purge_that_died_in_the_middle_is_no_finding_and_is_finished(
    house: AuditHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.fill(COUNT)
    house.clock.now += 1_000_000
    await house.fill(4)

    async def dies(*_: object) -> int:
        raise OSError("died")

    with monkeypatch.context() as patch:
        patch.setattr(house.keeper, "_delete", dies)
        with pytest.raises(OSError, match="died"):
            await house.keeper.purge(500_000)
    house.sql("DELETE FROM audit_log WHERE id <= 3")
    await house.restart()
    assert (await house.verify()).ok
    house.sql("UPDATE audit_log SET actor = 'x' WHERE id = 7")
    assert (await house.verify()).broken_at == 7


async def test_a_broken_chain_is_not_purged(house: AuditHouse) -> None:
    await house.fill(COUNT)
    house.clock.now += 1_000_000
    await house.fill(4)
    house.sql("UPDATE audit_log SET actor = 'x' WHERE id = 7")
    assert await house.keeper.purge(500_000) == 0
    assert len(await house.rows()) == COUNT + 5
    assert await broken(house) == [7]
