"""What a model's server may send, in both dialects: right streams, changed, cut, and garbage.

What must hold: the call ends in a message or in an error of the contract, whatever came; how the network
cuts the bytes makes no difference; and nothing takes time or memory out of proportion to what came.
"""

from __future__ import annotations

import itertools
import json
import time
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.models import anthropic, chat_completions
from corral.models.api import Finished, Text, ToolDefinition, UserMessage
from corral.models.arguments import decode_json
from corral.models.http import Endpoint
from corral.models.incoming import MAX_ANSWER_BYTES, Incoming
from corral.models.provider import Answer, ProviderError
from corral.models.router import ModelRouter, RetryPolicy
from corral.models.sse import EventTooLong, SseParser
from corral.models.transcript import ToolNames
from corral.protocol.canonical import canonical_json
from corral.protocol.errors import InvalidRequest, ModelUnavailable
from tests.fuzz.support import LETTERS, VALUES, mutated
from tests.models.helpers import CLAUDE, MODEL, environ, request
from tests.support.examples import examples
from tests.support.model_server import CallTools, ModelServer, Raw, Say
from tests.support.model_server.chat import Chat
from tests.support.model_server.messages import Messages

DIALECTS: dict[str, Any] = {MODEL: Chat(), CLAUDE: Messages()}
STEPS = st.sampled_from(
    [
        Say("some words and a € and a 😀", chunks=4, thinking=["a thought", "redacted:x"]),
        CallTools([("bash_exec", {"command": "ls é"}), ("file_list", {})], text="first"),
        Say("", finish="length"),
    ]
)


def incoming(model: str) -> Incoming:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "key-0123456789", url_variable="U", key_variable="K")
    if model == MODEL:
        return chat_completions._ChatAnswer(endpoint)
    return anthropic._MessagesAnswer(endpoint, "m")


def objects(model: str, step: Any) -> list[Any]:
    """The JSON of the events of a right stream."""
    body = {"model": "m", "stream_options": {"include_usage": True}}
    return [json.loads(data) for _, data in DIALECTS[model].frames(step, 1, body)]


def written(model: str, events: list[Any], ending: str = "\n") -> bytes:
    """Events as they stand on the wire. What is no object is written as it is."""
    lines = []
    for event in events:
        text = event if isinstance(event, str) else json.dumps(event)
        lines.append(f"data: {text}{ending}{ending}")
    end = "data: [DONE]" if model == MODEL else 'data: {"type": "message_stop"}'
    return ("".join(lines) + end + ending * 2).encode("utf-8", "surrogatepass")


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def taken(model: str, chunks: list[bytes]) -> Answer | str:
    """What comes of a stream that arrives in these pieces; the reason if that is an error."""
    answer, parser = incoming(model), SseParser()
    tools = [ToolDefinition(name="bash.exec", description="", parameters={})]
    asked = request(UserMessage(content=[Text(text="hi")]), tools=tools)
    numbers = iter(range(10_000))
    try:
        for chunk in chunks:
            answer.take(parser.feed(chunk), len(chunk))
            if answer.done:
                break
        else:
            answer.take(parser.end(), 0)
        return answer.finish(asked, ToolNames(tools), lambda: f"tc_{next(numbers)}")
    except (ProviderError, EventTooLong) as error:
        return str(error)


def check_answer(answer: Answer | str) -> None:
    """An answer is fit for the journal: it can be written as JSON, and counted."""
    if isinstance(answer, str):
        return
    canonical_json(answer.message)
    answer.message.text.encode()
    for count in (answer.input_tokens, answer.output_tokens, answer.cache_read_tokens, answer.cache_write_tokens):
        assert 0 <= count < 2**53
    for call in answer.message.tool_calls:
        call.name.encode()
        assert (call.args is None) == (call.problem is not None)
        # What is decided on, hashed and run is the very same: nothing in it that JSON has no word for.
        assert call.args is None or json.loads(canonical_json(call.args)) == json.loads(
            json.dumps(call.args, allow_nan=False)
        )


RAW = st.one_of(
    LETTERS,
    st.sampled_from(
        [
            *('{"choices":[{"delta":{"content":"\\ud83d"}}]}', '{"usage":{"prompt_tokens":1e999}}', "{", "[]", "null"),
            *('{"usage":{"prompt_tokens":' + "9" * 400 + "}}", '{"error":{"code":' + "9" * 400 + "}}", "[" * 5000),
            '{"error":{"code":"' + "9" * 5000 + '"}}',
            '{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"name":"f","arguments":"{\\"a\\":1e999}"}}]}}]}',
            '{"choices":[{"delta":{"tool_calls":[{"index":[],"id":{},"function":{"name":"f","arguments":{"a":1}}}]}}]}',
            '{"type":"content_block_delta","index":[],"delta":{"type":"text_delta","text":"x"}}',
            '{"type":"content_block_start","index":{},"content_block":{"type":"text","text":"x"}}',
            '{"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens":1e300}}',
            '{"type":"error","error":{"type":[],"message":{}}}',
        ]
    ),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[str, bytes]:
    """A dialect and bytes that are mostly a stream of it."""
    model = draw(st.sampled_from([MODEL, CLAUDE]))
    events = objects(model, draw(STEPS))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(events) - 1)) if events else 0
        how = draw(st.sampled_from(["mutate", "mutate", "mutate", "drop", "twice", "raw", "swap"]))
        if how == "raw" or not events:
            events.insert(place, draw(RAW))
        elif how == "mutate" and not isinstance(events[place], str):
            events[place] = draw(mutated(st.just(events[place])))
        elif how == "drop":
            del events[place]
        elif how == "twice":
            events.insert(place, events[place])
        else:
            events[place], events[0] = events[0], events[place]
    data = written(model, events, draw(st.sampled_from(["\n", "\r\n", "\r"])))
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(data)))
        data = data[:start] + draw(st.binary(max_size=4)) + data[start + draw(st.integers(0, 40)) :]
    return model, data


CALL = '{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"name":"f","arguments":"{\\"a\\":1e999}"}}]}}]}'
COUNTED = b'"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":'
FOUND = {
    "a byte that is no UTF-8, in a text": (MODEL, b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n'),
    "a byte that is no UTF-8, in a name": (MODEL, b'data: {"\x80":1}\n\n'),
    "a byte that is no UTF-8, in Messages": (CLAUDE, b'data: {"type":"\xc3"}\n\n'),
    "a count beyond all numbers": (MODEL, b"data: {%b1e999}}\n\n" % COUNTED),
    "a count of 400 digits": (MODEL, b"data: {%b%b}}\n\n" % (COUNTED, b"9" * 400)),
    "a code of 5000 digits": (MODEL, b'data: {"error":{"code":"%b"}}\n\n' % (b"9" * 5000)),
    "an argument beyond all numbers": (MODEL, f"data: {CALL}\n\n".encode()),
    "an index that is a list": (CLAUDE, b'data: {"type":"content_block_delta","index":[],"delta":{}}\n\n'),
    "an index that is an object": (CLAUDE, b'data: {"type":"content_block_start","index":{},"content_block":{}}\n\n'),
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_the_fuzzer_found_stays_mended(kind: str) -> None:
    model, data = FOUND[kind]
    check_answer(taken(model, [data]))
    # Whatever that gave, with a right answer behind it.
    check_answer(taken(model, [data + written(model, objects(model, Say("words")))]))


@pytest.mark.parametrize("model", [MODEL, CLAUDE])
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_a_body_that_is_no_utf_8_is_asked_for_again_like_any_broken_stream(model: str, kind: str) -> None:
    async with ModelServer([Raw(b'data: {"a":"\xff"}\n\n', kind), Say("whole")]) as server:
        router = ModelRouter(environ(server), retry=RetryPolicy(attempts=2, base=0))
        try:
            async with aclosing(router.stream(request(), [model])) as events:
                last = [event async for event in events][-1]
        finally:
            await router.close()
    assert isinstance(last, Finished)
    assert last.message.text == "whole"


@examples(150)
@given(stream=streams(), places=st.lists(st.integers(0, 5000), max_size=12))
def test_a_stream_ends_in_an_answer_or_in_an_error_and_cuts_make_no_difference(
    stream: tuple[str, bytes], places: list[int]
) -> None:
    model, data = stream
    whole = taken(model, [data])
    check_answer(whole)
    assert taken(model, cut(data, places)) == whole
    middle = places[0] % (len(data) + 1) if places else 0
    singly = [data[place : place + 1] for place in range(middle, min(len(data), middle + 400))]
    assert taken(model, [data[:middle], *singly, data[middle + 400 :]]) == whole


@examples(60)
@given(data=st.binary(max_size=200), lines=st.lists(RAW, max_size=4), places=st.lists(st.integers(0, 300), max_size=8))
def test_the_parser_of_events_gives_the_same_however_the_bytes_are_cut(
    data: bytes, lines: list[str], places: list[int]
) -> None:
    data = b"".join(f"data:{line}\n".encode() for line in lines) + data + b"\n\n"

    def parsed(chunks: list[bytes]) -> list[bytes]:
        parser = SseParser()
        return [event for chunk in chunks for event in parser.feed(chunk)] + parser.end()

    assert parsed(cut(data, places)) == parsed([data])


def repeating_its_name(pieces: list[str]) -> bytes:
    """A stream of a server that numbers no calls and says a call's name in every fragment."""
    functions = [{"name": "bash_exec", "arguments": piece} for piece in pieces]
    return written(
        MODEL, [{"choices": [{"delta": {"tool_calls": [{"function": function}]}}]} for function in functions]
    )


BRACKETS = st.text(st.sampled_from('{}[]"\\ax'), max_size=8)


@examples(150)
@given(
    args=st.dictionaries(BRACKETS, st.one_of(BRACKETS, VALUES), max_size=3),
    places=st.lists(st.integers(0, 80), max_size=4),
)
def test_where_a_call_ends_is_seen_whatever_its_arguments_hold_and_wherever_they_are_cut(
    args: dict[str, Any], places: list[int]
) -> None:
    text = json.dumps(args)
    edges = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    answer = taken(MODEL, [repeating_its_name([*pieces, '{"the": "next"}'])])
    assert isinstance(answer, Answer)
    wanted = [decode_json(text.encode())[0], {"the": "next"}]
    assert [call.args for call in answer.message.tool_calls] == wanted


@examples(25)
@given(stream=streams(), whole=st.booleans())
async def test_over_a_socket_a_call_ends_in_a_message_or_in_an_error_of_the_contract(
    stream: tuple[str, bytes], whole: bool
) -> None:
    model, data = stream
    kind = "application/json" if whole else "text/event-stream"
    async with ModelServer([Raw(data, kind)]) as server:
        router = ModelRouter(environ(server), retry=RetryPolicy(attempts=1))
        try:
            async with aclosing(router.stream(request(), [model])) as events:
                last = [event async for event in events][-1]
            assert isinstance(last, Finished)
            assert last.usage.cost_usd is None or 0 <= last.usage.cost_usd < 1e15
        except (ModelUnavailable, InvalidRequest):
            pass
        finally:
            await router.close()


# ---- size


def flood(model: str, first: str, event: str, size: int) -> tuple[float, Answer | str]:
    """CPU seconds for `first` and then `size` bytes of one event over and over, in reads as a socket gives them."""
    head = "" if model == MODEL else 'data: {"type":"message_start"}\n\n'
    each = f"data: {event}\n\n".encode()
    per_read = max(1, 65536 // len(each))
    reads = [f"{head}data: {first or event}\n\n".encode(), *[each * per_read] * (size // (len(each) * per_read))]
    began = time.process_time()
    result = taken(model, reads)
    return time.process_time() - began, result


FLOODS = {
    "text": (MODEL, "", '{"choices":[{"delta":{"content":"x"}}]}'),
    "a call that is named each time": (
        MODEL,
        "",
        '{"choices":[{"delta":{"tool_calls":[{"function":{"name":"f","arguments":"{\\"a\\":\\"xxx\\","}}]}}]}',
    ),
    "pieces of one call": (
        MODEL,
        "",
        '{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"1"}}]}}]}',
    ),
    "thinking": (
        CLAUDE,
        '{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"' + "x" * 100 + '"}}',
    ),
    "blocks": (CLAUDE, "", '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}'),
    "kinds that there are not": (CLAUDE, "", '{"type":"later"}'),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_four_times_as_much_of_the_same_takes_about_four_times_as_long(kind: str) -> None:
    """Work by the square of the length would be sixteen times as much, in each attempt; small figures do not count."""
    model, first, event = FLOODS[kind]
    took = []
    for _ in range(3):
        small, large = (flood(model, first, event, size)[0] for size in (500_000, 2_000_000))
        took.append((small, large))
        if large < 10 * max(small, 0.05):
            return
    raise AssertionError(took)


def test_an_answer_beyond_its_limit_is_given_up() -> None:
    _, result = flood(
        MODEL, "", '{"choices":[{"delta":{"content":"' + "x" * 60_000 + '"}}]}', MAX_ANSWER_BYTES + 100_000
    )
    assert isinstance(result, str)
    assert "longer than" in result
