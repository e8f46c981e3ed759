"""What goes over the wire, and what is made of what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from corral.models.api import (
    AssistantMessage,
    Image,
    Message,
    Restarted,
    Text,
    TextDelta,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from corral.models.tokens import request_tokens
from corral.models.transcript import MISSING_RESULT
from corral.protocol.errors import ModelUnavailable
from tests.models.helpers import KEY, TOOLS, request, rig, text_of, user
from tests.support.model_server import (
    CallTools,
    LengthInToolCall,
    NoUsage,
    Raw,
    Say,
    Wire,
    content_filter,
)

# ---- the request


async def test_the_request_asks_for_a_stream_with_usage_and_carries_the_key() -> None:
    async with rig([Say("ok")]) as r:
        await r.events()
        assert r.sent["model"] == "m"
        assert r.sent["stream"] is True
        assert r.sent["stream_options"] == {"include_usage": True}
        assert r.server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
        assert r.server.requests[0].path == "/v1/chat/completions"


async def test_system_text_and_tools_are_sent_with_names_that_the_wire_allows() -> None:
    async with rig([Say("ok")]) as r:
        await r.events()
        assert r.sent["messages"] == [
            {"role": "system", "content": "You are a test."},
            {"role": "user", "content": "hello"},
        ]
        assert [tool["function"]["name"] for tool in r.sent["tools"]][:2] == ["bash_exec", "file_read"]


async def test_without_tools_and_limit_neither_field_is_sent() -> None:
    async with rig([Say("ok")]) as r:
        await r.events(request(tools=[]))
        assert not {"tools", "max_tokens", "max_completion_tokens"} & set(r.sent)
        await r.events(request(max_output_tokens=77))
        assert r.sent["max_tokens"] == 77


async def test_an_image_is_sent_as_a_data_uri_beside_its_text() -> None:
    message = UserMessage(content=[Text(text="what is it?"), Image(mime_type="image/png", data="QUJD")])
    async with rig([Say("ok")]) as r:
        await r.events(request(message))
        assert r.sent["messages"][1]["content"] == [
            {"type": "text", "text": "what is it?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
        ]


async def test_calls_and_results_go_back_under_the_same_ids() -> None:
    call = ToolCall(id="tc_1", name="bash.exec", args={"command": "ls"})
    history: list[Message] = [
        user("go"),
        AssistantMessage(text="", tool_calls=[call]),
        ToolMessage(tool_call_id="tc_1", name="bash.exec", output="a\n"),
    ]
    async with rig([Say("ok")]) as r:
        await r.events(request(*history))
        _, _, assistant, tool = r.sent["messages"]
        assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"] == "tc_1"
        assert assistant["tool_calls"][0]["function"] == {"name": "bash_exec", "arguments": '{"command":"ls"}'}
        assert assistant["content"] is None
        assert tool == {"role": "tool", "tool_call_id": "tc_1", "content": "a\n"}


async def test_a_call_without_a_result_gets_one_so_that_the_transcript_stays_valid() -> None:
    calls = [ToolCall(id="tc_1", name="bash.exec", args={}), ToolCall(id="tc_2", name="bash.exec", args={})]
    history: list[Message] = [
        user("go"),
        AssistantMessage(text="", tool_calls=calls),
        ToolMessage(tool_call_id="tc_2", name="bash.exec", output="two"),
        user("and now?"),
    ]
    async with rig([Say("ok")]) as r:
        await r.events(request(*history))
        assert [(m["role"], m.get("content")) for m in r.sent["messages"][3:]] == [
            ("tool", MISSING_RESULT),
            ("tool", "two"),
            ("user", "and now?"),
        ]


async def test_a_result_whose_call_was_cut_from_the_history_is_told_as_text() -> None:
    async with rig([Say("ok")]) as r:
        await r.events(request(ToolMessage(tool_call_id="gone", name="file.read", output="old"), user("go")))
        assert [m["role"] for m in r.sent["messages"]] == ["system", "user", "user"]
        assert "file.read" in r.sent["messages"][1]["content"]
        assert "old" in r.sent["messages"][1]["content"]


async def test_an_empty_assistant_message_in_the_history_is_not_sent_empty() -> None:
    async with rig([Say("ok")]) as r:
        await r.events(request(user("go"), AssistantMessage(text=""), user("hm?")))
        assert r.sent["messages"][2]["content"]


async def test_a_lone_surrogate_in_the_history_is_replaced_and_the_call_is_made() -> None:
    async with rig([Say("ok")]) as r:
        await r.events(request(user("a\ud800b")))
        assert r.sent["messages"][1]["content"] == "a\ufffdb"


async def test_two_tools_with_one_wire_name_are_told_apart_both_ways() -> None:
    twins = [TOOLS[0], type(TOOLS[0])(name="bash_exec", description="another", parameters={})]
    async with rig([CallTools([("bash_exec", {}), ("bash_exec_2", {})])]) as r:
        message = await r.message(request(tools=twins))
        assert [tool["function"]["name"] for tool in r.sent["tools"]] == ["bash_exec", "bash_exec_2"]
        assert [call.name for call in message.tool_calls] == ["bash.exec", "bash_exec"]


# ---- text


async def test_text_comes_in_pieces_and_the_last_event_holds_it_whole() -> None:
    text = "Grüße aus dem Pferch 🐎, " * 20
    async with rig([Say(text, chunks=50, delay=0.001)]) as r:
        events = await r.events()
        assert len([event for event in events if isinstance(event, TextDelta)]) > 5
        assert text_of(events) == text
        finished = await r.finished()
        assert finished.message.text == text
        assert (finished.stop, finished.model) == ("end", "openai-chat:m")


@pytest.mark.parametrize(
    "wire",
    [
        Wire(crlf=True),
        Wire(comments=True, event_lines=True),
        Wire(split_bytes=1),
        Wire(split_bytes=7, crlf=True, comments=True),
        Wire(done=False),
        Wire(finish=None),
    ],
    ids=["crlf", "comments", "bytewise", "all at once", "no DONE", "no finish reason"],
)
async def test_every_way_of_writing_the_stream_gives_the_same_text(wire: Wire) -> None:
    text = "Grüße 🐎 — fin"
    async with rig([Say(text, chunks=4, wire=wire)]) as r:
        events = await r.events()
        assert text_of(events) == text
        assert not any(isinstance(event, Restarted) for event in events)


async def test_a_surrogate_pair_cut_between_two_deltas_becomes_one_character() -> None:
    body = b"".join(b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % half for half in (b"a\\ud83d", b"\\udc0eb"))
    async with rig([Raw(body + b"data: [DONE]\n\n")]) as r:
        events = await r.events()
        assert text_of(events) == "a🐎b"


async def test_content_in_parts_is_text_too() -> None:
    parts = [{"type": "thinking", "text": "hm"}, {"type": "text", "text": "yes"}]
    body = f"data: {json.dumps({'choices': [{'delta': {'content': parts}}]})}\n\ndata: [DONE]\n\n"
    async with rig([Raw(body.encode())]) as r:
        assert (await r.message()).text == "yes"


async def test_a_server_that_does_not_stream_is_understood() -> None:
    answer = {"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
    async with rig([Raw(json.dumps(answer).encode(), "application/json")]) as r:
        events = await r.events()
        assert text_of(events) == "whole"
        assert (await r.finished()).usage.input_tokens == 3


async def test_an_empty_message_is_an_answer() -> None:
    async with rig([Say("")]) as r:
        finished = await r.finished()
        assert (finished.message.text, finished.message.tool_calls, finished.stop) == ("", [], "end")
        assert len(r.server.requests) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "bash_exec", "arguments": {"command": "rm -rf /"}}',
        '<tool_call>\n{"name": "bash_exec", "arguments": {"command": "ls"}}\n</tool_call>',
        '```json\n{"tool_calls": [{"function": {"name": "bash_exec", "arguments": "{}"}}]}\n```',
    ],
)
async def test_a_call_written_as_text_is_text(text: str) -> None:
    async with rig([Say(text, chunks=5)]) as r:
        finished = await r.finished()
        assert (finished.message.text, finished.message.tool_calls, finished.stop) == (text, [], "end")


# ---- why it stopped


async def test_stop_reasons_are_told_apart() -> None:
    script = [
        Say("a"),
        Say("a", finish="length"),
        content_filter(),
        Say("", refusal="I will not."),
        CallTools([("x", {})]),
    ]
    async with rig(script) as r:
        stops = [(await r.finished()).stop for _ in script]
        assert stops == ["end", "length", "refused", "refused", "tool_calls"]


async def test_a_refusal_is_shown_as_text() -> None:
    async with rig([Say("", refusal="I will not.")]) as r:
        assert text_of(await r.events()) == "I will not."


async def test_calls_count_although_the_server_says_stop() -> None:
    async with rig([CallTools([("bash_exec", {})], finish="stop")]) as r:
        assert (await r.finished()).stop == "tool_calls"


# ---- usage


async def test_usage_is_what_the_server_counted() -> None:
    async with rig([Say("ok", usage=(123, 45))]) as r:
        usage = (await r.finished()).usage
        assert (usage.input_tokens, usage.output_tokens) == (123, 45)


async def test_usage_is_estimated_where_the_server_counts_none() -> None:
    asked = request(user("x" * 4000))
    async with rig([NoUsage(Say("y" * 400)), Say("ok", usage=(None, None))]) as r:
        usage = (await r.finished(asked)).usage
        assert usage.input_tokens == request_tokens(asked) > 1000
        assert usage.output_tokens > 100
        usage = (await r.finished(asked)).usage
        assert usage.input_tokens == request_tokens(asked)


# ---- tool calls


@pytest.mark.parametrize(
    "wire",
    [
        Wire(),
        Wire(keep_index=False),
        Wire(keep_id=False),
        Wire(keep_index=False, keep_id=False, whole_calls=True),
        Wire(keep_index=False, keep_id=False),
        Wire(repeat_name=True),
        Wire(repeat_name=True, keep_id=False),
        Wire(repeat_name=True, keep_id=False, keep_index=False),
        Wire(whole_calls=True),
        Wire(args_as_object=True),
        Wire(split_bytes=3),
    ],
    ids=str,
)
async def test_parallel_calls_are_put_together_however_the_server_sends_them(wire: Wire) -> None:
    calls = [("bash_exec", {"command": "echo 'ä {'"}), ("file_read", {"path": "a"}), ("bash_exec", {"command": "ls"})]
    async with rig([CallTools(calls, text="Both.", wire=wire)]) as r:
        message = await r.message()
        assert message.text == "Both."
        assert [(call.name, call.args, call.problem) for call in message.tool_calls] == [
            ("bash.exec", {"command": "echo 'ä {'"}, None),
            ("file.read", {"path": "a"}, None),
            ("bash.exec", {"command": "ls"}, None),
        ]


async def test_calls_that_all_have_index_0_are_told_apart_by_their_ids() -> None:
    deltas = [
        {"index": 0, "id": f"c{n}", "function": {"name": "file_read", "arguments": json.dumps({"path": str(n)})}}
        for n in range(3)
    ]
    async with rig([streamed(deltas)]) as r:
        assert [call.args for call in (await r.message()).tool_calls] == [{"path": "0"}, {"path": "1"}, {"path": "2"}]


def streamed(deltas: list[dict[str, Any]]) -> Raw:
    chunks = [{"choices": [{"delta": {"tool_calls": [delta]}}]} for delta in deltas]
    return Raw(("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n").encode())


async def test_fragments_without_index_that_alternate_are_put_together_by_their_ids() -> None:
    pieces = [
        ("a", "file_read", '{"pa'),
        ("b", "file_list", '{"path"'),
        ("a", None, 'th": "1"}'),
        ("b", None, ': "2"}'),
    ]
    deltas = [{"id": call, "function": {"name": name, "arguments": text}} for call, name, text in pieces]
    async with rig([streamed(deltas)]) as r:
        calls = (await r.message()).tool_calls
        assert [(call.name, call.args) for call in calls] == [
            ("file.read", {"path": "1"}),
            ("file.list", {"path": "2"}),
        ]


async def test_another_name_begins_another_call_although_the_first_had_no_arguments() -> None:
    deltas = [{"function": {"name": name, "arguments": ""}} for name in ("file_list", "file_read")]
    async with rig([streamed(deltas)]) as r:
        assert [call.name for call in (await r.message()).tool_calls] == ["file.list", "file.read"]


async def test_the_same_name_begins_another_call_once_the_first_is_whole() -> None:
    pieces = ['{"path":', ' "1"}', '{"path": "2"}']
    async with rig([streamed([{"function": {"name": "file_read", "arguments": piece}} for piece in pieces])]) as r:
        assert [call.args for call in (await r.message()).tool_calls] == [{"path": "1"}, {"path": "2"}]


async def test_call_ids_are_our_own_and_never_repeat_although_the_server_repeats_its() -> None:
    async with rig([CallTools([("bash_exec", {}), ("bash_exec", {})], ids=["call_0", "call_1"])]) as r:
        ids = [call.id for _ in range(3) for call in (await r.message()).tool_calls]
        assert len(set(ids)) == 6
        assert all(call_id.startswith("tc_") for call_id in ids)


async def test_an_invented_name_stays_as_the_model_wrote_it() -> None:
    async with rig([CallTools([("make_coffee", {}), ("file_reed", {})])]) as r:
        assert [call.name for call in (await r.message()).tool_calls] == ["make_coffee", "file_reed"]


async def test_an_invented_name_goes_back_in_a_form_that_the_wire_allows() -> None:
    calls = [ToolCall(id="tc_1", name="my tool/ä", args={}), ToolCall(id="tc_2", name="", args={})]
    async with rig([Say("ok")]) as r:
        await r.events(request(user("go"), AssistantMessage(text="", tool_calls=calls)))
        names = [call["function"]["name"] for call in r.sent["messages"][2]["tool_calls"]]
        assert names == ["my_tool__", "unnamed"]


async def test_no_arguments_are_an_empty_object() -> None:
    async with rig([CallTools([("file_list", ""), ("file_list", "  ")])]) as r:
        assert [call.args for call in (await r.message()).tool_calls] == [{}, {}]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ('{"command": ', "not valid JSON"),
        ("ls -la", "not valid JSON"),
        ('{"a": NaN}', "not valid JSON"),
        ("[1]", "an array"),
        ('"ls"', "a string"),
        ("3", "a number"),
        ("null", "null"),
        ("true", "true or false"),
        ("[" * 5000, "not valid JSON"),
        ('{"a":' * 101 + "1" + "}" * 101, "levels deep"),
        ('{"a":' * 960 + "1" + "}" * 960, "Make the call again"),
    ],
)
async def test_arguments_that_are_no_object_come_with_words_the_model_can_act_on(arguments: str, word: str) -> None:
    async with rig([CallTools([("bash_exec", arguments)])]) as r:
        (call,) = (await r.message()).tool_calls
        assert call.args is None
        assert call.problem is not None
        assert word in call.problem


async def test_a_call_cut_at_the_token_limit_says_so_and_is_never_sent_back_broken() -> None:
    async with rig([LengthInToolCall(partial_args='{"command": "echo hel', text="I begin."), Say("ok")]) as r:
        finished = await r.finished()
        (call,) = finished.message.tool_calls
        assert (finished.stop, call.name, call.args) == ("length", "bash.exec", None)
        assert call.problem is not None
        assert "token limit" in call.problem
        result = ToolMessage(tool_call_id=call.id, name=call.name, output=call.problem, is_error=True)
        await r.events(request(user("go"), finished.message, result))
        sent = r.sent["messages"][2]["tool_calls"][0]
        assert (sent["id"], sent["function"]["arguments"]) == (call.id, "{}")
        assert "echo hel" not in json.dumps(r.sent)


async def test_a_call_cut_before_its_first_argument_is_not_taken_for_one_without_arguments() -> None:
    async with rig([LengthInToolCall(partial_args="")]) as r:
        (call,) = (await r.message()).tool_calls
        assert call.args is None


async def test_the_calls_before_the_one_that_was_cut_are_whole() -> None:
    step = CallTools([("file_read", {"path": "a"}), ("bash_exec", '{"command": "ec')], finish="length")
    async with rig([step]) as r:
        first, second = (await r.message()).tool_calls
        assert (first.args, first.problem) == ({"path": "a"}, None)
        assert second.args is None


async def test_a_call_without_a_name_is_a_problem_and_no_crash() -> None:
    async with rig([CallTools([("", {})])]) as r:
        (call,) = (await r.message()).tool_calls
        assert call.args is None
        assert call.problem is not None


async def test_an_answer_of_endless_calls_is_given_up() -> None:
    async with rig([CallTools([("bash_exec", {})] * 200, fragments=1)]) as r:
        with pytest.raises(ModelUnavailable, match="tool calls in one answer"):
            await r.events()


async def test_tokens_out_of_the_cache_are_part_of_the_input_and_have_their_own_price() -> None:
    async with rig([Say("ok", usage=(1_000, 100), cached=(600, 0))]) as r:
        usage = (await r.finished(chain=["openai-chat:gpt-4o"])).usage
    assert (usage.input_tokens, usage.cache_read_tokens) == (1_000, 600)
    assert usage.cost_usd == pytest.approx((400 * 2.5 + 600 * 1.25 + 100 * 10) / 1e6)
