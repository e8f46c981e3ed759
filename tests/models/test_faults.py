"""What real servers and networks do to a call: each fault over a real socket."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from contextlib import aclosing

import pytest

from corral.models.api import Finished, Restarted, TextDelta
from corral.models.http import Timeouts
from corral.models.router import ModelRouter, RetryPolicy
from corral.protocol.errors import InvalidRequest, ModelUnavailable
from tests.models.helpers import KEY, MODEL, request, rig, text_of, user
from tests.support.model_server import (
    CallTools,
    CloseKeepAlive,
    CutAfter,
    Drop,
    ErrorInStream,
    Hang,
    Malformed,
    Raw,
    Say,
    Slow,
    Status,
    Step,
    Wire,
)

ONCE = RetryPolicy(attempts=1)


# ---- connections


async def test_turns_share_one_kept_alive_connection() -> None:
    async with rig([Say("ok", chunks=3)]) as r:
        for _ in range(5):
            await r.events()
        assert r.server.connections_seen == 1


async def test_a_connection_is_kept_although_its_body_ends_a_little_after_the_answer() -> None:
    async with rig([Say("ok", wire=Wire(linger=0.03))]) as r:
        for _ in range(3):
            await r.events()
        assert r.server.connections_seen == 1


async def test_a_body_that_never_ends_behind_its_answer_holds_nobody_up() -> None:
    async with rig([Say("ok", wire=Wire(linger=60))], retry=ONCE) as r:
        async with asyncio.timeout(30):
            assert text_of(await r.events()) == "ok"


async def test_a_kept_alive_connection_that_was_closed_is_replaced_at_once_and_costs_no_attempt() -> None:
    async with rig([CloseKeepAlive(Say("one")), Say("two")], retry=ONCE) as r:
        assert text_of(await r.events()) == "one"
        events = await r.events()
        assert text_of(events) == "two"
        assert not any(isinstance(event, Restarted) for event in events)
        assert r.naps.seconds == []
        assert r.server.connections_seen == 2


@pytest.mark.parametrize("first", [Say("one"), CloseKeepAlive(Say("one"))], ids=["connection kept", "closed meanwhile"])
async def test_a_request_of_two_mebibytes_arrives_whole_and_nothing_warns_of_it(first: Step) -> None:
    """A warning is an error here. On the new connection the request is sent from its beginning again."""
    text = "0123456789abcdef" * (2 * 2**20 // 16)
    async with rig([first, Say("two")], retry=ONCE) as r:
        await r.events()
        assert text_of(await r.events(request(user(text)))) == "two"
        assert r.sent["messages"][-1]["content"] == text


async def test_a_whole_pool_of_closed_connections_costs_no_attempt_either() -> None:
    async with rig([Slow(0.2, CloseKeepAlive(Say("one")))] * 8 + [Say("two")], retry=ONCE) as r:
        await asyncio.gather(*(r.events() for _ in range(8)))
        assert r.server.connections_seen == 8
        for _ in range(8):
            assert text_of(await r.events()) == "two"


@pytest.mark.parametrize("step", [Drop(), CutAfter(0)], ids=str)
async def test_a_fresh_connection_that_breaks_is_not_tried_again_for_free(step: Step) -> None:
    async with rig([step], retry=ONCE) as r:
        with pytest.raises(ModelUnavailable, match="broke"):
            await r.events()
        assert len(r.server.requests) == 1


async def test_leaving_the_stream_closes_the_connection_at_once() -> None:
    async with rig([Hang(after=3)]) as r:
        async with aclosing(r.router.stream(request(), [MODEL])) as stream:
            async for event in stream:
                assert isinstance(event, TextDelta)
                break
        await r.server.wait(lambda: r.server.disconnects == 1 and r.server.open_connections == 0, 2)


async def test_leaving_the_stream_leaves_nothing_to_the_garbage_collector() -> None:
    # What the collector finds is closed some time later; the connection must be closed by then.
    left: list[str] = []
    before = sys.get_asyncgen_hooks()
    async with rig([Hang(after=3)]) as r:
        sys.set_asyncgen_hooks(finalizer=lambda generator: left.append(repr(generator)))
        try:
            async with aclosing(r.router.stream(request(), [MODEL])) as stream:
                await anext(stream)
        finally:
            sys.set_asyncgen_hooks(*before)
    assert left == []


@pytest.mark.parametrize("step", [Hang(), Slow(30)], ids=str)
async def test_cancelling_a_call_that_waits_closes_the_connection_at_once(step: Step) -> None:
    async with rig([step]) as r:
        task = asyncio.create_task(r.events())
        await r.server.wait(lambda: len(r.server.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await r.server.wait(lambda: r.server.disconnects == 1 and r.server.open_connections == 0, 2)


@pytest.mark.parametrize("step", [Hang(after=3), Say("x" * 500, chunks=500, delay=0.05)], ids=str)
async def test_cancelling_a_call_in_the_middle_of_its_text_closes_the_connection_at_once(step: Step) -> None:
    began = asyncio.Event()

    async with rig([step]) as r:

        async def listen() -> None:
            async for _ in r.router.stream(request(), [MODEL]):
                began.set()

        task = asyncio.create_task(listen())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await r.server.wait(lambda: r.server.disconnects == 1 and r.server.open_connections == 0, 2)


async def test_200_calls_at_once_are_200_connections_and_none_is_left() -> None:
    async with rig([Slow(0.5, Say("ok", chunks=5))]) as r:
        answers = await asyncio.gather(*(r.finished() for _ in range(200)))
        assert {answer.message.text for answer in answers} == {"ok"}
        assert r.server.connections_seen == 200
        await r.router.close()
        await r.server.wait(lambda: r.server.open_connections == 0)


# ---- broken answers


@pytest.mark.parametrize(
    "step",
    [
        Drop(),
        CutAfter(0),
        CutAfter(4),
        CutAfter(3, CallTools([("bash_exec", {"command": "ls"})])),
        Malformed(after=3),
        Malformed(data='["no object"]'),
        ErrorInStream(after=2),
        Raw(b"data: [DONE]\n\n"),
        Raw(b""),
        Raw(b'data: {"choices":[{"delta":{"content":"half"}}]}\n\n'),
        Raw(b"data: " + b"x" * 5_000_000),
        Status(500),
        Status(503),
        Status(408),
        Status(429),
    ],
    ids=str,
)
async def test_what_may_pass_is_tried_again_and_text_that_was_shown_is_called_void(step: Step) -> None:
    async with rig([step, Say("whole")]) as r:
        events = await r.events()
        assert text_of(events) == "whole"
        assert isinstance(events[-1], Finished)
        streamed_before = [event for event in events if isinstance(event, Restarted)]
        texts_before = sum(isinstance(event, TextDelta) for event in events) > 1
        assert bool(streamed_before) == texts_before
        assert len(r.naps.seconds) == 1


async def test_a_message_with_its_finish_reason_counts_although_nothing_came_behind_it() -> None:
    async with rig([Hang(after=99)], timeouts=Timeouts(idle=0.2), retry=ONCE) as r:
        events = await r.events()
        assert text_of(events).startswith("Some words before it happens")
        assert isinstance(events[-1], Finished)


async def test_a_web_page_instead_of_an_answer_names_the_variable_to_check() -> None:
    async with rig([Raw(b"<html>hello</html>", "text/html")]) as r:
        with pytest.raises(ModelUnavailable, match="OPENAI_BASE_URL"):
            await r.events()
        assert len(r.server.requests) == 1


async def test_a_request_error_in_the_stream_is_not_tried_again() -> None:
    step = ErrorInStream(message="too many tokens", code="context_length_exceeded", type="invalid_request_error")
    async with rig([step]) as r:
        with pytest.raises(InvalidRequest, match="too many tokens"):
            await r.events()
        assert len(r.server.requests) == 1


async def test_an_error_in_the_stream_that_carries_a_status_is_sorted_by_it() -> None:
    async with rig([ErrorInStream(code=429, after=1), ErrorInStream(code="401"), Say("no")]) as r:
        with pytest.raises(ModelUnavailable):
            await r.events()
        assert len(r.server.requests) == 2


# ---- time-outs


@pytest.mark.parametrize("step", [Hang(), Hang(after=2), Slow(5)], ids=str)
async def test_silence_is_a_time_out_before_the_first_byte_and_between_chunks(step: Step) -> None:
    async with rig([step], timeouts=Timeouts(idle=0.2), retry=ONCE) as r:
        with pytest.raises(ModelUnavailable, match=r"nothing came from http://127.0.0.1:\d+/v1 for 0.2 s"):
            await r.events()
        await r.server.wait(lambda: r.server.disconnects == 1)


async def test_a_slow_first_byte_within_the_limit_is_waited_for() -> None:
    async with rig([Slow(0.2, Say("ok"))], timeouts=Timeouts(idle=5), retry=ONCE) as r:
        assert text_of(await r.events()) == "ok"


async def test_the_whole_answer_has_a_time_limit_although_it_keeps_coming() -> None:
    step = Say("x" * 500, chunks=500, delay=0.02)
    async with rig([step], timeouts=Timeouts(idle=5, total=0.3), retry=ONCE) as r:
        with pytest.raises(ModelUnavailable, match=r"no whole answer from .* within 0.3 s"):
            await r.events()


async def test_a_server_that_takes_no_connection_is_a_time_out() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        env = {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}
        router = ModelRouter(env, timeouts=Timeouts(connect=0.3, idle=0.6), retry=ONCE)
        with pytest.raises(ModelUnavailable, match=r"no connection to .* within 0.3 s"):
            async for _ in router.stream(request(), [MODEL]):
                pass
        await router.close()
        for filler in fillers:
            filler.close()


async def test_nobody_listening_is_told_in_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        router = ModelRouter({"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}, retry=ONCE)
        with pytest.raises(ModelUnavailable, match=f"cannot connect to http://127.0.0.1:{port}/v1"):
            async for _ in router.stream(request(), [MODEL]):
                pass
        await router.close()


# ---- secrets


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422, 429, 500])
async def test_no_error_log_or_repr_holds_the_key_or_the_credentials_of_the_url(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    message = f"Incorrect API key provided: {KEY} (sk-proj-****************wxyz) for alice:hunter2-canary"
    async with rig([Status(status, message=message)]) as r:
        base = r.server.base_url.replace("http://", "http://alice:hunter2-canary@") + "?api=query-canary"
        router = ModelRouter({"OPENAI_BASE_URL": base, "OPENAI_API_KEY": KEY}, sleep=r.naps)
        with pytest.raises((ModelUnavailable, InvalidRequest)) as caught:
            async for _ in router.stream(request(), [MODEL]):
                pass
        seen = f"{caught.value} {caught.value!r} {caught.value.details} {caught.value.__cause__!r} {router!r}"
        provider = next(iter(router._providers.values()))
        seen += f"{provider!r} {vars(provider)['_endpoint']!r} {caplog.text}"
        await router.close()
        assert "/v1/chat/completions?api=query-canary" in str(r.server.requests[0].url)
        for secret in (KEY, "hunter2-canary", "query-canary", "wxyz", "YWxpY2U6"):
            assert secret not in seen


async def test_a_redirect_is_not_followed_with_the_key() -> None:
    async with rig([Status(307, headers={"Location": "http://127.0.0.1:9/elsewhere"})]) as r:
        with pytest.raises(ModelUnavailable, match="redirects elsewhere; set OPENAI_BASE_URL"):
            await r.events()
        assert len(r.server.requests) == 1
