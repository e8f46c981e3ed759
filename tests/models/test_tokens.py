from __future__ import annotations

from corral.models.api import AssistantMessage, Image, Text, ToolCall, ToolMessage, UserMessage
from corral.models.tokens import IMAGE_TOKENS, message_tokens, request_tokens, text_tokens
from tests.models.helpers import request, user


def test_four_ascii_characters_are_a_token() -> None:
    assert text_tokens("") == 0
    assert text_tokens("abcd" * 100) == 100


def test_other_letters_weigh_more() -> None:
    assert text_tokens("ж" * 100) == 100
    assert text_tokens("漢" * 100) == 150
    assert text_tokens("🐎" * 100) == 200
    assert text_tokens("abcd" * 100 + "ж" * 100) == 200


def test_a_lone_surrogate_is_counted_and_does_not_raise() -> None:
    assert text_tokens("a\ud800") > 0


def test_every_part_of_a_message_counts() -> None:
    picture = Image(mime_type="image/png", data="A" * 10_000)
    assert message_tokens(UserMessage(content=[Text(text="hi"), picture])) == 4 + 1 + IMAGE_TOKENS
    call = ToolCall(id="c", name="bash.exec", args={"command": "x" * 400})
    assert message_tokens(AssistantMessage(text="", tool_calls=[call])) > 100
    assert message_tokens(ToolMessage(tool_call_id="c", name="bash.exec", output="y" * 400)) > 100


def test_system_prompt_and_tools_count() -> None:
    assert request_tokens(request(user("hi"))) > request_tokens(request(user("hi"), tools=[])) + 50


def test_what_a_provider_wants_back_takes_room_as_well() -> None:
    thought = {"anthropic": {"model": "m", "parts": [{"own": {"thinking": "x" * 4_000}}]}}
    more = message_tokens(AssistantMessage(text="a", extra=thought)) - message_tokens(AssistantMessage(text="a"))
    assert 1_000 <= more < 1_100
