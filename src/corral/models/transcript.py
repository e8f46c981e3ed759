"""What makes a transcript valid for every wire, tools' names there and back, and the form of Chat Completions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from corral.models.api import (
    AssistantMessage,
    Message,
    ModelRequest,
    Text,
    ToolCall,
    ToolDefinition,
    ToolMessage,
    UserMessage,
)

MISSING_RESULT = "No result of this call was recorded: it may or may not have been carried out."
EMPTY_ANSWER = "(empty answer)"
LEFT_OUT = "(The beginning of this conversation was left out.)"
GO_ON = "Go on."

_NAME_LIMIT = 64
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_-]")


def wire_name(name: str) -> str:
    """A tool's name as the wire allows it: `[a-zA-Z0-9_-]{1,64}`, so `.` becomes `_`."""
    return _NOT_IN_NAMES.sub("_", name)[:_NAME_LIMIT] or "unnamed"


class ToolNames:
    """The names of one request's tools, there and back.

    Two tools whose wire names would be the same are told apart by a number. Names that the model
    invented are none of the list's and stay as they are.
    """

    def __init__(self, tools: Iterable[ToolDefinition]) -> None:
        self._to_wire: dict[str, str] = {}
        self._from_wire: dict[str, str] = {}
        for tool in tools:
            wanted = wire = wire_name(tool.name)
            number = 2
            while wire in self._from_wire:
                wire = f"{wanted[: _NAME_LIMIT - 4]}_{number}"
                number += 1
            self._to_wire[tool.name] = wire
            self._from_wire[wire] = tool.name

    def to_wire(self, name: str) -> str:
        return self._to_wire.get(name) or wire_name(name)

    def from_wire(self, name: str) -> str:
        return self._from_wire.get(name, name)


def wire_tools(tools: Sequence[ToolDefinition], names: ToolNames) -> list[dict[str, Any]]:
    """The `tools` field."""
    return [
        {
            "type": "function",
            "function": {
                "name": names.to_wire(tool.name),
                "description": tool.description,
                "parameters": tool.parameters,
            },
        }
        for tool in tools
    ]


def paired(messages: Iterable[Message]) -> Iterator[UserMessage | tuple[AssistantMessage, list[ToolMessage]]]:
    """The transcript as every wire wants it, whatever became of the history.

    Each assistant message comes with exactly one result for each of its calls, in their order,
    made up where none was recorded. A result whose call is not in the history (it was cut away) is
    told as a user message.
    """
    messages = list(messages)
    results = {message.tool_call_id: message for message in messages if isinstance(message, ToolMessage)}
    calls = {call.id for message in messages if isinstance(message, AssistantMessage) for call in message.tool_calls}
    for message in messages:
        if isinstance(message, UserMessage):
            yield message
        elif isinstance(message, AssistantMessage):
            yield message, [results.get(call.id) or _no_result(call) for call in message.tool_calls]
        elif message.tool_call_id not in calls:
            told = f"Result of an earlier call of {message.name}:\n{message.output}"
            yield UserMessage(content=[Text(text=told)])


def _no_result(call: ToolCall) -> ToolMessage:
    return ToolMessage(tool_call_id=call.id, name=call.name, output=MISSING_RESULT, is_error=True)


def wire_messages(request: ModelRequest, names: ToolNames, wire_id: Callable[[str], str] = str) -> list[dict[str, Any]]:
    """The `messages` field of Chat Completions. `wire_id` makes of a call's id what the wire takes."""
    wire: list[dict[str, Any]] = []
    if request.system:
        wire.append({"role": "system", "content": request.system})
    for step in paired(request.messages):
        if isinstance(step, UserMessage):
            wire.append({"role": "user", "content": _user_content(step)})
        else:
            wire.extend(_assistant(*step, names, wire_id))
    return wire


# ---- what one provider alone understands, in its place among text and calls


class Own(Struct, frozen=True):
    """A part that is the provider's own: JSON types, kept and sent back as they are."""

    value: dict[str, Any]


def note_parts(parts: Iterable[str | ToolCall | Own], model: str) -> dict[str, Any]:
    """What goes into `AssistantMessage.extra` under the provider's name; empty if nothing is its own.

    `parts` is the message in its order. Text and calls stand in the message already, so of text only
    the length is noted, and of a call that it is one.
    """
    noted: list[dict[str, Any]] = []
    only_ours = True
    for part in parts:
        if isinstance(part, str):
            noted.append({"text": len(part)})
        elif isinstance(part, ToolCall):
            noted.append({"call": part.id})
        else:
            only_ours = False
            noted.append({"own": part.value})
    return {} if only_ours else {"model": model, "parts": noted}


def parts_of(message: AssistantMessage, provider: str, model: str) -> list[str | ToolCall | Own]:
    """The message in the order in which `model` of `provider` wrote it, with what it alone understands.

    Written by another, or changed since (its text was cut, say), it is text and calls alone.
    """
    plain: list[str | ToolCall | Own] = [message.text, *message.tool_calls]
    kept = message.extra.get(provider)
    if not isinstance(kept, dict) or kept.get("model") != model or not isinstance(kept.get("parts"), list):
        return plain
    calls = {call.id: call for call in message.tool_calls}
    parts: list[str | ToolCall | Own] = []
    at = 0
    for part in kept["parts"]:
        if "own" in part:
            parts.append(Own(part["own"]))
        elif "call" in part:
            if part["call"] not in calls:
                return plain
            parts.append(calls.pop(part["call"]))
        else:
            parts.append(message.text[at : at + part["text"]])
            at += part["text"]
    return parts if at == len(message.text) and not calls else plain


def _user_content(message: UserMessage) -> str | list[dict[str, Any]]:
    """A plain string where there is only text: some servers know nothing else."""
    if all(isinstance(part, Text) for part in message.content):
        return "\n\n".join(part.text for part in message.content if isinstance(part, Text))
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, Text):
            parts.append({"type": "text", "text": part.text})
        else:
            parts.append({"type": "image_url", "image_url": {"url": f"data:{part.mime_type};base64,{part.data}"}})
    return parts


def _assistant(
    message: AssistantMessage, results: list[ToolMessage], names: ToolNames, wire_id: Callable[[str], str]
) -> list[dict[str, Any]]:
    if not message.tool_calls:
        return [{"role": "assistant", "content": message.text or EMPTY_ANSWER}]
    calls = []
    for call in message.tool_calls:
        # Broken arguments are not sent back: servers parse them when they render their template, and fail.
        args = msgspec.json.encode(call.args if call.args is not None else {}).decode()
        function = {"name": names.to_wire(call.name), "arguments": args}
        calls.append({"id": wire_id(call.id), "type": "function", "function": function})
    wire: list[dict[str, Any]] = [{"role": "assistant", "content": message.text or None, "tool_calls": calls}]
    for result in results:
        wire.append({"role": "tool", "tool_call_id": wire_id(result.tool_call_id), "content": result.output})
    return wire


def without_surrogates(value: Any) -> Any:
    """`value` (JSON types) with each lone surrogate replaced by U+FFFD, for it has no UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    return value


def encode_body(body: dict[str, Any]) -> bytes:
    """The request's body as JSON in UTF-8."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        return msgspec.json.encode(without_surrogates(body))
