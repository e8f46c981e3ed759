"""A cheap estimate of tokens, for fitting history into a window and for servers that do not count.

The rule: a token for every 4 ASCII characters, and one for every 2 bytes of UTF-8 of the others
(one for a Cyrillic letter, one and a half for a Chinese character, two for an emoji); 4 tokens
a message, 8 a tool call or tool definition, 1,000 for an image of any size. It means to be
rather too high than too low.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from corral.models.api import AssistantMessage, Message, ModelRequest, Text, ToolDefinition, UserMessage

MESSAGE_TOKENS = 4
TOOL_TOKENS = 8
IMAGE_TOKENS = 1000

_ASCII = bytes(range(128))


def text_tokens(text: str) -> int:
    """The estimate for a text; 0 for the empty one."""
    if text.isascii():
        return (len(text) + 3) // 4
    raw = text.encode("utf-8", "surrogatepass")
    others = len(raw.translate(None, _ASCII))
    return (len(raw) - others + 3) // 4 + (others + 1) // 2


def first_of(text: str, tokens: int) -> str:
    """A beginning of the text of at most so many tokens, but at least one character of it."""
    part = text[: max(1, tokens * 4)]
    while (size := text_tokens(part)) > tokens and len(part) > 1:
        part = part[: max(1, len(part) * tokens // size)]
    return part


def message_tokens(message: Message) -> int:
    """The estimate for one message with everything in it."""
    if isinstance(message, UserMessage):
        parts = (text_tokens(part.text) if isinstance(part, Text) else IMAGE_TOKENS for part in message.content)
        return MESSAGE_TOKENS + sum(parts)
    if isinstance(message, AssistantMessage):
        calls = (
            TOOL_TOKENS + text_tokens(call.name) + text_tokens(msgspec.json.encode(call.args).decode())
            for call in message.tool_calls
        )
        # What a provider wants back (its thinking) takes room as well.
        extra = text_tokens(msgspec.json.encode(message.extra).decode()) if message.extra else 0
        return MESSAGE_TOKENS + text_tokens(message.text) + extra + sum(calls)
    return MESSAGE_TOKENS + TOOL_TOKENS + text_tokens(message.output)


def tools_tokens(tools: Iterable[ToolDefinition]) -> int:
    """The estimate for the tool definitions of a request."""
    return sum(
        TOOL_TOKENS
        + text_tokens(tool.name)
        + text_tokens(tool.description)
        + text_tokens(msgspec.json.encode(tool.parameters).decode())
        for tool in tools
    )


def request_tokens(request: ModelRequest) -> int:
    """The estimate for everything that a request sends."""
    system = MESSAGE_TOKENS + text_tokens(request.system) if request.system else 0
    return system + tools_tokens(request.tools) + sum(message_tokens(message) for message in request.messages)
