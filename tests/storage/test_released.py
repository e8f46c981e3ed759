"""A database of every schema that was ever the newest becomes what a new one is, with its rows as they were."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from corral.storage import schema
from corral.storage.repositories import Transaction
from corral.storage.snapshot import contradictions, damage, schema_of
from corral.storage.sqlite import SqliteStore
from tests.cli.command import call_here
from tests.storage.make import FixedClock
from tests.storage.released import NOW, TENANTS, digest, digests, make, revisions, tables_of
from tests.storage.test_schema import made_by
from tests.support.house import house

each_revision = pytest.mark.parametrize("revision", revisions())


def contents(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row by its table; `store_meta`, which a start writes to, is left out."""
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        names = [name for name in tables_of(database) if name != "store_meta"]
        return {name: [dict(row) for row in database.execute(f"SELECT * FROM {name}")] for name in names}


def test_a_released_revision_makes_what_it_made_when_it_was_released(tmp_path: Path) -> None:
    found = {}
    for revision in digests():
        make(revision, tmp_path / f"{revision}.db")
        found[revision] = digest(tmp_path / f"{revision}.db")
    assert found == digests(), "a revision that was released is never edited: the next one changes what it made"


@each_revision
async def test_it_becomes_what_a_new_one_is_and_keeps_every_row_with_every_value(tmp_path: Path, revision: str) -> None:
    path = tmp_path / "corral.db"
    make(revision, path)
    before = contents(path)
    assert all(before.values()), "a table without a row shows nothing"
    store = await SqliteStore.open(path, FixedClock())
    try:
        for tenant in TENANTS:
            await what_ended_before_is_counted(store, tenant)
        await what_was_decided_before_is_counted(store, path)
    finally:
        await store.close()
    after = contents(path)
    for table, rows in before.items():
        kept = [{name: row[name] for name in rows[0]} for row in after[table]]
        assert sorted(map(repr, kept)) == sorted(map(repr, rows)), table
    assert damage(path, thorough=True) == []
    assert contradictions(path) == []
    # `made_by` compares statements; nothing is left to be made here.
    assert made_by(path, schema.prepare) == made_by(tmp_path / "new.db", schema.prepare)


async def what_ended_before_is_counted(store: SqliteStore, tenant: str) -> None:
    sums = await store.read(lambda tx: tx.metrics.facts(tenant, "w_default", None, NOW, NOW + 10_000))
    assert (sums.completed, sums.failed, sums.aborted, sums.tool_failures) == (1, 1, 1, 2)
    assert (sums.input_tokens, sums.output_tokens, sums.cost_usd, sums.priced) == (300, 30, 0.25, 1)
    assert await store.read(lambda tx: tx.metrics.hours(tenant, "w_default", None, 0, 10**6)) == sums


async def what_was_decided_before_is_counted(store: SqliteStore, path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        decided = database.execute(
            "SELECT a.tenant_id, a.workspace_id, r.agent_id, sum(a.status = 'approved'), sum(a.status = 'rejected'), "
            "max(a.resolved_at - a.created_at) FROM approvals AS a "
            "JOIN runs AS r ON r.tenant_id = a.tenant_id AND r.id = a.run_id "
            "WHERE a.status IN ('approved', 'rejected') GROUP BY a.tenant_id, a.workspace_id, r.agent_id"
        ).fetchall()
    for tenant, workspace, agent, *due in decided:
        of = (tenant, workspace, agent, 0, 2**60)
        assert await store.read(partial(_decided, of)) == due


def _decided(of: tuple[str, str, str, int, int], tx: Transaction) -> list[int | None]:
    """How many were approved and rejected, and the longest wait."""
    counts = tx.metrics.decisions(*of)
    return [*counts, tx.metrics.wait(*of, sum(counts))]


@each_revision
async def test_a_gateway_serves_what_a_backup_of_it_is_restored_to(tmp_path: Path, revision: str) -> None:
    old, restored = tmp_path / "old", tmp_path / "restored"
    old.mkdir(mode=0o700)
    make(revision, old / "corral.db")
    for command, data_dir in (("backup", old), ("restore", restored)):
        code, _, err = call_here(command, str(tmp_path / "b.tar"), data_dir=data_dir)
        assert code == 0, err
    assert schema_of(restored / "corral.db") == schema.HEAD, "the checks knew its columns"
    async with house(restored, unchecked="its rows are made up, table by table") as home, await home.wire() as wire:
        listed = (await wire.request("sessions.list"))["items"]
        assert [item["title"] for item in listed] == ["Title of s_2", "Title of s_1"]
        page = await wire.request("sessions.history", {"sessionId": "s_1"})
        assert [item["id"] for item in page["items"]] == [1, 2, 3, 4]
        await wire.effect("agent.run", input="hello", sessionId="s_1")
        await wire.event("agent.completed")
        assert (await wire.request("audit.verify"))["ok"]
