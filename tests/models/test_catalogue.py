"""The table of providers: each with its address, its key and its ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.models import prices
from corral.models.api import AssistantMessage, Finished, ToolCall, ToolMessage
from corral.models.catalogue import PROVIDERS, Kind, _ollama_url
from corral.models.router import ModelRouter, RetryPolicy
from corral.protocol.errors import ModelUnavailable
from tests.models.helpers import KEY, request, user
from tests.support.model_server import ModelServer, Say

VENDORS = [kind for kind in PROVIDERS.values() if kind.dialect == "chat-completions" and kind.key_needed]


@pytest.mark.parametrize("kind", VENDORS, ids=lambda kind: kind.name)
async def test_a_vendor_is_called_at_its_address_with_its_key_and_costs_its_prices(kind: Kind) -> None:
    name, url, key = kind.name, kind.url_variables[0], kind.key_variables[0]
    async with ModelServer([Say("ok")]) as server:
        router = ModelRouter({url: server.base_url, key: KEY})
        events = [event async for event in router.stream(request(), [f"{name}:some/model:free"])]
        await router.close()
        assert isinstance(events[-1], Finished)
        (sent,) = server.requests
    assert (sent.path, sent.headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert sent.json["model"] == "some/model:free"
    router = ModelRouter({})
    with pytest.raises(ModelUnavailable, match=f"set {key}, or {url} for"):
        await anext(router.stream(request(), [f"{name}:x"]))
    await router.close()


@pytest.mark.parametrize("kind", [kind for kind in PROVIDERS.values() if kind.prices], ids=lambda kind: kind.name)
def test_a_vendors_address_and_its_price_list_belong_together(kind: Kind) -> None:
    url, list_id = kind.default_url, kind.prices
    assert prices.provider_of(url) == list_id


@pytest.mark.parametrize(("name", "options"), [("mistral", False), ("cohere", False), ("groq", True)])
async def test_who_refuses_unknown_fields_is_sent_none(name: str, options: bool) -> None:
    async with ModelServer([Say("ok")]) as server:
        router = ModelRouter({f"{name.upper()}_BASE_URL": server.base_url})
        assert [event async for event in router.stream(request(), [f"{name}:x"])]
        await router.close()
        assert ("stream_options" in server.requests[0].json) == options


async def test_ids_of_nine_letters_and_digits_are_sent_where_the_wire_wants_them() -> None:
    calls = [ToolCall(id=f"tc_{number}", name="bash.exec", args={}) for number in range(200)]
    results = [ToolMessage(tool_call_id=call.id, name="bash.exec", output="ok") for call in calls]
    async with ModelServer([Say("ok")]) as server:
        router = ModelRouter({"MISTRAL_BASE_URL": server.base_url})
        asked = request(user("go"), AssistantMessage(text="", tool_calls=calls), *results)
        assert [event async for event in router.stream(asked, ["mistral:x"])]
        await router.close()
        messages = server.requests[0].json["messages"]
    ids = [call["id"] for call in messages[2]["tool_calls"]]
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)
    assert len(set(ids)) == 200
    assert ids == [message["tool_call_id"] for message in messages[3:]]


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("localhost", "http://localhost:11434/v1"),
        ("box:8080", "http://box:8080/v1"),
        (":8080", "http://127.0.0.1:8080/v1"),
        ("0.0.0.0", "http://127.0.0.1:11434/v1"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080/v1"),
        ("[::1]", "http://[::1]:11434/v1"),
        ("[::]:8080", "http://[::1]:8080/v1"),
        ("http://box", "http://box/v1"),
        ("https://box.example/", "https://box.example/v1"),
        ("http://box:11434/v1", "http://box:11434/v1"),
        ("https://box/ollama/v1/", "https://box/ollama/v1"),
        ("box/ollama/v1", "http://box:11434/ollama/v1"),
    ],
)
def test_ollamas_address_is_understood_in_every_form(value: str, url: str) -> None:
    assert _ollama_url(value) == url


async def test_a_key_for_ollama_is_sent_if_there_is_one() -> None:
    async with ModelServer([Say("ok")]) as server:
        router = ModelRouter({"OLLAMA_HOST": server.root_url, "OLLAMA_API_KEY": KEY}, retry=RetryPolicy(attempts=1))
        assert [event async for event in router.stream(request(), ["ollama:x"])]
        await router.close()
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_the_page_on_other_providers_has_the_tables_rows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "other-providers.md").read_text(encoding="utf-8")
    rows = {line for line in page.splitlines() if line.startswith("| `")}
    assert rows == {
        f"| `{kind.name}:NAME` | `{kind.key_variables[0]}` | `{kind.url_variables[0]}` | {kind.default_url} |"
        for kind in VENDORS
        if kind.name != "openai-chat" and kind.name != "anthropic"
    }
