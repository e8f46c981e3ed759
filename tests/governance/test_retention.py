"""What is let go when its time is over, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.governance import retention
from corral.governance.retention import Retention, purge_expired
from corral.ids import Ids
from corral.storage.repositories import Transaction
from tests.governance.audit_house import AuditHouse, T
from tests.storage.make import claim, key, session


async def test_expired_answers_go_in_several_units_and_one_in_progress_never_does(tmp_path: Path) -> None:
    async with AuditHouse(tmp_path) as house:
        now = house.clock.now_ms()
        count = 2 * retention._AT_ONCE + 3

        def fill(tx: Transaction) -> None:
            for number in range(count):
                tx.idempotency.insert(claim(key(f"k_{number}"), state="done", result=b"{}", expires_at=now))
            tx.idempotency.insert(claim(key("fresh"), state="done", result=b"{}", expires_at=now + 1))
            tx.idempotency.insert(claim(key("going on"), expires_at=now - 1_000_000))

        await house.store.write(fill)
        assert await purge_expired(house.store, house.clock) == count
        assert await purge_expired(house.store, house.clock) == 0
        for name in ("fresh", "going on"):
            assert await house.store.read(lambda tx, name=name: tx.idempotency.get(key(name))) is not None  # type: ignore[misc]
        house.clock.now += 1
        assert await purge_expired(house.store, house.clock) == 1
        assert await house.store.read(lambda tx: tx.idempotency.get(key("going on"))) is not None


DAY = 86_400_000


def retention_of(house: AuditHouse, **days: int | None) -> Retention:
    settings: dict[str, int | None] = {"audit_keep_days": None, "tool_output_keep_days": None}
    return Retention(house.store, house.clock, house.keeper, **(settings | days))


async def test_records_and_outputs_are_kept_for_ever_unless_settings_say_otherwise(tmp_path: Path) -> None:
    async with AuditHouse(tmp_path) as house:
        await house.fill(3)
        house.clock.now += 10_000 * DAY
        assert await retention_of(house).purge() == {"idempotency": 0}
        assert len(await house.rows()) == 3


async def test_old_records_go_at_the_day_and_the_chain_stays_whole(tmp_path: Path) -> None:
    async with AuditHouse(tmp_path) as house:
        await house.fill(5)
        house.clock.now += 2 * DAY
        await house.fill(2)
        retention = retention_of(house, audit_keep_days=3)
        house.clock.now += DAY - 1000
        assert (await retention.purge())["audit"] == 0
        house.clock.now += 2000
        assert (await retention.purge())["audit"] == 5
        assert (await house.verify()).ok
        assert [row.action for row in await house.rows()][:2] == ["tool.call", "tool.call"]
        assert (await retention.purge())["audit"] == 0


async def test_outputs_of_old_calls_go_and_younger_ones_stay(tmp_path: Path) -> None:
    async with AuditHouse(tmp_path) as house:
        await house.fill(1)
        ids = Ids(house.clock)
        count = retention._AT_ONCE + 3
        old = [ids.new("tc") for _ in range(count)]
        house.clock.now += DAY
        young = ids.new("tc")

        def fill(tx: Transaction) -> None:
            tx.sessions.insert(session(tenant_id=T))
            for name in (*old, young):
                tx.outputs.insert(T, "s_1", name, b"output")

        await house.store.write(fill)
        house.clock.now += DAY
        assert (await retention_of(house, tool_output_keep_days=2).purge())["toolOutput"] == 0
        house.clock.now += 1
        assert (await retention_of(house, tool_output_keep_days=2).purge())["toolOutput"] == count
        assert await house.store.read(lambda tx: tx.outputs.read(T, young, 0, 9)) == (b"output", 6)


async def test_what_was_purged_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with AuditHouse(tmp_path) as house:
        await house.fill(4)
        house.clock.now += 2 * DAY
        with caplog.at_level("INFO", "corral.governance.retention"):
            await retention_of(house, audit_keep_days=1).purge()
            await retention_of(house).purge()
        [record] = caplog.records
        assert record.action == "purge.done"  # type: ignore[attr-defined]
        assert record.purged["audit"] > 0  # type: ignore[attr-defined]
