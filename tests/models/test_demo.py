"""The built-in model, played against results as the core would hand them back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from corral.models.api import AssistantMessage, Finished, Message, TextDelta, ToolCall, ToolMessage
from corral.models.demo import parse
from corral.models.router import ModelRouter
from tests.models.helpers import TOOLS, request, text_of, user


async def say(*messages: Message, tools: list[str] | None = None) -> Finished:
    offered = [tool for tool in TOOLS if tools is None or tool.name in tools]
    router = ModelRouter({})
    events = [event async for event in router.stream(request(*messages, tools=offered), ["demo"])]
    last = events[-1]
    assert isinstance(last, Finished)
    assert text_of(events) == last.message.text
    return last


async def play(text: str, run: Callable[[ToolCall], ToolMessage], tools: list[str] | None = None) -> list[Message]:
    """A whole turn: calls are answered by `run` until the model calls no more."""
    messages: list[Message] = [user(text)]
    for _ in range(20):
        finished = await say(*messages, tools=tools)
        messages.append(finished.message)
        if not finished.message.tool_calls:
            return messages
        messages.extend(run(call) for call in finished.message.tool_calls)
    raise AssertionError("the demo model never ended")


def echo(call: ToolCall) -> ToolMessage:
    return ToolMessage(tool_call_id=call.id, name=call.name, output=f"result of {call.args}")


@pytest.mark.parametrize(
    ("text", "tool", "args"),
    [
        ("run: ls -la | wc", "bash.exec", {"command": "ls -la | wc"}),
        ("RUN:ls", "bash.exec", {"command": "ls"}),
        ("  read: a b.txt  ", "file.read", {"path": "a b.txt"}),
        ("list: src", "file.list", {"path": "src"}),
        ("list", "file.list", {}),
        ("list:", "file.list", {}),
        ("search: a|b: c", "file.search", {"pattern": "a|b: c"}),
        ("get: https://example.com/?a=b:c", "http.request", {"url": "https://example.com/?a=b:c"}),
        ("write: a.txt :: run: x :: y", "file.write", {"path": "a.txt", "content": "run: x :: y"}),
        ("write: a.txt\nline 1\nrun: x\n", "file.write", {"path": "a.txt", "content": "line 1\nrun: x\n"}),
        ("please do this\nrun: ls", "bash.exec", {"command": "ls"}),
    ],
)
async def test_each_request_calls_its_tool(text: str, tool: str, args: dict[str, str]) -> None:
    finished = await say(user(text))
    (call,) = finished.message.tool_calls
    assert (call.name, call.args, finished.stop) == (tool, args, "tool_calls")


async def test_several_lines_are_several_calls_one_after_another_and_then_a_summary() -> None:
    messages = await play("write: a :: hi\nread: a\nlist", echo)
    calls = [call.name for message in messages if isinstance(message, AssistantMessage) for call in message.tool_calls]
    assert calls == ["file.write", "file.read", "file.list"]
    assert isinstance(messages[-1], AssistantMessage)
    for part in ("file.write gave back", "result of {'path': 'a'}", "file.list"):
        assert part in messages[-1].text


async def test_a_denial_is_told_word_for_word() -> None:
    def deny(call: ToolCall) -> ToolMessage:
        return ToolMessage(tool_call_id=call.id, name=call.name, output="denied: ask with --allow", is_error=True)

    last = (await play("run: ls", deny))[-1]
    assert isinstance(last, AssistantMessage)
    assert "did not succeed" in last.text
    assert "denied: ask with --allow" in last.text


async def test_a_long_result_is_shortened() -> None:
    def flood(call: ToolCall) -> ToolMessage:
        return ToolMessage(tool_call_id=call.id, name=call.name, output="x" * 50_000)

    last = (await play("run: yes", flood))[-1]
    assert isinstance(last, AssistantMessage)
    assert len(last.text) < 2000
    assert "48500 characters more" in last.text


@pytest.mark.parametrize("text", ["hello", "Please run the tests", "run:", "", "list the files"])
async def test_anything_else_gets_told_what_it_is_and_how_to_set_a_real_model(text: str) -> None:
    finished = await say(user(text))
    assert finished.message.tool_calls == []
    for part in ("not an LLM", "run: ls -la", "CORRAL_MODEL=openai-chat:NAME", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        assert part in finished.message.text


async def test_a_tool_that_was_not_offered_is_not_called_but_named() -> None:
    messages = await play("run: ls\nread: a", echo, tools=["file.read"])
    calls = [call.name for message in messages if isinstance(message, AssistantMessage) for call in message.tool_calls]
    assert calls == ["file.read"]
    assert isinstance(messages[-1], AssistantMessage)
    assert "not given these tools, so I did not call them: bash.exec" in messages[-1].text


async def test_the_next_step_depends_on_the_messages_alone() -> None:
    history = await play("list\nread: a\nrun: ls", echo)
    for end in (1, 3, 5, 7):
        one, two = await say(*history[:end]), await say(*history[:end])
        assert one.message.text == two.message.text
        assert [(c.name, c.args) for c in one.message.tool_calls] == [(c.name, c.args) for c in two.message.tool_calls]


async def test_results_of_an_earlier_turn_do_not_count() -> None:
    history = await play("list", echo)
    finished = await say(*history, user("list"))
    assert [call.name for call in finished.message.tool_calls] == ["file.list"]


async def test_its_text_comes_in_pieces_and_costs_nothing() -> None:
    router = ModelRouter({})
    events = [event async for event in router.stream(request(user("hi")), ["demo"])]
    assert len([event for event in events if isinstance(event, TextDelta)]) > 5
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.cost_usd == 0.0
    assert events[-1].usage.output_tokens > 50


def test_a_message_of_many_lines_is_taken_apart_in_order() -> None:
    tools = [wanted.tool for wanted in parse("list\r\nrun: a\r\n\r\nnoise\nget: http://x/\nwrite: f\nlist\nlist")]
    assert tools == ["file.list", "bash.exec", "http.request", "file.write"]
