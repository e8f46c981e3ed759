"""What becomes of a call that was under way when its gateway died, where a person is to be asked about it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.kill.test_kill_points import HELLO, ON_HOST, command
from tests.kill.victim import Client, Victim
from tests.support.model_server import CallTools, ModelServer, conversation
from tests.support.wire import Json, Wire

SESSION = "s1"


class Person:
    """Starts the run and answers every question about it. `decision` may be changed between lives."""

    def __init__(self) -> None:
        self.decision: Json = {"decision": "approve"}

    async def __call__(self, client: Client) -> None:
        await client.ask("policy", "policy.update", patch=ON_HOST)
        await client.run()
        seen: set[str] = set()
        while True:
            frame = await client.wire.frame(
                lambda frame: (
                    frame.get("event") in ("agent.completed", "agent.failed")
                    or (frame.get("event") == "approval.required" and frame["payload"]["approvalId"] not in seen)
                ),
                60,
            )
            if frame["event"] != "approval.required":
                return
            approval_id = frame["payload"]["approvalId"]
            seen.add(approval_id)
            response = await client.wire.call(
                "approval.resolve", {"approvalId": approval_id, "idempotencyKey": approval_id, **self.decision}
            )
            # One that was decided in another life of the gateway is asked about no more.
            assert response["ok"] or response["error"]["code"] in ("CONFLICT", "IDEMPOTENCY_CONFLICT"), response


class Case:
    """A gateway that asks about interrupted commands, killed in the middle of one."""

    def __init__(self, victim: Victim, model: ModelServer) -> None:
        self.victim = victim
        self.model = model
        self.person = Person()
        self.client = Client(SESSION)

    async def die(self, fault: str) -> None:
        await self.victim.gateway.start(fault=fault)
        await self.victim.die(self.client, self.person)

    async def live(self) -> list[Json]:
        """The session's journal, after a start without a fault."""
        await self.victim.gateway.start()
        await self.victim.act(self.client, self.person)
        return await self.victim.examine(self.client)

    @property
    def marks(self) -> str:
        return self.victim.marks(SESSION)


@pytest.fixture(params=["openai-chat:test"])
async def case(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Case]:
    script = conversation([CallTools([command(SESSION)]), HELLO])
    async with ModelServer(script) as model:
        victim = Victim(tmp_path, model, CORRAL_ASK_AGAIN="bash.exec", CORRAL_MODEL=request.param)
        made = Case(victim, model)
        try:
            await made.die("tool.during@command")
            yield made
        finally:
            await victim.gateway.kill()


def told(request: Json) -> list[str]:
    """The texts of the request's tool results, after a look at whether every call has exactly one, right behind it."""
    calls: list[str] = []
    given: list[tuple[str, str]] = []
    for message in request["messages"]:
        content = message.get("content")
        blocks = content if isinstance(content, list) else []
        if message["role"] == "assistant":
            assert calls == [name for name, _ in given]
            calls += [call["id"] for call in message.get("tool_calls") or []]
            calls += [block["id"] for block in blocks if block["type"] == "tool_use"]
        elif message["role"] == "tool":
            given.append((message["tool_call_id"], message["content"]))
        else:
            given += [
                (block["tool_use_id"], json.dumps(block["content"]))
                for block in blocks
                if block["type"] == "tool_result"
            ]
    assert calls == [name for name, _ in given]
    return [text for _, text in given]


def names(items: list[Json]) -> list[str]:
    return [item["event"] for item in items]


def results(items: list[Json]) -> list[Json]:
    return [item["payload"] for item in items if item["event"] == "agent.tool_result"]


def retries(items: list[Json]) -> list[tuple[str, str]]:
    calls = [item["payload"] for item in items if item["event"] == "agent.tool_call"]
    return [(call["toolCallId"], call["retryOf"]) for call in calls if "retryOf" in call]


@pytest.mark.parametrize("case", ["openai-chat:test", "anthropic:test"], indirect=True)
async def test_an_approved_retry_is_a_call_of_its_own_and_the_model_gets_one_result(case: Case) -> None:
    items = await case.live()
    first, again = [item["payload"] for item in items if item["event"] == "agent.tool_call"]
    assert (first["decision"], "retryOf" in first) == ("allow", False)
    assert (again["decision"], again["retryOf"]) == ("approval-required", first["toolCallId"])
    assert again["toolCallId"] != first["toolCallId"]
    assert again["args"] == first["args"]
    asked = next(item["payload"] for item in items if item["event"] == "approval.required")
    assert (asked["toolCallId"], asked["retryOf"]) == (again["toolCallId"], first["toolCallId"])
    assert "interrupted" in asked["reason"]
    assert [(result["toolCallId"], result["status"]) for result in results(items)] == [
        (first["toolCallId"], "interrupted"),
        (again["toolCallId"], "success"),
    ]
    assert case.marks == "xx"
    (text,) = told(case.model.requests[-1].json)
    assert "may have taken effect" in text
    assert "up" in text.rpartition("What came of that:")[2]


@pytest.mark.parametrize("case", ["openai-chat:test", "anthropic:test"], indirect=True)
async def test_a_rejected_retry_is_not_run_and_the_model_is_told_why(case: Case) -> None:
    case.person.decision = {"decision": "reject", "comment": "once is enough"}
    items = await case.live()
    assert [result["status"] for result in results(items)] == ["interrupted", "denied"]
    assert case.marks == "x"
    (text,) = told(case.model.requests[-1].json)
    assert "may have taken effect" in text
    assert "once is enough" in text


async def test_a_person_may_change_what_is_run_again_and_the_model_is_told(case: Case) -> None:
    case.person.decision = {"decision": "approve", "args": {"command": "echo looked"}}
    items = await case.live()
    assert results(items)[-1]["output"] == "looked\n"
    assert case.marks == "x"
    (text,) = told(case.model.requests[-1].json)
    assert 'changed the arguments to {"command":"echo looked"}' in text


@pytest.mark.parametrize(
    "fault",
    [
        "commit.before@approval.required",
        "commit.after@approval.required",
        "tool.recorded@bash.exec",
        "tool.during@command",
    ],
)
async def test_a_gateway_killed_over_a_retry_asks_again_only_for_what_was_started(case: Case, fault: str) -> None:
    await case.die(fault)
    items = await case.live()
    chain = retries(items)
    started = fault.startswith("tool.")
    assert len(chain) == (2 if started else 1)
    if started:
        assert chain[1][1] == chain[0][0]
    statuses = [result["status"] for result in results(items)]
    assert statuses == ["interrupted"] * len(chain) + ["success"]
    assert case.marks == ("xxx" if fault == "tool.during@command" else "xx")
    assert len(told(case.model.requests[-1].json)) == 1


async def test_an_abort_while_a_retry_waits_leaves_a_whole_transcript(case: Case) -> None:
    gateway = await case.victim.gateway.start()
    async with await Wire.open(gateway.url) as wire:
        await wire.connect(gateway.token())
        await wire.request("events.subscribe", {"sessionId": "s1", "after": 0})
        asked = (await wire.event("approval.required"))["payload"]
        await wire.effect("agent.abort", runId=asked["runId"])
        assert case.marks == "x"
        seen = len(case.model.requests)
        await wire.effect("agent.run", input="what now?", sessionId="s1")
        await wire.event("agent.completed")
    (text,) = told(case.model.requests[seen].json)
    assert "may have taken effect" in text
    assert "was not started" in text


async def test_what_policy_denies_by_now_is_put_before_nobody(case: Case) -> None:
    with sqlite3.connect(case.victim.gateway.data_dir / "corral.db") as database:
        (text,) = database.execute("SELECT document FROM policies WHERE scope_key = 'workspace:w_default'").fetchone()
        document: dict[str, Any] = json.loads(text)
        document["tools"]["bash.exec"] = "deny"
        database.execute(
            "UPDATE policies SET document = ? WHERE scope_key = 'workspace:w_default'", (json.dumps(document),)
        )
    database.close()
    items = await case.live()
    assert "approval.required" not in names(items)
    (result,) = results(items)
    assert (result["status"], "unless a person" in result["output"]) == ("interrupted", False)
