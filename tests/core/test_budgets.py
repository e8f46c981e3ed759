"""Daily budgets: reserved before the model is called, settled after, never overspent by runs at the same time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from corral.governance.budgets import day_of
from tests.core.conftest import Open
from tests.core.test_limits import AGAIN, PRICED, ending
from tests.support.house import House
from tests.support.model_server import Hang, Say, Slow, Status

WORKSPACE = "workspace:w_default"
SCOPES = ("tenant:t_default", WORKSPACE, f"{WORKSPACE}/agent:a_default")


def per_day(**limits: Any) -> dict[str, Any]:
    return {"limits": {"perDay": limits}}


async def used(home: House, scope: str = WORKSPACE) -> tuple[int, int, float]:
    """Steps, tokens and dollars of today, with what is reserved."""
    today = day_of(home.server._clock.now_ms())
    row = await home.server.store.write(lambda tx: tx.usage.taken("t_default", scope, today))
    return row.steps, row.tokens, row.cost_usd


async def reserved(home: House) -> int:
    def query(tx: Any) -> int:
        return int(tx.usage._connection._connection.exec_driver_sql("SELECT count(*) FROM reservations").scalar_one())

    return await home.server.store.read(query)


async def runs(home: House, count: int) -> list[dict[str, Any]]:
    """So many runs at once, each in a session of its own; their terminal events."""
    async with await home.wire() as wire:
        started = await asyncio.gather(*(wire.effect("agent.run", input="go") for _ in range(count)))
        ids = {run["runId"] for run in started}
        ends: dict[str, dict[str, Any]] = {}
        while len(ends) < count:
            frame = await wire.frame(
                lambda frame: (
                    frame.get("event") in ("agent.completed", "agent.failed") and frame["payload"]["runId"] not in ends
                )
            )
            ends[frame["payload"]["runId"]] = frame
        assert set(ends) == ids
        return list(ends.values())


async def test_a_session_has_a_budget_of_its_own_and_another_session_does_not_pay_for_it(open_house: Open) -> None:
    policy = {"limits": {"sessionPerDay": {"steps": 2}}}
    async with open_house([Say("ok")], policy) as home, await home.wire() as wire:
        ends = []
        for session in ("s_one", "s_one", "s_one", "s_two"):
            ends.append(await ending(home, sessionId=session))
        assert [end.get("code") for end in ends] == [None, None, "BUDGET_EXCEEDED", None]
        assert "the session's 2 steps for today (UTC)" in ends[2]["message"]
        # A layer may tighten it, not loosen it.
        await wire.effect(
            "policy.update", layer="agent", agentId="a_default", patch={"limits": {"sessionPerDay": {"steps": 9}}}
        )
        merged = await wire.request("policy.get", {"agentId": "a_default", "effective": True})
        assert merged["policy"]["limits"]["sessionPerDay"]["steps"] == 2


async def test_a_session_s_budget_in_dollars_refuses_a_model_without_a_price(open_house: Open) -> None:
    async with open_house([Say("ok")], {"limits": {"sessionPerDay": {"costUsd": 1.0}}}) as home:
        assert (await ending(home))["code"] == "BUDGET_EXCEEDED"
        assert home.model.requests == []


@pytest.mark.parametrize("layer", ["tenant", "workspace", "agent"])
async def test_of_64_parallel_runs_a_budget_of_ten_steps_lets_ten_calls_through(open_house: Open, layer: str) -> None:
    async with open_house([Slow(0.2)], {}) as home:
        async with await home.wire() as wire:
            address = {"layer": layer} | ({"agentId": "a_default"} if layer == "agent" else {})
            await wire.effect("policy.update", patch=per_day(steps=10), **address)
        ends = await runs(home, 64)
        codes = [end["payload"].get("code") for end in ends]
        assert len(home.model.requests) == 10
        assert (codes.count(None), codes.count("BUDGET_EXCEEDED")) == (10, 54)
        assert (await used(home))[0] == 10
        assert await reserved(home) == 0


async def test_a_stop_by_a_daily_budget_is_journalled_and_audited(open_house: Open) -> None:
    async with open_house([Say("ok")], per_day(steps=0)) as home:
        failed = await ending(home)
        assert failed["code"] == "BUDGET_EXCEEDED"
        assert "workspace" in failed["message"]
        async with await home.wire() as wire:
            [record] = (await wire.request("audit.query", {"action": "budget.stop"}))["items"]
        assert record["metadata"]["runId"] == failed["runId"]
        assert home.model.requests == []


async def test_what_was_used_before_a_limit_was_set_counts(open_house: Open) -> None:
    async with open_house([Say("ok")], {}) as home:
        await ending(home)
        for scope in SCOPES:
            assert await used(home, scope) == (1, 110, 0.0)
        async with await home.wire() as wire:
            await wire.effect("policy.update", patch=per_day(steps=1))
        assert (await ending(home))["code"] == "BUDGET_EXCEEDED"
        assert len(home.model.requests) == 1


async def test_a_run_is_stopped_in_its_middle_when_the_day_is_used_up(open_house: Open) -> None:
    async with open_house([AGAIN], per_day(steps=3)) as home:
        assert (await ending(home))["code"] == "BUDGET_EXCEEDED"
        assert len(home.model.requests) == 3


async def test_each_layer_counts_for_itself_and_the_tighter_one_holds(open_house: Open) -> None:
    async with open_house([AGAIN], per_day(steps=5)) as home:
        async with await home.wire() as wire:
            await wire.effect("policy.update", layer="tenant", patch=per_day(steps=2, tokens=1_000_000))
            merged = await wire.request("policy.get", {"effective": True})
        assert merged["policy"]["limits"]["perDay"] == {"steps": 2, "tokens": 1_000_000, "costUsd": None}
        failed = await ending(home)
        assert (failed["code"], len(home.model.requests)) == ("BUDGET_EXCEEDED", 2)
        assert "tenant" in failed["message"]


async def test_tokens_are_settled_with_what_was_used_and_the_model_is_told_how_long_it_may_answer(
    open_house: Open,
) -> None:
    async with open_house([Say("ok")], per_day(tokens=5_000)) as home:
        await ending(home)
        assert await used(home) == (1, 110, 0.0)
        sent = home.model.requests[0].json
        told = sent.get("max_completion_tokens", sent.get("max_tokens"))
        assert told is not None
        assert 0 < told < 5_000
        async with await home.wire() as wire:
            await wire.effect("policy.update", patch=per_day(tokens=200))
        assert (await ending(home))["code"] == "BUDGET_EXCEEDED"
        assert len(home.model.requests) == 1


async def test_parallel_runs_do_not_overspend_tokens_or_money(open_house: Open) -> None:
    # A step costs 0.002 dollars; what is set aside for one is more, for its longest answer.
    async with open_house([Slow(0.1)], per_day(costUsd=2.0), models=PRICED) as home:
        ends = await runs(home, 12)
        done = sum(end["event"] == "agent.completed" for end in ends)
        assert 1 <= done == len(home.model.requests) < 12
        steps, _tokens, cost = await used(home)
        assert (steps, round(cost, 6)) == (done, round(0.002 * done, 6))
        assert (await ending(home))["output"]


async def test_a_model_without_a_known_price_is_refused_under_a_daily_cost_budget(open_house: Open) -> None:
    async with open_house([Say("ok")], per_day(costUsd=100)) as home:
        failed = await ending(home)
        assert failed["code"] == "BUDGET_EXCEEDED"
        assert "price" in failed["message"]
        assert home.model.requests == []


async def test_a_call_that_fails_gives_its_reservation_back(open_house: Open) -> None:
    async with open_house([Status(401)], per_day(steps=5)) as home:
        assert (await ending(home))["code"] == "MODEL_UNAVAILABLE"
        assert (await used(home))[0] == 0


async def test_an_aborted_run_gives_its_reservation_back(open_house: Open) -> None:
    async with open_house([Hang()], per_day(steps=1)) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        async with asyncio.timeout(60):
            while not home.model.requests:  # noqa: ASYNC110  (the model server tells nobody)
                await asyncio.sleep(0.02)
        assert ((await used(home))[0], await reserved(home)) == (1, 1)
        await wire.effect("agent.abort", runId=run["runId"])
        assert ((await used(home))[0], await reserved(home)) == (0, 0)


async def test_a_run_that_is_taken_up_after_a_crash_has_nothing_reserved_from_before(open_house: Open) -> None:
    async with open_house([Hang(), Say("ok")], per_day(steps=1)) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        async with asyncio.timeout(60):
            while not home.model.requests:  # noqa: ASYNC110  (the model server tells nobody)
                await asyncio.sleep(0.02)
        taken = await home.server.store.write(
            lambda tx: (
                tx.runs.update("t_default", run["runId"], lease_owner="one that died"),
                home.server.core._take_up(tx, "t_default", run["runId"], True),
                tx.usage.reserved("t_default", run["runId"]),
            )
        )
        assert taken[2] == []


async def test_without_a_limit_there_is_no_commit_before_the_call(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house([Say("ok")], {}) as home:
        write, commits = home.server.store.write, []

        async def counted(*args: Any) -> Any:
            commits.append(len(home.model.requests))
            return await write(*args)

        monkeypatch.setattr(home.server.store, "write", counted)
        await ending(home)
        free = commits.count(0)
        home.model.requests.clear()
        async with await home.wire() as wire:
            await wire.effect("policy.update", patch=per_day(steps=99))
        commits.clear()
        await ending(home)
        assert commits.count(0) == free + 1
