"""What a run may use up, and what it ends with when it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corral.config import ModelSettings
from tests.core.conftest import Open
from tests.core.test_run import finished
from tests.support.clocks import Later
from tests.support.house import house
from tests.support.model_server import CallTools, Hang, Say, Status, conversation

AGAIN = CallTools([("file_list", {})])
PRICED = {"openai-chat:test": ModelSettings(input_usd_per_million=10.0, output_usd_per_million=100.0)}


async def ending(home: Any, **params: Any) -> dict[str, Any]:
    events = await finished(home, **params)
    payload: dict[str, Any] = events[-1]["payload"]
    return payload


async def test_a_model_that_calls_tools_for_ever_is_stopped_after_fifty_steps(open_house: Open) -> None:
    async with open_house([AGAIN]) as home:
        failed = await ending(home)
        assert (failed["code"], len(home.model.requests)) == ("LIMIT_REACHED", 50)


async def test_the_tighter_of_the_callers_and_policys_steps_holds(open_house: Open) -> None:
    async with open_house([AGAIN], {"limits": {"maxStepsPerRun": 3}}) as home:
        assert (await ending(home, limits={"maxSteps": 10}))["code"] == "LIMIT_REACHED"
        assert len(home.model.requests) == 3
        await ending(home, limits={"maxSteps": 2})
        assert len(home.model.requests) == 5


async def test_a_run_that_ends_with_its_last_step_completes(open_house: Open) -> None:
    async with open_house(conversation([AGAIN, Say("ok")])) as home:
        assert (await ending(home, limits={"maxSteps": 2}))["output"] == "ok"


async def test_tokens_are_a_limit(open_house: Open) -> None:
    async with open_house([AGAIN], {"limits": {"maxTokensPerRun": 200}}) as home:
        assert (await ending(home))["code"] == "LIMIT_REACHED"
        assert len(home.model.requests) == 2


async def test_time_is_a_limit_even_while_the_model_says_nothing(open_house: Open) -> None:
    async with open_house([Hang()]) as home:
        failed = await ending(home, limits={"timeoutMs": 300})
        assert failed["code"] == "LIMIT_REACHED"
        assert "time" in failed["message"]


async def test_time_is_a_limit_for_a_tool_too_and_its_call_is_told_as_interrupted(open_house: Open) -> None:
    async with open_house([CallTools([("bash_exec", {"command": "sleep 60"})])]) as home:
        events = await finished(home, limits={"timeoutMs": 500})
        assert [event["event"] for event in events[-2:]] == ["agent.tool_result", "agent.failed"]
        assert events[-2]["payload"]["status"] in ("interrupted", "failed")
        assert events[-1]["payload"]["code"] == "LIMIT_REACHED"


async def test_a_run_stops_before_the_call_that_its_budget_does_not_pay_for(open_house: Open) -> None:
    # A step costs 100 * 10e-6 + 10 * 100e-6 = 0.002 dollars; the request alone some more, estimated.
    async with open_house([AGAIN], models=PRICED) as home:
        failed = await ending(home, limits={"maxCostUsd": 0.05})
        assert failed["code"] == "BUDGET_EXCEEDED"
        async with await home.wire() as wire:
            run = (await wire.request("runs.get", {"runId": failed["runId"]}))["run"]
        assert 0 < run["usage"]["costUsd"] <= 0.05
        assert run["steps"] == len(home.model.requests)


async def test_a_run_under_a_cost_limit_refuses_a_model_without_a_known_price(open_house: Open) -> None:
    async with open_house([Say("ok")]) as home:
        failed = await ending(home, limits={"maxCostUsd": 1})
        assert failed["code"] == "BUDGET_EXCEEDED"
        assert home.model.requests == []


async def test_policys_cost_limit_holds_as_the_callers_does(open_house: Open) -> None:
    async with open_house([AGAIN], {"limits": {"maxCostUsdPerRun": 0.00001}}, models=PRICED) as home:
        assert (await ending(home))["code"] == "BUDGET_EXCEEDED"
        assert home.model.requests == []


async def test_a_model_that_policy_does_not_allow_is_refused(open_house: Open) -> None:
    async with open_house([Say("ok")], {"models": {"allowed": ["demo"]}}) as home, await home.wire() as wire:
        answer = await wire.call("agent.run", {"input": "x", "idempotencyKey": "k"})
        assert answer["error"]["code"] == "POLICY_DENIED"
        assert home.model.requests == []


async def test_the_next_model_of_the_chain_answers_when_the_first_is_out(open_house: Open) -> None:
    async with open_house([Status(503, retry_after=600)], fallbacks=["demo"]) as home:
        done = await ending(home)
        assert "not a language model" in done["output"] or "LLM" in done["output"]
        async with await home.wire() as wire:
            assert (await wire.request("runs.get", {"runId": done["runId"]}))["run"]["model"] == "demo"


async def test_when_all_models_are_out_the_run_fails_and_says_what_was_tried(open_house: Open) -> None:
    async with open_house([Status(401)]) as home:
        failed = await ending(home)
        assert failed["code"] == "MODEL_UNAVAILABLE"
        assert "openai-chat:test" in failed["message"]


@pytest.mark.parametrize("model", ["nobody:knows", "plain"])
async def test_a_model_of_no_known_provider_is_refused_before_anything_is_made(open_house: Open, model: str) -> None:
    async with open_house([Say("ok")]) as home, await home.wire() as wire:
        params = {"input": "x", "idempotencyKey": "k", "sessionId": "s1", "model": model}
        assert (await wire.call("agent.run", params))["error"]["code"] == "INVALID_REQUEST"
        assert (await wire.request("sessions.get", {"sessionId": "s1"}))["session"] is None


async def test_the_time_between_an_orderly_stop_and_the_next_start_is_not_the_runs(tmp_path: Path) -> None:
    script = conversation([[Hang(after=2), Say("at last")]])
    async with house(tmp_path / "data", script=script) as home, await home.wire() as wire:
        await wire.effect("agent.run", input="go", sessionId="s1", limits={"timeoutMs": 300_000})
        await wire.event("agent.delta")
    tomorrow = Later(24 * 3600 * 1000)
    async with house(tmp_path / "data", script=[Say("at last")], clock=tomorrow) as home, await home.wire() as wire:
        await wire.request("events.subscribe", {"sessionId": "s1", "after": 0})
        ended = await wire.frame(lambda frame: frame.get("event") in ("agent.completed", "agent.failed"))
        assert ended["event"] == "agent.completed", ended


DAY_MS = 24 * 3600 * 1000


async def test_a_clock_that_was_put_forward_before_an_orderly_stop_has_not_used_up_the_runs_time(
    tmp_path: Path,
) -> None:
    """Nor has the sleep of a machine: the lease was not renewed, and the loop has counted no such time."""
    clock, script = Later(0), conversation([[Hang(after=2), Say("at last")]])
    async with house(tmp_path / "data", script=script, clock=clock) as home, await home.wire() as wire:
        await wire.effect("agent.run", input="go", sessionId="s1", limits={"timeoutMs": 300_000})
        await wire.event("agent.delta")
        clock.ahead = DAY_MS
    async with house(tmp_path / "data", script=[Say("at last")], clock=clock) as home, await home.wire() as wire:
        await wire.request("events.subscribe", {"sessionId": "s1", "after": 0})
        ended = await wire.frame(lambda frame: frame.get("event") in ("agent.completed", "agent.failed"))
        assert ended["event"] == "agent.completed", ended


async def test_nor_has_one_that_was_put_forward_before_the_run_came_to_wait_for_a_person(tmp_path: Path) -> None:
    clock = Later(0)

    def answer(request: dict[str, Any]) -> Any:
        clock.ahead = DAY_MS
        asked = request["messages"][-1]["role"] == "tool"
        return Say("at last") if asked else CallTools([("file_write", {"path": "a", "content": "b"})])

    async with house(tmp_path / "data", script=answer, clock=clock) as home, await home.wire() as wire:
        await wire.effect("agent.run", input="go", sessionId="s1", limits={"timeoutMs": 300_000})
        asked = (await wire.event("approval.required"))["payload"]
        await wire.effect("approval.resolve", approvalId=asked["approvalId"], decision="approve")
        ended = await wire.frame(lambda frame: frame.get("event") in ("agent.completed", "agent.failed"))
        assert ended["event"] == "agent.completed", ended
