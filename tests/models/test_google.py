"""generateContent through the library: what goes over the wire, and what is made of what comes back."""

from __future__ import annotations

from typing import Any

import pytest

from corral.models.api import AssistantMessage, Image, Message, Text, ToolCall, ToolMessage, UserMessage
from corral.models.transcript import GO_ON, LEFT_OUT
from corral.protocol.errors import ModelUnavailable
from tests.models.helpers import GEMINI, KEY, Rig, request, rig, user
from tests.support.model_server import CallTools, LengthInToolCall, Raw, Say, Status
from tests.support.model_server.generate import signature

CHAIN = (GEMINI,)
THINKER = CallTools([("bash_exec", {"n": 1}), ("file_list", {})], text="I look.", thinking=["Let me see."])


async def contents(r: Rig, *history: Message) -> list[dict[str, Any]]:
    await r.events(request(*history), CHAIN)
    found: list[dict[str, Any]] = r.sent["contents"]
    return found


async def test_the_request_has_its_key_in_a_header_and_the_system_prompt_and_tools_in_their_places() -> None:
    async with rig([Say("ok")]) as r:
        await r.events(chain=CHAIN)
        (sent,) = r.server.requests
    assert sent.path == "/v1beta/models/gemini-2.5-flash:streamGenerateContent"
    assert sent.headers["x-goog-api-key"] == KEY
    assert KEY not in sent.url
    assert sent.json["systemInstruction"]["parts"] == [{"text": "You are a test."}]
    declared = [tool["name"] for tool in sent.json["tools"][0]["functionDeclarations"]]
    assert declared[:2] == ["bash_exec", "file_read"]


async def test_thoughts_are_no_text_and_their_signature_goes_back_where_it_was() -> None:
    async with rig([THINKER, Say("done")]) as r:
        message = await r.message(request(user("go")), CHAIN)
        assert message.text == "I look."
        results = [
            ToolMessage(tool_call_id=call.id, name=call.name, output="out", is_error=call.name == "file.list")
            for call in message.tool_calls
        ]
        asked, called, told = await contents(r, user("go"), message, *results)
    assert (asked["role"], called["role"], told["role"]) == ("user", "model", "user")
    ids = [call.id for call in message.tool_calls]
    assert called["parts"] == [
        {"text": "Let me see.", "thought": True},
        {"text": "I look."},
        {
            "functionCall": {"id": ids[0], "name": "bash_exec", "args": {"n": 1}},
            "thoughtSignature": signature("Let me see."),
        },
        {"functionCall": {"id": ids[1], "name": "file_list", "args": {}}},
    ]
    assert [part["functionResponse"]["id"] for part in told["parts"]] == ids
    first, second = (part["functionResponse"]["response"] for part in told["parts"])
    assert (second, "error" in first) == ({"error": "out"}, False)


async def test_an_image_is_sent_in_base64() -> None:
    message = UserMessage(content=[Text(text="what is it?"), Image(mime_type="image/png", data="QUJD")])
    async with rig([Say("ok")]) as r:
        (asked,) = await contents(r, message)
    assert asked["parts"][0] == {"text": "what is it?"}
    data = asked["parts"][1]["inlineData"]
    assert (data.get("mimeType") or data.get("mime_type"), data["data"]) == ("image/png", "QUJD")


async def test_any_history_begins_and_ends_with_the_user_and_has_a_result_for_each_call() -> None:
    broken = AssistantMessage(text="", tool_calls=[ToolCall(id="tc_1", name="bash.exec", args=None, problem="x")])
    async with rig([Say("ok")]) as r:
        sent = await contents(r, AssistantMessage(text="hm"), broken, AssistantMessage(text="end"))
    assert sent[0]["parts"] == [{"text": LEFT_OUT}]
    assert sent[-1]["parts"] == [{"text": GO_ON}]
    calls = [part for content in sent for part in content["parts"] if "functionCall" in part]
    assert [part["functionCall"]["args"] for part in calls] == [{}]
    results = [part for content in sent for part in content["parts"] if "functionResponse" in part]
    assert "No result of this call" in str(results)


async def test_a_key_that_is_not_valid_is_named_although_the_status_is_400() -> None:
    async with rig([Status(400, message="API key not valid. Please pass a valid API key.")]) as r:
        with pytest.raises(ModelUnavailable, match="refused the key; check GOOGLE_API_KEY"):
            await r.events(chain=CHAIN)
        assert len(r.server.requests) == 1


@pytest.mark.parametrize("reason", ["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL"])
async def test_an_answer_that_the_server_could_not_finish_is_asked_for_again(reason: str) -> None:
    async with rig([Say("half", finish=reason), Say("whole")]) as r:
        assert (await r.message(chain=CHAIN)).text == "whole"


async def test_a_blocked_prompt_is_a_refusal() -> None:
    body = b'data: {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 5}}\n\n'
    async with rig([Raw(body)]) as r:
        assert (await r.finished(chain=CHAIN)).stop == "refused"


async def test_the_token_limit_ends_in_length() -> None:
    async with rig([LengthInToolCall(text="I will")]) as r:
        assert (await r.finished(chain=CHAIN)).stop == "length"


async def test_cached_tokens_have_their_own_price() -> None:
    async with rig([Say("ok", usage=(1000, 100), cached=(600, 0))]) as r:
        usage = (await r.finished(chain=["google:gemini-2.5-flash"])).usage
    assert (usage.input_tokens, usage.cache_read_tokens) == (1000, 600)
    assert usage.cost_usd == pytest.approx((400 * 0.3 + 600 * 0.03 + 100 * 2.5) / 1e6)


async def test_the_older_variable_of_the_key_serves_too() -> None:
    async with rig([Say("ok")], env={"GOOGLE_API_KEY": "", "GEMINI_API_KEY": "older"}) as r:
        await r.events(chain=CHAIN)
        assert r.server.requests[0].headers["x-goog-api-key"] == "older"
