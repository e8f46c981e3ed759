"""Runs over the wire whose models are of several providers: fallbacks, agents, transcripts that move, keys."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.models.api import AssistantMessage, Message, ToolMessage
from tests.models.helpers import CLAUDE, GEMINI, MODEL, request, rig, user
from tests.support.house import House, house
from tests.support.model_server import CallTools, ErrorInStream, Say, Status, turns_since_user

KEY = "sk-canary-0123456789abcdef-of-the-house"
KEYS = dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GOOGLE_API_KEY"), KEY)
ECHO = f"Incorrect API key provided: {KEY}"


def by_model(**steps: Any) -> Callable[[dict[str, Any]], Any]:
    """The step by the model's name and the place in the turn; a list has one step for each place."""

    def choose(asked: dict[str, Any]) -> Any:
        found = steps[asked["model"].replace("-", "_")]
        return found[turns_since_user(asked)] if isinstance(found, list) else found

    return choose


async def run(home: House, text: str = "go", **params: Any) -> list[dict[str, Any]]:
    async with await home.wire() as wire:
        begun = await wire.effect("agent.run", input=text, **params)
        await wire.frame(
            lambda frame: (
                frame.get("event") in ("agent.completed", "agent.failed")
                and frame["payload"]["runId"] == begun["runId"]
            )
        )
        return [frame for frame in wire.durable if frame["payload"].get("runId") == begun["runId"]]


async def test_a_run_goes_on_with_the_next_provider_where_the_first_is_out(tmp_path: Path) -> None:
    script = by_model(
        gpt=[CallTools([("file_list", {})], text="I look."), Status(401)],
        claude=[Status(500), Say("Claude is done.")],
    )
    async with house(
        tmp_path, script=script, environment=KEYS, model="openai-chat:gpt", fallbacks=["anthropic:claude"]
    ) as home:
        events = await run(home)
        requests = home.model.requests
    assert [event["event"] for event in events if event["event"] != "agent.delta"][-2:] == [
        "agent.message",
        "agent.completed",
    ]
    assert events[-1]["payload"]["output"] == "Claude is done."
    assert [one.path for one in requests] == ["/v1/chat/completions", "/v1/chat/completions", "/v1/messages"]
    call, results = requests[-1].json["messages"][1:]
    assert [block["type"] for block in call["content"]] == ["text", "tool_use"]
    assert results["content"][0]["tool_use_id"] == call["content"][1]["id"]


async def test_a_provider_that_policy_does_not_allow_is_no_fallback(tmp_path: Path) -> None:
    script = by_model(gpt=Status(401), claude=Say("never"))
    async with house(
        tmp_path, script=script, environment=KEYS, model="openai-chat:gpt", fallbacks=["anthropic:claude"]
    ) as home:
        async with await home.wire() as wire:
            await wire.effect("policy.update", patch={"models": {"allowed": ["openai-chat:*"]}})
        events = await run(home)
        assert events[-1]["event"] == "agent.failed"
        assert events[-1]["payload"]["code"] == "MODEL_UNAVAILABLE"
        assert [one.path for one in home.model.requests] == ["/v1/chat/completions"]


async def test_each_agent_has_its_model_and_one_session_may_pass_through_all_of_them(tmp_path: Path) -> None:
    script = by_model(
        gpt=[CallTools([("file_list", {})]), Say("from gpt")],
        claude=[CallTools([("file_list", {})], thinking=["let me see"]), Say("from claude")],
        gemini=[CallTools([("file_list", {})], thinking=["hm"]), Say("from gemini")],
    )
    async with house(tmp_path, script=script, environment=KEYS, model="openai-chat:gpt") as home:
        async with await home.wire() as wire:
            for agent, model in (("a_claude", "anthropic:claude"), ("a_gemini", "google:gemini")):
                made = {"id": agent, "name": agent, "systemPrompt": "", "model": model, "tools": ["file.list"]}
                await wire.effect("agents.upsert", agent=made)
        for model in ("openai-chat:gpt", "anthropic:claude", "google:gemini", "openai-chat:gpt"):
            events = await run(home, sessionId="s_moving", model=model)
            assert events[-1]["event"] == "agent.completed"
        for agent, said in (("a_claude", "from claude"), ("a_gemini", "from gemini")):
            events = await run(home, agentId=agent)
            assert events[-1]["payload"]["output"] == said


@pytest.mark.parametrize("writer", [MODEL, CLAUDE, GEMINI])
@pytest.mark.parametrize("reader", [MODEL, CLAUDE, GEMINI])
async def test_what_one_provider_called_another_may_answer(writer: str, reader: str) -> None:
    script = [
        CallTools([("bash_exec", {"n": 1}), ("file_list", {})], text="So:", thinking=["hm"]),
        Say("read"),
    ]
    async with rig(script) as r:
        called = await r.message(request(user("go")), [writer])
        results = [
            ToolMessage(tool_call_id=call.id, name=call.name, output=f"of {call.name}") for call in called.tool_calls
        ]
        history: list[Message] = [user("go"), called, *results, AssistantMessage(text="", extra={"x": 1}), user("?")]
        assert (await r.message(request(*history[:4]), [reader])).text == "read"
        sent = str(r.sent)
        assert "of bash.exec" in sent
        assert "of file.list" in sent
        assert sent.count(called.tool_calls[0].id) == 2
        assert ("signature of hm" in sent or "c2lnbmF0dXJlIG9mIGht" in sent) == (writer == reader != MODEL)
        assert (await r.message(request(*history), [reader])).text == "read"


@pytest.mark.parametrize("model", ["openai-chat:m", "anthropic:m", "google:m"])
async def test_no_key_is_in_what_a_client_sees_nor_in_the_journal_the_audit_or_the_logs(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    steps = iter(
        [
            Status(401, message=ECHO, phrase=KEY),
            Status(400, message=ECHO, code=KEY),
            Status(402, message=ECHO),
            ErrorInStream(after=3, message=ECHO, type="authentication_error", code=401),
            ErrorInStream(after=3, message=ECHO, type="invalid_request_error", code=400),
        ]
    )
    async with house(tmp_path, script=lambda _asked: next(steps), environment=KEYS, model=model) as home:
        seen = ""
        for _ in range(5):
            events = await run(home)
            assert events[-1]["event"] == "agent.failed"
            seen += str(events)
        async with await home.wire() as wire:
            seen += str(await wire.request("runs.get", {"runId": events[0]["payload"]["runId"]}))
        seen += repr(home.server.models) + repr(vars(home.server.models)["_providers"])
        headers = home.model.requests[0].headers
        assert any(KEY in value for value in headers.values())
    seen += caplog.text
    for secret in (KEY, "0123456789abcdef"):
        assert secret not in seen
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file
