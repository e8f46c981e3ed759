"""Frames that are right, wrong, and hostile."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from tests.support.house import TOKEN, House
from tests.support.wire import Wire, new_key, upgrade_request


async def refusal(wire: Wire, text: str, frame_id: str) -> Any:
    await wire.send(text)
    response = await wire.response(frame_id)
    assert response["ok"] is False
    return response["error"]


@pytest.mark.parametrize(
    ("text", "frame_id"),
    [
        ("{", "invalid_req"),
        ("", "invalid_req"),
        ("hello", "invalid_req"),
        ("[1,2]", "invalid_req"),
        ("null", "invalid_req"),
        ('"req"', "invalid_req"),
        ("{}", "invalid_req"),
        ('{"type":"event","id":"e1","method":"sessions.list"}', "e1"),
        ('{"type":5,"id":"e2","method":"sessions.list"}', "e2"),
        ('{"id":"e3","method":"sessions.list"}', "e3"),
        ('{"type":"req","method":"sessions.list"}', "invalid_req"),
        ('{"type":"req","id":"","method":"sessions.list"}', "invalid_req"),
        ('{"type":"req","id":7,"method":"sessions.list"}', "invalid_req"),
        ('{"type":"req","id":"' + "x" * 129 + '","method":"sessions.list"}', "invalid_req"),
        ('{"type":"req","id":"\\ud800","method":"sessions.list"}', "invalid_req"),
        ('{"type":"req","id":"e4"}', "e4"),
        ('{"type":"req","id":"e5","method":5}', "e5"),
        ('{"type":"req","id":"e6","method":"sessions.list","params":null}', "e6"),
        ('{"type":"req","id":"e7","method":"sessions.list","params":[]}', "e7"),
        ('{"type":"req","id":"e8","method":"sessions.list","params":{"limit":"\\udead"}}', "e8"),
        ('{"type":"req","id":"e9","method":"sessions.list","params":{"limit":1e999999}}', "e9"),
        ('{"type":"req","id":"e10","method":"sessions.list","params":{"limit":' + "9" * 5000 + "}}", "e10"),
    ],
)
async def test_what_is_no_request_gets_invalid_request_with_whatever_id_it_has(
    home: House, text: str, frame_id: str
) -> None:
    async with await home.wire() as wire:
        error = await refusal(wire, text, frame_id)
        assert error["code"] == "INVALID_REQUEST"
        assert error["retryable"] is False
        assert error["traceId"]
        assert (await wire.request("sessions.list"))["items"] == []


@pytest.mark.parametrize("shape", ["[", '{"a":', '[{"a":['])
async def test_deep_nesting_is_answered_under_its_own_id_and_harms_nobody(home: House, shape: str) -> None:
    async with await home.wire() as wire:
        deep = '{"type":"req","id":"deep","method":"sessions.list","params":{"x":' + shape * 100_000
        error = await refusal(wire, deep, "deep")
        assert error["code"] == "INVALID_REQUEST"
        for depth in (101, 300, 900, 960, 3000):  # Python's own bound is near 1000, and not the same everywhere
            patch = '{"a":' * depth + "1" + "}" * depth
            frame = (
                f'{{"type":"req","id":"p","method":"policy.update","params":{{"patch":{patch},"idempotencyKey":"k"}}}}'
            )
            error = await refusal(wire, frame, "p")
            assert (error["code"], "nested too deeply" in error["message"]) == ("INVALID_REQUEST", True)
        assert (await wire.request("sessions.list"))["items"] == []


@pytest.mark.parametrize(
    ("method", "params", "says"),
    [
        ("sessions.get", {}, "$.params.sessionId is required"),
        ("sessions.get", {"sessionId": 5}, "$.params.sessionId must be a string, not an integer"),
        ("sessions.get", {"sessionId": "a b"}, "$.params.sessionId must match"),
        ("sessions.get", {"sessionId": "x" * 129}, "$.params.sessionId must match"),
        ("sessions.get", {"sessionId": "s\n"}, "$.params.sessionId must match"),
        ("sessions.list", {"limit": 0}, "$.params.limit must be an integer of at least 1"),
        ("sessions.list", {"limit": 201}, "$.params.limit must be an integer of at most 200"),
        ("sessions.list", {"limit": 1.5}, "$.params.limit must be an integer, not a number"),
        ("sessions.list", {"limit": True}, "$.params.limit must be an integer, not true or false"),
        ("sessions.create", {}, "$.params.idempotencyKey is required"),
        ("sessions.create", {"idempotencyKey": ""}, "$.params.idempotencyKey must be a string of at least 1"),
        ("sessions.create", {"idempotencyKey": "k" * 257}, "$.params.idempotencyKey must be a string of at most 256"),
        ("sessions.create", {"idempotencyKey": "k", "runtimeMode": "moon"}, "$.params.runtimeMode has a value"),
        ("agent.run", {"idempotencyKey": "k"}, "$.params.input is required"),
        ("agent.run", {"idempotencyKey": "k", "input": [{"type": "text"}]}, "$.params.input[0].text is required"),
        ("agent.run", {"idempotencyKey": "k", "input": [{"type": "x"}]}, "$.params.input[0].type has a value"),
        ("agent.run", {"idempotencyKey": "k", "input": "a", "limits": {"maxSteps": 0}}, "$.params.limits.maxSteps"),
        ("agents.upsert", {"idempotencyKey": "k", "agent": {"id": "!"}}, "$.params.agent.id must match"),
        ("events.subscribe", {"sessionId": "s", "after": -1}, "$.params.after must be an integer of at least 0"),
        ("events.subscribe", {"sessionId": "s", "after": "1"}, "$.params.after must be an integer"),
        ("events.subscribe", {"after": 1}, "$.params.after must be a string"),
    ],
)
async def test_the_message_names_the_field_and_what_it_must_be(
    home: House, method: str, params: Any, says: str
) -> None:
    async with await home.wire() as wire:
        response = await wire.call(method, params)
        assert response["error"]["code"] == "INVALID_REQUEST"
        assert says in response["error"]["message"]


async def test_a_refused_value_is_not_repeated_in_the_message(home: House) -> None:
    async with await home.wire() as wire:
        params = {"idempotencyKey": new_key(), "runtimeMode": "sk-secret-value"}
        response = await wire.call("sessions.create", params)
        assert "sk-secret" not in str(response)


async def test_unknown_fields_are_ignored_and_the_last_of_duplicate_keys_counts(home: House) -> None:
    async with await home.wire() as wire:
        assert (await wire.request("sessions.list", {"limit": 5, "colour": {"deep": [1]}}))["items"] == []
        await wire.send('{"type":"req","id":"a","id":"b","method":"nope","method":"sessions.list","extra":1}')
        assert (await wire.response("b"))["ok"] is True


async def test_an_id_comes_back_as_it_was_sent(home: House) -> None:
    async with await home.wire() as wire:
        for frame_id in ("ü€😀", 'q"uo\\te', "\u0000\n", "x" * 128):
            await wire.start("sessions.list", {}, frame_id=frame_id)
            assert (await wire.response(frame_id))["ok"] is True


async def test_params_left_out_count_as_an_empty_object(home: House) -> None:
    async with await home.wire() as wire:
        await wire.send({"type": "req", "id": "x", "method": "sessions.list"})
        assert (await wire.response("x"))["ok"] is True


async def test_unknown_methods_and_those_of_later_issues_are_not_found(home: House) -> None:
    async with await home.wire() as wire:
        for method in ("no.such", "sessions", "Sessions.list", "__init__"):
            assert (await wire.call(method))["error"]["code"] == "METHOD_NOT_FOUND"
        listed = set(wire.hello["features"]["methods"])
        assert {"connect", "agent.run", "sessions.list", "events.subscribe"} <= listed
        for method in ("audit.query", "approval.queue", "metrics.summary"):
            answered = (await wire.call(method)).get("error", {}).get("code")
            assert (answered == "METHOD_NOT_FOUND") == (method not in listed)


async def test_ten_non_frames_in_a_row_close_with_1008_and_a_good_frame_starts_the_count_again(home: House) -> None:
    async with await home.wire() as wire:
        for _ in range(9):
            await wire.send("{")
        await wire.request("sessions.list")
        for _ in range(9):
            await wire.send("[]")
        await wire.request("sessions.list")
        assert wire.close_code is None
        for _ in range(10):
            await wire.send('{"type":"res","id":"x"}')
        assert await wire.closed() == 1008
        assert len([f for f in wire.frames if f["type"] == "res" and f["id"] == "x"]) == 10


async def test_a_binary_frame_closes_with_1003(home: House) -> None:
    async with await home.wire() as wire:
        await wire.send_bytes(b'{"type":"req","id":"x","method":"sessions.list"}')
        assert await wire.closed() == 1003


async def test_a_frame_of_the_limit_passes_and_one_byte_more_closes_with_1009(home: House) -> None:
    async with await home.wire() as wire:
        limit = wire.hello["limits"]["maxFrameBytes"]
        start, end = '{"type":"req","id":"big","method":"sessions.list","params":{"x":"', '"}}'
        await wire.send(start + "x" * (limit - len(start) - len(end)) + end)
        assert (await wire.response("big"))["ok"] is True
        await wire.send(start + "x" * (limit - len(start) - len(end) + 1) + end)
        assert await wire.closed() == 1009


async def test_a_frame_far_over_the_limit_still_lets_the_client_see_1009(home: House) -> None:
    for _ in range(5):
        async with await home.wire() as wire:
            await wire.send("x" * 8_000_000)
            assert await wire.closed() == 1009


async def test_text_that_is_no_utf8_closes_with_1007(home: House) -> None:
    async with await home.wire() as wire:
        await wire._socket._writer.send_frame(b"\xff\xfe", 1)
        assert await wire.closed() == 1007


async def test_requests_are_answered_as_they_finish_and_all_of_them(home: House) -> None:
    async with await home.wire() as wire:
        for number in range(300):
            await wire.start("sessions.list", {}, frame_id=f"p{number}")
        await wire.until(lambda: len(wire.frames) == 301)
        assert {f["id"] for f in wire.frames[1:]} == {f"p{number}" for number in range(300)}


@pytest.mark.parametrize("last", [b"\xf1\x80\0\0\0\0", b"\x89\x80\0\0\0\0", b"\x81\x81\0\0\0\0\xff"])
async def test_a_client_that_is_gone_before_it_can_be_answered_is_no_error_of_ours(
    home: House, last: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A frame that breaks the protocol, or wants a pong, waits behind the handshake when the client hangs up."""
    text = json.dumps({"type": "req", "id": "1", "method": "connect", "params": {"auth": {"token": TOKEN}}}).encode()
    connect = b"\x81\xfe" + len(text).to_bytes(2) + b"\0\0\0\0" + text
    host, _, port = home.url.removeprefix("http://").rpartition(":")
    for _ in range(10):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(upgrade_request("Host: localhost"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        writer.write(connect + last)
        writer.write_eof()
        while await reader.read(65536):
            pass
        writer.close()
    await home.sockets_gone()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
