"""What holds for every provider, whatever it speaks: one script, one result."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from contextlib import aclosing

import pytest

from corral.models import catalogue
from corral.models.api import Finished, Restarted, TextDelta
from corral.models.http import Endpoint, Timeouts
from corral.models.provider import ProviderError
from corral.models.router import ModelRouter, RetryPolicy
from corral.protocol.errors import InvalidRequest, ModelUnavailable
from tests.models.helpers import CLAUDE, GEMINI, KEY, MODEL, environ, request, rig, text_of, user
from tests.support.model_server import (
    CallTools,
    CutAfter,
    Drop,
    ErrorInStream,
    Hang,
    Malformed,
    ModelServer,
    NoHttp,
    NoUsage,
    Raw,
    Say,
    Slow,
    Status,
    Step,
    Wire,
    content_filter,
)

ONCE = RetryPolicy(attempts=1)
VARIABLE = {MODEL: "OPENAI", CLAUDE: "ANTHROPIC", GEMINI: "GOOGLE"}


@pytest.fixture(params=[MODEL, CLAUDE, GEMINI], ids=lambda model: model.partition(":")[0])
def model(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


async def test_text_comes_as_it_is_written_and_whole_at_the_end(model: str) -> None:
    async with rig([Say("Grüße, 世界! 🎉 " * 4, chunks=8, delay=0.01, wire=Wire(split_bytes=7))]) as r:
        events = await r.events(chain=[model])
    assert sum(isinstance(event, TextDelta) for event in events) > 3
    last = events[-1]
    assert isinstance(last, Finished)
    assert text_of(events) == last.message.text == "Grüße, 世界! 🎉 " * 4
    assert (last.model, last.stop, last.usage.input_tokens, last.usage.output_tokens) == (model, "end", 100, 10)


async def test_calls_come_whole_with_our_names_and_ids(model: str) -> None:
    step = CallTools([("bash_exec", {"command": "ls ü"}), ("file_list", {}), ("file_list", {})], text="So:")
    async with rig([step]) as r:
        finished = await r.finished(chain=[model])
    assert (finished.stop, finished.message.text) == ("tool_calls", "So:")
    assert [(call.name, call.args) for call in finished.message.tool_calls] == [
        ("bash.exec", {"command": "ls ü"}),
        ("file.list", {}),
        ("file.list", {}),
    ]
    assert len({call.id for call in finished.message.tool_calls}) == 3


@pytest.mark.parametrize(("step", "stop"), [(Say("so far", finish="length"), "length"), (content_filter(), "refused")])
async def test_an_answer_that_was_stopped_says_so(model: str, step: Say, stop: str) -> None:
    async with rig([step]) as r:
        assert (await r.finished(chain=[model])).stop == stop


async def test_the_limit_of_output_tokens_is_sent(model: str) -> None:
    async with rig([Say("ok")]) as r:
        await r.events(request(max_output_tokens=77), [model])
        assert 77 in (r.sent.get("max_tokens"), r.sent.get("generationConfig", {}).get("maxOutputTokens"))


async def test_tokens_that_nobody_counted_are_estimated(model: str) -> None:
    async with rig([NoUsage(Say("some words"))]) as r:
        usage = (await r.finished(chain=[model])).usage
    assert usage.input_tokens > 10
    assert usage.output_tokens > 1


# ---- faults


@pytest.mark.parametrize(
    "step",
    [
        Drop(),
        NoHttp(),
        CutAfter(0),
        CutAfter(5),
        Malformed(after=4),
        ErrorInStream(after=4, code=503, type="overloaded_error"),
        Say("no end", chunks=3, wire=Wire(finish=None, done=False)),
        Raw(b""),
        Status(429),
        Status(500),
        Status(503),
    ],
    ids=str,
)
async def test_what_may_pass_is_tried_again_and_text_that_was_shown_is_called_void(model: str, step: Step) -> None:
    async with rig([step, Say("whole")]) as r:
        events = await r.events(chain=[model])
        assert text_of(events) == "whole"
        voided = any(isinstance(event, Restarted) for event in events)
        assert voided == (sum(isinstance(event, TextDelta) for event in events) > 1)
        assert len(r.server.requests) == 2
        assert len(r.naps.seconds) == 1


async def test_retry_after_is_waited_for(model: str) -> None:
    async with rig([Status(429, retry_after=7), Say("ok")]) as r:
        await r.events(chain=[model])
        (nap,) = r.naps.seconds
        assert 7 <= nap < 8


@pytest.mark.parametrize(
    ("step", "words"),
    [(Status(401), "API_KEY"), (Status(403), "API_KEY"), (Status(404), "no such model"), (Status(402), "402")],
    ids=str,
)
async def test_a_refusal_is_not_repeated_and_the_next_model_gets_its_turn(model: str, step: Step, words: str) -> None:
    async with rig([step]) as r:
        with pytest.raises(ModelUnavailable, match=words) as caught:
            await r.events(chain=[model])
        assert len(r.server.requests) == 1
        assert not caught.value.retryable
        assert words != "API_KEY" or f"check {VARIABLE[model]}_API_KEY" in caught.value.message
        assert isinstance((await r.events(chain=[model, "demo"]))[-1], Finished)


async def test_a_wrong_request_is_not_made_again(model: str) -> None:
    async with rig([Status(400, message="messages[3] is odd")]) as r:
        with pytest.raises(InvalidRequest, match=r"messages\[3\] is odd"):
            await r.events(chain=[model, "demo"])
        assert len(r.server.requests) == 1


async def test_silence_is_a_time_out_before_the_first_byte_and_between_chunks(model: str) -> None:
    for step in (Hang(), Hang(after=4), Slow(5)):
        async with rig([step], timeouts=Timeouts(idle=1), retry=ONCE) as r:
            with pytest.raises(ModelUnavailable, match=r"nothing came from http://127.0.0.1:\d+\S* for 1 s"):
                await r.events(chain=[model])
            await r.server.wait(lambda: r.server.disconnects == 1)


async def test_the_whole_answer_has_a_time_limit_although_it_keeps_coming(model: str) -> None:
    step = Say("x" * 500, chunks=500, delay=0.02)
    async with rig([Say("warm"), step], timeouts=Timeouts(idle=5, total=0.5), retry=ONCE) as r:
        await r.events(chain=[model])
        with pytest.raises(ModelUnavailable, match=r"no whole answer from .* within 0.5 s"):
            await r.events(chain=[model])
        await r.server.wait(lambda: r.server.disconnects == 1)


async def test_leaving_the_stream_closes_the_connection_at_once_without_the_garbage_collector(model: str) -> None:
    left: list[str] = []
    before = sys.get_asyncgen_hooks()
    async with rig([Say("warm"), Hang(after=5)]) as r:
        await r.events(chain=[model])
        sys.set_asyncgen_hooks(finalizer=lambda generator: left.append(repr(generator)))
        try:
            async with aclosing(r.router.stream(request(), [model])) as stream:
                await anext(stream)
        finally:
            sys.set_asyncgen_hooks(*before)
        await r.server.wait(lambda: r.server.disconnects == 1 and r.server.open_connections == 0, 2)
    assert left == [] or model == GEMINI  # the library leaves generators, but no connection


@pytest.mark.parametrize("step", [Hang(), Hang(after=5)], ids=str)
async def test_cancelling_a_call_closes_the_connection_at_once(model: str, step: Step) -> None:
    async with rig([Say("warm"), step]) as r:
        await r.events(chain=[model])
        task = asyncio.create_task(r.events(chain=[model]))
        await r.server.wait(lambda: len(r.server.requests) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await r.server.wait(lambda: r.server.disconnects == 1 and r.server.open_connections == 0, 2)


async def test_turns_share_one_kept_alive_connection(model: str) -> None:
    async with rig([Say("ok", chunks=3)]) as r:
        for _ in range(4):
            await r.events(chain=[model])
        assert r.server.connections_seen == 1


async def test_many_calls_at_once_are_answered(model: str) -> None:
    async with rig([Slow(0.2, Say("ok", chunks=5))]) as r:
        answers = await asyncio.gather(*(r.finished(chain=[model]) for _ in range(40)))
        assert {answer.message.text for answer in answers} == {"ok"}
        await r.router.close()
        await r.server.wait(lambda: r.server.open_connections == 0)


async def test_nobody_listening_is_told_in_words(model: str, unused_tcp_port: int) -> None:
    root = f"http://127.0.0.1:{unused_tcp_port}"
    env = dict.fromkeys(("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL"), root)
    router = ModelRouter(env, retry=ONCE)
    with pytest.raises(ModelUnavailable, match=f"cannot connect to {root}"):
        await anext(router.stream(request(), [model]))
    await router.close()


async def test_without_a_key_nothing_is_called_at_the_providers_own_address(model: str) -> None:
    router = ModelRouter({})
    with pytest.raises(ModelUnavailable, match=f"there is no key: set {VARIABLE[model]}_API_KEY"):
        await anext(router.stream(request(), [model]))
    await router.close()


# ---- keys


CANARIES = (KEY, "sk-canary", "hunter2-canary", "0123456789abcdef", "YWxpY2U6", "wxyz")
ECHO = (
    f"Incorrect API key provided: {KEY} (sk-proj-****************wxyz, AIza****************wxyz) "
    f"for alice:hunter2-canary, Authorization: Bearer {KEY}, x-api-key={KEY}"
)
FAILURES: list[Step] = [
    *(Status(status, message=ECHO, phrase=f"No {KEY}") for status in (301, 400, 401, 402, 403, 404, 422, 429, 500)),
    Status(400, message=ECHO, code=KEY),
    ErrorInStream(after=3, message=ECHO, type="authentication_error", code=401),
    ErrorInStream(after=3, message="", type=KEY, code=KEY),
    ErrorInStream(after=3, message=ECHO, type="overloaded_error", code=503),
    ErrorInStream(message=ECHO, type="invalid_request_error", code=400),
    Malformed(data=ECHO, after=3),
    Malformed(data=f'"{ECHO}"', after=3),
    Raw(ECHO.encode(), "text/html"),
    Raw(ECHO.encode(), "application/json"),
    Raw(f'{{"error": "{ECHO}"}}'.encode(), "application/json"),
    NoHttp(f"{ECHO}\r\n".encode()),
    NoHttp(f"HTTP/1.1 {KEY} {KEY}\r\n{KEY}\r\n\r\n".encode()),
    CutAfter(4),
    Drop(),
    Hang(),
]


def chained(error: BaseException | None) -> str:
    """An error with all that led to it, as the most talkative log would write it."""
    text = ""
    while error is not None:
        text += f"{error!s} {error!r} {vars(error)} "
        error = error.__cause__ or error.__context__
    return text


@pytest.mark.parametrize("step", FAILURES, ids=[str(number) for number in range(len(FAILURES))])
async def test_no_key_is_in_any_error_log_or_repr_whatever_the_server_says(
    model: str, step: Step, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with ModelServer([step]) as server:
        env = {
            name: value.replace("http://", "http://alice:hunter2-canary@") for name, value in environ(server).items()
        }
        router = ModelRouter(env, retry=ONCE, timeouts=Timeouts(idle=3))
        with pytest.raises((ModelUnavailable, InvalidRequest)) as caught:
            async for _ in router.stream(request(user("hello")), [model]):
                pass
        seen = f"{chained(caught.value)} {caught.value.details} {router!r} {caplog.text}"
        provider = next(iter(router._providers.values()))
        seen += f"{provider!r} {vars(provider)['_endpoint']!r}"
        headers = server.requests[0].headers
        assert any(KEY in value or value.startswith("Basic ") for value in headers.values())
        await router.close()
    for secret in CANARIES:
        assert secret not in seen


@pytest.mark.parametrize(
    "step", [NoHttp(), NoHttp(f"HTTP/1.1 {KEY}\r\n\r\n".encode()), Status(500, message=ECHO)], ids=range(3)
)
async def test_what_led_to_a_providers_error_holds_no_key_either(model: str, step: Step) -> None:
    async with rig([step]) as r:
        provider = r.router._provider(catalogue.parse(model))
        with pytest.raises(ProviderError) as caught:
            async for _ in provider.stream("m", request()):
                pass
    assert KEY not in chained(caught.value)


@pytest.mark.parametrize("form", ["{key}", "{quoted}", "{escaped}", "x {key}\n y", "{basic}"])
def test_a_secret_is_hidden_in_every_form_that_a_server_may_write_it_in(form: str) -> None:
    key = "Zq/7+kF=canary9/xx"
    endpoint = Endpoint("http://u:p%2Fw-secret@h/", key, url_variable="U", key_variable="K", key_header="x-api-key")
    told = form.format(
        key=key,
        quoted="Zq%2F7%2BkF%3Dcanary9%2Fxx",
        escaped="Zq\\/7+kF=canary9\\/xx p/w-secret p%2Fw-secret",
        basic=endpoint.headers["Authorization"].partition(" ")[2],
    )
    cleaned = endpoint.clean(told)
    assert "[hidden]" in cleaned
    assert not any(part in cleaned for part in ("canary9", "w-secret", told.strip()))


async def test_a_redirect_is_not_followed_with_the_key(model: str) -> None:
    async with ModelServer([Say("stolen")]) as thief:
        path = {MODEL: "/v1/chat/completions", CLAUDE: "/v1/messages"}.get(
            model, "/v1beta/models/x:streamGenerateContent"
        )
        async with rig([Status(307, headers={"Location": thief.root_url + path})], retry=ONCE) as r:
            with pytest.raises(ModelUnavailable):
                await r.events(chain=[model])
        assert thief.requests == []


# ---- the optional library


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_without_the_extra_there_is_one_clear_error_with_the_remedy() -> None:
    said = _python(
        "import sys; sys.modules['pydantic_ai'] = None\n"
        "import asyncio; from corral.models.router import ModelRouter; from corral.models.api import *\n"
        "async def main():\n"
        "    asked = ModelRequest(system='', messages=[UserMessage(content=[Text(text='x')])], tools=[])\n"
        "    try: await anext(ModelRouter({'GOOGLE_API_KEY': 'k'}).stream(asked, ['google:gemini-2.5-pro']))\n"
        "    except Exception as error: print(error.message, error.retryable)\n"
        "asyncio.run(main())"
    )
    assert "google:NAME needs a library that is not installed: pip install 'corral[providers]'" in said
    assert "make providers" in said
    assert said.endswith("False")


def test_the_library_is_not_imported_for_the_others() -> None:
    said = _python(
        "import sys, asyncio; from corral.models.router import ModelRouter; from corral.models.api import *\n"
        "async def main():\n"
        "    router = ModelRouter({'ANTHROPIC_BASE_URL': 'http://127.0.0.1:1', 'GOOGLE_API_KEY': 'k'})\n"
        "    router.info('google:gemini-2.5-pro')\n"
        "    asked = ModelRequest(system='', messages=[], tools=[])\n"
        "    try: await anext(router.stream(asked, ['anthropic:x']))\n"
        "    except Exception: print(sorted({'pydantic', 'pydantic_ai', 'google.genai', 'httpx'} & set(sys.modules)))\n"
        "    await router.close()\n"
        "asyncio.run(main())"
    )
    assert said.endswith("[]")
