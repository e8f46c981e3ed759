"""Retries, the chain of fallbacks, and what is said when nobody answers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from email.utils import formatdate

import pytest

from corral.clock import SystemClock
from corral.models.api import Finished, ModelInfo, Restarted, TextDelta
from corral.models.router import ModelRouter, RetryPolicy
from corral.protocol.errors import InvalidRequest, ModelUnavailable
from tests.models.helpers import request, rig, text_of, user
from tests.support.model_server import CutAfter, ModelServer, Say, Status

A, B, C = "openai-chat:a", "openai-chat:b", "openai-chat:c"


def by_model(**steps: object) -> object:
    """A script whose step is chosen by the model's name."""
    return lambda asked: steps[asked["model"]]


class FixedClock(SystemClock):
    def now_ms(self) -> int:
        return 1_800_000_000_000


async def test_each_model_of_the_chain_is_tried_three_times_and_the_first_that_answers_is_named() -> None:
    async with rig(by_model(a=Status(500), b=Status(503), c=Say("ok"))) as r:  # type: ignore[arg-type]
        finished = await r.finished(chain=[A, B, C])
        assert finished.model == C
        assert [sent.json["model"] for sent in r.server.requests] == ["a"] * 3 + ["b"] * 3 + ["c"]


async def test_pauses_grow_and_vary_by_chance() -> None:
    async with rig([Status(500)], retry=RetryPolicy(attempts=7, base=1, cap=10)) as r:
        with pytest.raises(ModelUnavailable):
            await r.events()
        assert r.naps.seconds == [1, 2, 4, 8, 10, 10]
        lots = iter([0.0, 0.0, 1.0, 1.0] * 10)
        r.router._chance = lambda: next(lots)
        r.naps.seconds.clear()
        with pytest.raises(ModelUnavailable):
            await r.events()
        assert r.naps.seconds[:2] == [0.5, 3]


async def test_retry_after_in_seconds_is_waited_for() -> None:
    async with rig([Status(429, retry_after=7), Say("ok")]) as r:
        await r.events()
        (nap,) = r.naps.seconds
        assert 7 <= nap < 8


async def test_retry_after_as_a_date_is_waited_for() -> None:
    when = formatdate(1_800_000_000 + 30, usegmt=True)
    async with rig([Status(503, retry_after=when), Say("ok")], clock=FixedClock()) as r:
        await r.events()
        (nap,) = r.naps.seconds
        assert 30 <= nap < 34


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "-5", "1e999", "Mon, 99 Foo 2026"])
async def test_a_retry_after_that_makes_no_sense_is_as_good_as_none(value: str) -> None:
    async with rig([Status(429, retry_after=value), Say("ok")]) as r:
        assert text_of(await r.events()) == "ok"
        assert r.naps.seconds == [0.5]


async def test_who_asks_for_a_longer_pause_than_the_cap_is_left_for_the_next_model() -> None:
    async with rig(by_model(a=Status(429, retry_after=3600), b=Say("ok"))) as r:  # type: ignore[arg-type]
        finished = await r.finished(chain=[A, B])
        assert finished.model == B
        assert r.naps.seconds == []
        assert len(r.server.requests) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_bad_request_is_not_made_again_by_anybody(status: int) -> None:
    async with rig([Status(status, message="messages[3] is odd")]) as r:
        with pytest.raises(InvalidRequest, match=r"messages\[3\] is odd") as caught:
            await r.events(chain=[A, B])
        assert len(r.server.requests) == 1
        assert not caught.value.retryable


@pytest.mark.parametrize(
    ("status", "words"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "no such model"), (402, "402")]
)
async def test_a_refusal_is_not_repeated_and_the_next_model_gets_its_turn(status: int, words: str) -> None:
    async with rig(by_model(a=Status(status), b=Say("ok"))) as r:  # type: ignore[arg-type]
        assert (await r.finished(chain=[A, B])).model == B
        assert len(r.server.requests) == 2
        with pytest.raises(ModelUnavailable, match=words) as caught:
            await r.events(chain=[A])
        assert not caught.value.retryable


async def test_a_spent_quota_is_not_asked_again() -> None:
    async with rig([Status(429, code="insufficient_quota")]) as r:
        with pytest.raises(ModelUnavailable):
            await r.events()
        assert len(r.server.requests) == 1


async def test_the_error_says_what_was_tried_and_why_it_failed() -> None:
    async with rig(by_model(a=Status(500, message="on fire"), b=Status(404))) as r:  # type: ignore[arg-type]
        with pytest.raises(ModelUnavailable) as caught:
            await r.events(chain=[A, B])
        text = caught.value.message
        assert "openai-chat:a: 500 Internal Server Error: on fire (3 attempts)" in text
        assert "openai-chat:b: 404" in text
        assert caught.value.retryable
        assert caught.value.details is not None
        assert [one["attempts"] for one in caught.value.details["tried"]] == [3, 1]


async def test_text_of_a_broken_attempt_is_called_void_before_the_next_begins() -> None:
    script = by_model(a=CutAfter(5), b=Say("whole", chunks=2))
    async with rig(script) as r:  # type: ignore[arg-type]
        events = await r.events(chain=[A, B])
        kinds = [type(event) for event in events if not isinstance(event, TextDelta)]
        assert kinds == [Restarted, Restarted, Restarted, Finished]
        assert [event.model for event in events if isinstance(event, Restarted)] == [A, A, B]
        assert text_of(events) == "whole"


async def test_text_is_called_void_once_however_many_attempts_follow_without_text() -> None:
    async with rig([CutAfter(5), Status(500), Say("whole")]) as r:
        events = await r.events()
        assert sum(isinstance(event, Restarted) for event in events) == 1
        assert text_of(events) == "whole"


async def test_nothing_is_void_where_nothing_was_shown() -> None:
    async with rig([Status(500), Say("ok")]) as r:
        assert not any(isinstance(event, Restarted) for event in await r.events())


async def test_a_model_named_twice_is_tried_once() -> None:
    async with rig([Status(404)]) as r:
        with pytest.raises(ModelUnavailable):
            await r.events(chain=[A, A])
        assert len(r.server.requests) == 1


async def test_a_chain_without_models_and_one_with_an_unknown_provider_are_refused_before_any_call() -> None:
    async with rig([Say("ok")]) as r:
        with pytest.raises(InvalidRequest, match="CORRAL_MODEL"):
            await r.events(chain=[])
        with pytest.raises(InvalidRequest, match="with one of openai-chat"):
            await r.events(chain=[A, "nonesuch:x"])
        assert r.server.requests == []


async def test_cancelling_in_a_pause_ends_the_call() -> None:
    async with ModelServer([Status(500)]) as server:
        napping = asyncio.Event()

        async def sleep(_seconds: float) -> None:
            napping.set()
            await asyncio.Event().wait()

        router = ModelRouter({"OPENAI_BASE_URL": server.base_url}, sleep=sleep)
        task = asyncio.create_task(anext(router.stream(request(), [A])))
        await napping.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await router.close()


# ---- names and settings


async def test_a_model_name_may_hold_colons() -> None:
    async with ModelServer([Say("ok")]) as server:
        router = ModelRouter({"OLLAMA_BASE_URL": server.base_url})
        events = [event async for event in router.stream(request(), ["ollama:llama3:8b"])]
        await router.close()
        assert server.requests[0].json["model"] == "llama3:8b"
        assert "Authorization" not in server.requests[0].headers
        assert isinstance(events[-1], Finished)
        assert (events[-1].model, events[-1].usage.cost_usd) == ("ollama:llama3:8b", 0.0)


@pytest.mark.parametrize(
    "form", ["http://127.0.0.1:{p}/v1", "http://127.0.0.1:{p}/", "127.0.0.1:{p}", "0.0.0.0:{p}", ":{p}"]
)
async def test_ollamas_host_variable_is_understood_in_all_its_forms(form: str) -> None:
    async with ModelServer([Say("ok")]) as server:
        router = ModelRouter({"OLLAMA_HOST": form.format(p=server.port)})
        events = [event async for event in router.stream(request(), ["ollama:x"])]
        await router.close()
        assert isinstance(events[-1], Finished)


async def test_ollamas_address_to_listen_on_is_not_the_one_to_connect_to() -> None:
    router = ModelRouter({"OLLAMA_HOST": "0.0.0.0:1"}, retry=RetryPolicy(attempts=1))
    with pytest.raises(ModelUnavailable, match=r"http://127\.0\.0\.1:1/v1"):
        await anext(router.stream(request(), ["ollama:x"]))
    await router.close()


@pytest.mark.parametrize("end", ["", "/", "?api-version=7"])
async def test_the_path_is_joined_to_the_base_url_as_usual_clients_do(end: str) -> None:
    async with ModelServer([Say("ok")]) as server:
        router = ModelRouter({"OPENAI_BASE_URL": server.base_url + end})
        assert [event async for event in router.stream(request(), [A])]
        await router.close()
        assert server.requests[0].path == "/v1/chat/completions"
        assert ("api-version=7" in server.requests[0].url) == ("?" in end)


async def test_credentials_in_the_url_become_basic_authentication() -> None:
    async with ModelServer([Say("ok")]) as server:
        base = server.base_url.replace("http://", "http://user:pa%20ss@")
        router = ModelRouter({"OPENAI_BASE_URL": base, "OPENAI_API_KEY": "k"})
        assert [event async for event in router.stream(request(), [A])]
        await router.close()
        assert server.requests[0].headers["Authorization"] == "Basic dXNlcjpwYSBzcw=="


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "set OPENAI_API_KEY, or OPENAI_BASE_URL"),
        ({"OPENAI_BASE_URL": "https://api.openai.com/v1/"}, "set OPENAI_API_KEY"),
        ({"OPENAI_BASE_URL": "localhost:8000/v1"}, "OPENAI_BASE_URL is not an http"),
        ({"OPENAI_BASE_URL": "ftp://secret:secret@host/"}, "OPENAI_BASE_URL is not an http"),
        ({"OPENAI_BASE_URL": "http://[::1"}, "OPENAI_BASE_URL is not a"),
        (
            {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1", "OPENAI_API_KEY": "a\nb-canary"},
            "OPENAI_API_KEY has characters",
        ),
    ],
)
async def test_a_setting_that_is_missing_or_wrong_is_named_with_its_remedy(env: dict[str, str], words: str) -> None:
    router = ModelRouter(env)
    with pytest.raises(ModelUnavailable) as caught:
        await anext(router.stream(request(), [A]))
    assert words in caught.value.message
    assert not caught.value.retryable
    assert "secret" not in caught.value.message
    assert "canary" not in caught.value.message
    await router.close()


async def test_a_missing_key_leaves_the_rest_of_the_chain() -> None:
    router = ModelRouter({})
    events = [event async for event in router.stream(request(user("hello")), [A, "demo"])]
    assert isinstance(events[-1], Finished)
    assert events[-1].model == "demo"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nonesuch:x", r"PROVIDER:NAME with one of openai-chat, .*ollama, .*demo"),
        ("openai-chat", "NAME"),
        ("ollama:", "NAME"),
        ("demo:x", "demo"),
        ("", "there is no model provider"),
    ],
)
def test_a_model_string_that_names_no_model_is_refused_with_the_known_ones(model: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        ModelRouter({}).info(model)


# ---- windows and prices


def test_what_settings_say_of_a_model_comes_before_the_price_list() -> None:
    mine = ModelInfo(
        model="openai-chat:gpt-4o", context_window=7, input_usd_per_million=1.0, output_usd_per_million=2.0
    )
    assert ModelRouter({}, known={mine.model: mine}).info(mine.model) == mine


async def test_the_cost_of_a_call_is_computed_from_its_prices() -> None:
    mine = ModelInfo(model=A, context_window=7, input_usd_per_million=2.0, output_usd_per_million=10.0)
    async with rig([Say("ok", usage=(1_000_000, 100_000))], known={A: mine}) as r:
        assert (await r.finished()).usage.cost_usd is None
        assert (await r.finished(chain=[A])).usage.cost_usd == pytest.approx(3.0)
        assert (await r.finished(chain=["openai-chat:gpt-4o-mini"])).usage.cost_usd == pytest.approx(0.15 + 0.06)


def test_an_unknown_model_has_the_default_window_and_no_price() -> None:
    info = ModelRouter({}).info("openai-chat:my-own-model")
    assert (info.context_window, info.input_usd_per_million, info.output_usd_per_million) == (128_000, None, None)


def test_demo_and_ollama_cost_nothing() -> None:
    for model in ("demo", "ollama:x"):
        info = ModelRouter({}).info(model)
        assert (info.context_window, info.input_usd_per_million, info.output_usd_per_million) == (128_000, 0.0, 0.0)


def test_importing_the_router_brings_in_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, corral.models.router as r; r.ModelRouter({}).info('openai-chat:gpt-4o');"
        "print([m for m in ('pydantic', 'genai_prices', 'httpx2', 'jsonschema', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# ---- requests that are too long for one model


TOO_LONG = Status(400, message="This model's maximum context length is 8192 tokens.", code="context_length_exceeded")


def windows(**sizes: int) -> dict[str, ModelInfo]:
    return {
        f"openai-chat:{name}": ModelInfo(
            model=f"openai-chat:{name}", context_window=size, input_usd_per_million=0.0, output_usd_per_million=0.0
        )
        for name, size in sizes.items()
    }


async def test_a_request_too_long_for_a_model_goes_to_the_next_with_a_larger_window() -> None:
    script = by_model(a=TOO_LONG, b=Say("never"), c=Say("ok"))
    async with rig(script, known=windows(a=8_000, b=8_000, c=16_000)) as r:  # type: ignore[arg-type]
        assert (await r.finished(chain=[A, B, C])).model == C
        assert [sent.json["model"] for sent in r.server.requests] == ["a", "c"]


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
    ],
)
async def test_a_request_too_long_for_all_is_a_wrong_request(words: str) -> None:
    async with rig([Status(400, message=words)], known=windows(a=8_000, b=9_000)) as r:
        with pytest.raises(InvalidRequest, match="openai-chat:b does not take this request"):
            await r.events(chain=[A, B])
        assert len(r.server.requests) == 2
