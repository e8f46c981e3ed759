"""One key, one effect, on a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from corral.clock import SystemClock
from corral.governance.caller import Caller
from corral.governance.idempotency import RETENTION_MS, Idempotency, Ongoing, Performed, finish_ongoing
from corral.protocol.errors import Conflict, IdempotencyConflict
from corral.protocol.methods import (
    METHODS,
    AgentAbortParams,
    AgentAbortResult,
    AgentRunParams,
    SessionDeletedResult,
    SessionsCreateParams,
    SessionsDeleteParams,
)
from corral.storage.sqlite import SqliteStore
from tests.support.callers import caller_of


class SteppedClock(SystemClock):
    """The wall clock of a test: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.now


class House:
    def __init__(self, store: SqliteStore, clock: SteppedClock) -> None:
        self.store = store
        self.clock = clock
        self.keys = Idempotency(store, clock)
        self.effects = 0

    async def create(self, key: str = "k", *, caller: Caller | None = None, **params: Any) -> Performed:
        asked = SessionsCreateParams(idempotency_key=key, **params)
        return await self.keys.perform(
            caller or someone(), METHODS["sessions.create"], asked, self.effect, lambda _: None
        )

    def effect(self, tx: Any) -> SessionDeletedResult:
        self.effects += 1
        return SessionDeletedResult(session_id=f"effect-{self.effects}", deleted=True)


def someone(subject: str = "u", tenant: str = "t", workspace: str = "w") -> Caller:
    return caller_of(subject, tenant=tenant, workspace=workspace)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = SteppedClock()
    store = await SqliteStore.open(tmp_path / "corral.db", clock)
    yield House(store, clock)
    await store.close()


async def test_the_second_call_with_a_key_gets_the_first_answer_and_has_no_effect(house: House) -> None:
    first = await house.create(title="a")
    second = await house.create(title="a")
    assert (first.replayed, second.replayed) == (False, True)
    assert first.payload == second.payload
    assert house.effects == 1


async def test_a_hundred_calls_at_once_with_one_key_have_one_effect(house: House) -> None:
    answers = await asyncio.gather(*(house.create() for _ in range(100)))
    assert len({answer.payload for answer in answers}) == 1
    assert [answer.replayed for answer in answers].count(False) == 1
    assert house.effects == 1


async def test_other_parameters_under_the_same_key_are_a_conflict(house: House) -> None:
    await house.create(title="a")
    with pytest.raises(IdempotencyConflict, match="idempotencyKey"):
        await house.create(title="b")
    assert house.effects == 1


async def test_tenant_actor_and_workspace_each_have_keys_of_their_own(house: House) -> None:
    for caller in (someone(), someone(tenant="t2"), someone(subject="v"), someone(workspace="w2")):
        assert not (await house.create(caller=caller)).replayed
    assert house.effects == 4


async def test_methods_have_keys_of_their_own(house: House) -> None:
    await house.create()
    asked = SessionsDeleteParams(idempotency_key="k", session_id="s")
    answer = await house.keys.perform(someone(), METHODS["sessions.delete"], asked, house.effect, lambda _: None)
    assert not answer.replayed


async def test_the_session_is_the_scope_of_a_run_that_names_one(house: House) -> None:
    async def run(session: str) -> Performed:
        asked = AgentRunParams(idempotency_key="k", input="x", session_id=session)
        return await house.keys.perform(someone(), METHODS["agent.run"], asked, house.effect, lambda _: None)

    assert not (await run("s1")).replayed
    assert not (await run("s2")).replayed
    assert (await run("s1")).replayed


async def test_how_long_the_caller_waits_is_not_compared(house: House) -> None:
    for wait in (0, 5):
        asked = AgentRunParams(idempotency_key="k", input="x", wait_ms=wait)
        await house.keys.perform(someone(), METHODS["agent.run"], asked, house.effect, lambda _: None)
    assert house.effects == 1


async def test_a_failed_call_is_not_remembered(house: House) -> None:
    def fails(tx: Any) -> SessionDeletedResult:
        tx.tenants.ensure("half", "w", "u", now_ms=1)
        raise Conflict("no")

    asked = SessionsCreateParams(idempotency_key="k")
    with pytest.raises(Conflict):
        await house.keys.perform(someone(), METHODS["sessions.create"], asked, fails, lambda _: None)
    assert await house.store.read(lambda tx: tx.tenants.workspace_ids("half")) == []
    assert not (await house.create()).replayed


async def test_an_answer_is_kept_for_a_day_at_least_and_the_key_is_free_when_it_has_expired(house: House) -> None:
    await house.create()
    house.clock.now += 24 * 3600 * 1000
    assert (await house.create()).replayed
    house.clock.now += RETENTION_MS
    assert not (await house.create()).replayed
    assert house.effects == 2


async def test_an_effect_that_outlives_its_transaction_stays_claimed_until_its_run_ends(house: House) -> None:
    asked = AgentAbortParams(idempotency_key="k", run_id="run_1")

    async def abort() -> Performed:
        return await house.keys.perform(
            someone(), METHODS["agent.abort"], asked, lambda _: Ongoing(run_id="run_1"), lambda _: None
        )

    first, second = await abort(), await abort()
    assert (first.payload, first.replayed, second.payload, second.replayed) == (None, False, None, True)
    house.clock.now += RETENTION_MS * 2
    assert (await abort()).payload is None
    ended = AgentAbortResult(run_id="run_1", status="aborted")
    await house.store.write(lambda tx: finish_ongoing(tx, "t", "run_1", ended))
    house.clock.now -= RETENTION_MS * 2
    assert (await abort()).payload == b'{"runId":"run_1","status":"aborted"}'
