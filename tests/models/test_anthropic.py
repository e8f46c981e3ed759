"""Messages: what goes over the wire, and what is made of what comes back."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from corral.models.anthropic import max_tokens
from corral.models.api import (
    AssistantMessage,
    Image,
    Message,
    ModelRequest,
    Restarted,
    Text,
    TextDelta,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from corral.models.http import Timeouts
from corral.models.router import RetryPolicy
from corral.models.transcript import LEFT_OUT, MISSING_RESULT
from corral.protocol.errors import InvalidRequest, ModelUnavailable
from tests.models.helpers import CLAUDE, KEY, TOOLS, Rig, request, rig, text_of, user
from tests.support.model_server import (
    CallTools,
    CutAfter,
    Drop,
    ErrorInStream,
    Hang,
    LengthInToolCall,
    Malformed,
    NoHttp,
    NoUsage,
    Raw,
    Say,
    Status,
    Step,
    Wire,
)

ONCE = RetryPolicy(attempts=1)
CHAIN = (CLAUDE,)


async def sent(r: Rig, asked: ModelRequest | None = None) -> dict[str, Any]:
    await r.events(asked, CHAIN)
    return r.sent


def bare(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "cache_control"}


def calls(*ids: str) -> AssistantMessage:
    return AssistantMessage(text="", tool_calls=[ToolCall(id=one, name="bash.exec", args={"n": one}) for one in ids])


def result(call_id: str, output: str = "ok", **more: Any) -> ToolMessage:
    return ToolMessage(tool_call_id=call_id, name="bash.exec", output=output, **more)


# ---- the request


async def test_the_request_has_the_headers_and_fields_that_the_wire_requires() -> None:
    async with rig([Say("ok")]) as r:
        body = await sent(r)
        assert (body["model"], body["stream"], body["max_tokens"]) == ("claude-sonnet-4-6", True, 32_000)
        headers = r.server.requests[0].headers
        assert (headers["x-api-key"], headers["anthropic-version"]) == (KEY, "2023-06-01")
        assert "Authorization" not in headers
        assert r.server.requests[0].path == "/v1/messages"
        assert [bare(block) for block in body["system"]] == [{"type": "text", "text": "You are a test."}]
        assert body["tools"][0]["name"] == "bash_exec"
        assert body["tools"][0]["input_schema"] == {"type": "object", "properties": {}}


async def test_a_base_url_may_end_in_the_version_and_may_hold_credentials() -> None:
    async with rig([Say("ok")]) as r, rig([Say("ok")]) as other:
        base = other.server.base_url.replace("http://", "http://user:pass@")
        async with rig([], env={"ANTHROPIC_BASE_URL": base}) as through:
            await through.events(chain=CHAIN)
        assert r.server.requests == []
        assert other.server.requests[0].path == "/v1/messages"
        assert other.server.requests[0].headers["Authorization"].startswith("Basic ")
        assert other.server.requests[0].headers["x-api-key"] == KEY


@pytest.mark.parametrize(
    ("name", "asked", "given"),
    [
        ("claude-3-opus-20240229", None, 4_096),
        ("claude-3-5-haiku-latest", 90_000, 8_192),
        ("claude-3-7-sonnet-latest", None, 16_000),
        ("claude-sonnet-4-20250514", None, 16_000),
        ("claude-opus-4-1-20250805", None, 16_000),
        ("claude-opus-4-5", None, 32_000),
        ("claude-sonnet-5", 500, 500),
        ("a-model-of-my-own", None, 16_000),
        ("a-model-of-my-own", 0, 1),
    ],
)
def test_the_token_limit_is_what_was_asked_for_up_to_what_the_model_gives(
    name: str, asked: int | None, given: int
) -> None:
    assert max_tokens(name, asked) == given


async def test_results_of_a_step_go_back_in_one_user_message_in_the_order_of_their_calls() -> None:
    history: list[Message] = [
        user("go"),
        calls("tc_1", "tc_2"),
        result("tc_2", "two", is_error=True),
        result("tc_1", "one"),
    ]
    async with rig([Say("ok")]) as r:
        messages = (await sent(r, request(*history)))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == [
        {"type": "tool_use", "id": "tc_1", "name": "bash_exec", "input": {"n": "tc_1"}},
        {"type": "tool_use", "id": "tc_2", "name": "bash_exec", "input": {"n": "tc_2"}},
    ]
    assert [bare(block) for block in messages[2]["content"]] == [
        {"type": "tool_result", "tool_use_id": "tc_1", "content": "one"},
        {"type": "tool_result", "tool_use_id": "tc_2", "content": "two", "is_error": True},
    ]


async def test_messages_of_one_role_are_merged_with_the_results_before_the_text() -> None:
    history: list[Message] = [user("a"), user("b"), calls("tc_1"), user("stop"), result("tc_1"), user("and?")]
    async with rig([Say("ok")]) as r:
        messages = (await sent(r, request(*history)))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [block["text"] for block in messages[0]["content"]] == ["a", "b"]
    assert [block["type"] for block in messages[2]["content"]] == ["tool_result", "text", "text"]


async def test_a_call_without_a_result_gets_one_that_is_an_error() -> None:
    async with rig([Say("ok")]) as r:
        messages = (await sent(r, request(user("go"), calls("tc_1"), user("now?"))))["messages"]
    assert messages[2]["content"][0] == {
        "type": "tool_result",
        "tool_use_id": "tc_1",
        "content": MISSING_RESULT,
        "is_error": True,
    }


@pytest.mark.parametrize(
    "history",
    [
        [AssistantMessage(text="hm"), user("go")],
        [user("go"), AssistantMessage(text="hm")],
        [user("go"), AssistantMessage(text=""), AssistantMessage(text=" \n"), user(" ")],
        [UserMessage(content=[])],
        [result("gone"), user("go")],
        [calls("tc_1"), result("tc_1", "")],
    ],
    ids=range(6),
)
async def test_any_history_becomes_turns_that_begin_and_end_with_the_user_and_hold_no_empty_text(
    history: list[Message],
) -> None:
    async with rig([Say("ok")]) as r:
        messages = (await sent(r, request(*history)))["messages"]
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    for message in messages:
        assert message["content"]
        assert all(block.get("text", "x").strip() for block in message["content"])
        assert all(block.get("content", "x").strip() for block in message["content"])
    if isinstance(history[0], AssistantMessage):
        assert messages[0]["content"][0]["text"] == LEFT_OUT


async def test_without_tools_those_that_the_history_calls_are_defined_and_not_to_be_called() -> None:
    async with rig([Say("ok")]) as r:
        body = await sent(r, request(user("go"), calls("tc_1"), result("tc_1"), tools=[]))
        assert [tool["name"] for tool in body["tools"]] == ["bash_exec"]
        assert body["tool_choice"] == {"type": "none"}
        body = await sent(r, request(user("go"), tools=[]))
        assert not {"tools", "tool_choice"} & set(body)


async def test_an_image_is_sent_in_base64() -> None:
    message = UserMessage(content=[Text(text="what is it?"), Image(mime_type="image/png", data="QUJD")])
    async with rig([Say("ok")]) as r:
        (asked,) = (await sent(r, request(message)))["messages"]
    source = {"type": "base64", "media_type": "image/png", "data": "QUJD"}
    assert [bare(block) for block in asked["content"]] == [
        {"type": "text", "text": "what is it?"},
        {"type": "image", "source": source},
    ]


async def test_broken_arguments_go_back_as_an_empty_input() -> None:
    broken = AssistantMessage(
        text="", tool_calls=[ToolCall(id="a/b.1", name="bash.exec", args=None, problem="no JSON")]
    )
    async with rig([Say("ok")]) as r:
        messages = (await sent(r, request(user("go"), broken, result("a/b.1"))))["messages"]
    assert messages[1]["content"][0] == {"type": "tool_use", "id": "a_b_1", "name": "bash_exec", "input": {}}
    assert messages[2]["content"][0]["tool_use_id"] == "a_b_1"


async def test_a_parameter_schema_without_a_type_is_an_objects() -> None:
    tool = type(TOOLS[0])(name="x", description="", parameters={})
    async with rig([Say("ok")]) as r:
        assert (await sent(r, request(tools=[tool])))["tools"][0]["input_schema"] == {"type": "object"}


# ---- cache marks


def marked(body: dict[str, Any]) -> list[Any]:
    blocks = [*body.get("tools", []), *body.get("system", [])]
    blocks += [block for message in body["messages"] for block in message["content"]]
    return [block for block in blocks if "cache_control" in block]


async def test_tools_system_and_the_ends_of_this_request_and_the_last_are_marked_and_no_more() -> None:
    history: list[Message] = [user("go")]
    for number in range(5):
        history += [calls(f"tc_{number}"), result(f"tc_{number}", f"out {number}")]
    async with rig([Say("ok")]) as r:
        body = await sent(r, request(*history))
    assert [block.get("name") or block.get("text") or block["content"] for block in marked(body)] == [
        "http_request",
        "You are a test.",
        "out 3",
        "out 4",
    ]
    assert all(block["cache_control"] == {"type": "ephemeral"} for block in marked(body))


async def test_a_step_begins_as_the_one_before_it_so_that_the_cache_is_hit() -> None:
    script = [CallTools([("bash_exec", {"n": 1})], thinking=["hm"]), CallTools([("bash_exec", {"n": 2})]), Say("x")]
    history: list[Message] = [user("go")]
    async with rig(script) as r:
        for _ in range(3):
            message = await r.message(request(*history), CHAIN)
            history += [message, *(result(call.id) for call in message.tool_calls)]
        bodies = [one.json for one in r.server.requests]
    for before, after in itertools.pairwise(bodies):
        flat = [[bare(block) for m in body["messages"] for block in m["content"]] for body in (before, after)]
        assert flat[1][: len(flat[0])] == flat[0]
        last = before["messages"][-1]["content"][-1]
        assert any(bare(block) == bare(last) for block in marked(after))


# ---- the answer


async def test_text_comes_in_pieces_and_the_last_event_holds_it_whole() -> None:
    async with rig([Say("Grüße, 世界! 🎉 " * 5, chunks=9, delay=0.01, wire=Wire(split_bytes=7))]) as r:
        events = await r.events(chain=CHAIN)
        assert sum(isinstance(event, TextDelta) for event in events) > 3
        finished = await r.finished(chain=CHAIN)
        assert text_of(events) == finished.message.text == "Grüße, 世界! 🎉 " * 5
        assert (finished.model, finished.stop, finished.message.extra) == (CLAUDE, "end", {})


async def test_parallel_calls_come_with_our_names_and_ids() -> None:
    step = CallTools([("bash_exec", {"command": "ls"}), ("file_read", {"path": "ü"}), ("made_up", {})], text="So:")
    async with rig([step]) as r:
        finished = await r.finished(chain=CHAIN)
    assert finished.stop == "tool_calls"
    assert [(call.name, call.args) for call in finished.message.tool_calls] == [
        ("bash.exec", {"command": "ls"}),
        ("file.read", {"path": "ü"}),
        ("made_up", {}),
    ]
    assert len({call.id for call in finished.message.tool_calls}) == 3
    assert all(call.id.startswith("tc_") for call in finished.message.tool_calls)


@pytest.mark.parametrize(
    ("args", "problem"), [("{broken", "not valid JSON"), ("[1]", "an array"), ('{"a": NaN}', "not valid JSON")]
)
async def test_arguments_that_are_no_object_are_told_in_words(args: str, problem: str) -> None:
    async with rig([CallTools([("bash_exec", args)])]) as r:
        (call,) = (await r.message(chain=CHAIN)).tool_calls
    assert call.args is None
    assert problem in (call.problem or "")


async def test_a_call_without_arguments_has_an_empty_object() -> None:
    async with rig([CallTools([("file_list", "")])]) as r:
        (call,) = (await r.message(chain=CHAIN)).tool_calls
    assert (call.args, call.problem) == ({}, None)


async def test_a_call_cut_off_by_the_token_limit_carries_a_problem() -> None:
    async with rig([LengthInToolCall(text="I will")]) as r:
        finished = await r.finished(chain=CHAIN)
    assert finished.stop == "length"
    assert finished.message.tool_calls[0].args is None
    assert "token limit" in (finished.message.tool_calls[0].problem or "")


@pytest.mark.parametrize(
    ("reason", "stop"),
    [
        ("end_turn", "end"),
        ("stop_sequence", "end"),
        ("pause_turn", "end"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "refused"),
        ("one_of_tomorrow", "end"),
    ],
)
async def test_each_stop_reason_has_its_meaning(reason: str, stop: str) -> None:
    async with rig([Say("so far", finish=reason)]) as r:
        finished = await r.finished(chain=CHAIN)
    assert (finished.stop, finished.message.text) == (stop, "so far")


async def test_a_server_that_does_not_stream_is_understood_too() -> None:
    content: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "So:"},
        {"type": "tool_use", "id": "x", "name": "bash_exec", "input": {"command": "ls"}},
    ]
    body = {"type": "message", "content": content, "stop_reason": "tool_use", "usage": {"input_tokens": 7}}
    async with rig([Raw(json.dumps(body).encode(), "application/json")]) as r:
        finished = await r.finished(chain=CHAIN)
    assert (finished.message.text, finished.stop, finished.usage.input_tokens) == ("So:", "tool_calls", 7)
    assert finished.message.tool_calls[0].args == {"command": "ls"}
    assert finished.message.extra["anthropic"]["parts"][0] == {"own": content[0]}


# ---- usage


async def test_cached_tokens_are_counted_as_input_and_have_their_own_price() -> None:
    async with rig([Say("ok", usage=(1_000, 100), cached=(50_000, 2_000))]) as r:
        usage = (await r.finished(chain=["anthropic:claude-haiku-4-5"])).usage
    assert (usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens) == (53_000, 50_000, 2_000)
    assert usage.output_tokens == 100
    assert usage.cost_usd == pytest.approx((1_000 * 1 + 50_000 * 0.1 + 2_000 * 1.25 + 100 * 5) / 1e6)


async def test_tokens_that_the_server_does_not_count_are_estimated() -> None:
    async with rig([NoUsage(Say("some words"))]) as r:
        usage = (await r.finished(chain=CHAIN)).usage
    assert usage.input_tokens > 10
    assert usage.output_tokens > 1


# ---- thinking


THINKER = CallTools([("bash_exec", {"n": 1})], text="I look.", thinking=["Let me see.", "redacted:xyz"])


async def thought(r: Rig) -> AssistantMessage:
    return await r.message(request(user("go")), CHAIN)


async def test_thinking_is_no_text_but_goes_back_unchanged_in_its_place_within_the_turn() -> None:
    async with rig([THINKER, Say("done")]) as r:
        events = await r.events(request(user("go")), CHAIN)
        assert text_of(events) == "I look."
        message = await thought(r)
    async with rig([THINKER, Say("done")]) as r:
        message = await thought(r)
        await r.events(request(user("go"), message, result(message.tool_calls[0].id)), CHAIN)
        assert r.sent["messages"][1]["content"] == [
            {"type": "thinking", "thinking": "Let me see.", "signature": "signature of Let me see."},
            {"type": "redacted_thinking", "data": "redacted:xyz"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": message.tool_calls[0].id, "name": "bash_exec", "input": {"n": 1}},
        ]


async def test_thinking_between_calls_keeps_its_place() -> None:
    blocks: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "a", "signature": "1"},
        {"type": "text", "text": "one "},
        {"type": "tool_use", "id": "x", "name": "bash_exec", "input": {}},
        {"type": "thinking", "thinking": "b", "signature": "2"},
        {"type": "text", "text": "two"},
        {"type": "tool_use", "id": "y", "name": "file_list", "input": {}},
    ]
    body = {"type": "message", "content": blocks, "stop_reason": "tool_use"}
    async with rig([Raw(json.dumps(body).encode(), "application/json"), Say("ok")]) as r:
        message = await thought(r)
        results = [result(call.id) for call in message.tool_calls]
        await r.events(request(user("go"), message, *results), CHAIN)
    kinds = [(block["type"], block.get("text", "")) for block in r.sent["messages"][1]["content"]]
    assert kinds == [(block["type"], block.get("text", "")) for block in blocks]


async def test_thinking_of_earlier_turns_of_another_model_or_of_a_changed_message_is_left_out() -> None:
    async with rig([THINKER, Say("done")]) as r:
        message = await thought(r)
        back = result(message.tool_calls[0].id)
        cut = AssistantMessage(text="I", tool_calls=message.tool_calls, extra=message.extra)
        histories: list[tuple[list[Message], str]] = [
            ([user("go"), message, back, user("next")], CLAUDE),
            ([user("go"), message, back], "anthropic:claude-opus-5"),
            ([user("go"), cut, back], CLAUDE),
        ]
        for history, model in histories:
            await r.events(request(*history), [model])
            assert [block["type"] for block in r.sent["messages"][1]["content"]] == ["text", "tool_use"]


async def test_a_message_of_thinking_alone_does_not_end_in_it() -> None:
    async with rig([Say("", thinking=["hm"], finish="length"), Say("ok")]) as r:
        message = await thought(r)
        await r.events(request(user("go"), message, message), CHAIN)
        assert [block["type"] for block in r.sent["messages"][1]["content"]] == ["thinking", "text"] * 2


async def test_thinking_without_its_signature_is_not_kept() -> None:
    body = {"type": "message", "content": [{"type": "thinking", "thinking": "hm"}], "stop_reason": "max_tokens"}
    async with rig([Raw(json.dumps(body).encode(), "application/json")]) as r:
        assert (await thought(r)).extra == {}


# ---- faults


@pytest.mark.parametrize(
    "step",
    [
        Drop(),
        NoHttp(),
        CutAfter(0),
        CutAfter(6),
        CutAfter(5, THINKER),
        Malformed(after=4),
        Malformed(data='["no object"]', after=4),
        ErrorInStream(after=5, type="overloaded_error", message="Overloaded"),
        ErrorInStream(type="api_error"),
        ErrorInStream(type="rate_limit_error"),
        ErrorInStream(type="one_of_tomorrow"),
        Say("no end", wire=Wire(finish=None, done=False)),
        Raw(b""),
        Raw(b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
        Status(429),
        Status(500),
        Status(529),
    ],
    ids=str,
)
async def test_what_may_pass_is_tried_again_and_text_that_was_shown_is_called_void(step: Step) -> None:
    async with rig([step, Say("whole")]) as r:
        events = await r.events(chain=CHAIN)
        assert text_of(events) == "whole"
        voided = any(isinstance(event, Restarted) for event in events)
        assert voided == (sum(isinstance(event, TextDelta) for event in events) > 1)
        assert len(r.naps.seconds) == 1


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Status(401), "ANTHROPIC_API_KEY"),
        (Status(403), "ANTHROPIC_API_KEY"),
        (Status(404), "no such model"),
        (Status(400, message="Your credit balance is too low to access the API."), "credit balance"),
        (ErrorInStream(type="authentication_error"), "ANTHROPIC_API_KEY"),
        (ErrorInStream(type="billing_error", message="no money"), "no money"),
        (Raw(b"<html>", "text/html"), "ANTHROPIC_BASE_URL"),
    ],
    ids=str,
)
async def test_what_this_model_will_not_do_is_not_repeated_and_named(step: Step, words: str) -> None:
    async with rig([step]) as r:
        with pytest.raises(ModelUnavailable, match=words):
            await r.events(chain=CHAIN)
        assert len(r.server.requests) == 1


@pytest.mark.parametrize(
    "step",
    [
        Status(400, message="messages.3: odd"),
        Status(413),
        ErrorInStream(type="invalid_request_error", message="messages.3: odd"),
    ],
    ids=str,
)
async def test_a_request_that_is_wrong_is_not_made_again(step: Step) -> None:
    async with rig([step]) as r:
        with pytest.raises(InvalidRequest):
            await r.events(chain=[CLAUDE, "anthropic:b"])
        assert len(r.server.requests) == 1


async def test_the_message_is_whole_with_its_stop_reason_although_nothing_came_behind_it() -> None:
    async with rig([Hang(after=99)], timeouts=Timeouts(idle=0.2), retry=ONCE) as r:
        assert text_of(await r.events(chain=CHAIN)).startswith("Some words before it happens")


async def test_turns_share_one_kept_alive_connection_and_leaving_one_closes_it() -> None:
    async with rig([Say("ok"), Say("ok"), Hang(after=6)]) as r:
        await r.events(chain=CHAIN)
        await r.events(chain=CHAIN)
        assert r.server.connections_seen == 1
        task = asyncio.create_task(r.events(chain=CHAIN))
        await r.server.wait(lambda: len(r.server.requests) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await r.server.wait(lambda: r.server.disconnects == 1 and r.server.open_connections == 0)


async def test_a_body_that_never_ends_behind_its_answer_holds_nobody_up() -> None:
    async with rig([Say("ok", wire=Wire(linger=60))], retry=ONCE) as r:
        async with asyncio.timeout(30):
            assert text_of(await r.events(chain=CHAIN)) == "ok"
