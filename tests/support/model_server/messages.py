"""Anthropic's Messages, as a server writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.model_server.chat import pieces
from tests.support.model_server.steps import Answer, CallTools, ErrorInStream, Frame, LengthInToolCall, Say, Status

_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "content_filter": "refusal"}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class Messages:
    """The dialect, for the server."""

    def neutral(self, body: dict[str, Any], _name: str) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": body.get("system")}]
        for message in body.get("messages", []):
            content = message["content"]
            blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
            if message["role"] == "assistant":
                messages.append({"role": "assistant", "content": blocks})
                continue
            results = [block for block in blocks if block["type"] == "tool_result"]
            messages += [{"role": "tool", "content": block.get("content", "")} for block in results]
            if said := [block for block in blocks if block["type"] != "tool_result"]:
                messages.append({"role": "user", "content": said})
        return {**body, "messages": messages}

    def streams(self, body: dict[str, Any]) -> bool:
        return bool(body.get("stream"))

    def frames(self, step: Answer, number: int, body: dict[str, Any], *, usage: bool = True) -> list[Frame]:
        events = _events(step, number, str(body.get("model")), usage)
        return [(event["type"], json.dumps(event, ensure_ascii=False)) for event in events]

    def end(self, step: Answer) -> list[Frame]:
        return [("message_stop", '{"type": "message_stop"}')] if step.wire.done else []

    def whole(self, step: Answer, number: int, body: dict[str, Any]) -> dict[str, Any]:
        message = _message(number, str(body.get("model")))
        for block, _ in _blocks(step, number):
            whole = dict(block)
            if block["type"] == "tool_use":
                whole["input"] = json.loads(_args_of(step, len(message["content"])))
            message["content"].append(whole)
        return {**message, "stop_reason": _reason(step), "usage": _usage(step)}

    def stream_error(self, step: ErrorInStream) -> Frame:
        return "error", json.dumps({"type": "error", "error": {"type": step.type, "message": step.message}})

    def error(self, step: Status) -> dict[str, Any]:
        kind = step.code or _TYPES.get(step.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": step.message}, "request_id": "req_scripted"}


def _message(number: int, model: str) -> dict[str, Any]:
    frame = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": model, "content": []}
    return {**frame, "stop_reason": None, "stop_sequence": None}


def _reason(step: Answer) -> str:
    finish = "length" if isinstance(step, LengthInToolCall) else step.finish
    return _REASONS.get(finish, finish)


def _usage(step: Answer) -> dict[str, Any]:
    read, written = (0, 0) if isinstance(step, LengthInToolCall) else step.cached
    counts = {"cache_read_input_tokens": read, "cache_creation_input_tokens": written}
    return {"input_tokens": step.usage[0], "output_tokens": step.usage[1], **counts}


def _calls(step: Answer) -> Sequence[tuple[str, Mapping[str, Any] | str]]:
    if isinstance(step, LengthInToolCall):
        return [(step.name, step.partial_args)]
    return step.calls if isinstance(step, CallTools) else []


def _args_of(step: Answer, block: int) -> str:
    blocks = [args for _, args in _calls(step)]
    args = blocks[block - (len(list(_blocks(step, 0))) - len(blocks))]
    return args if isinstance(args, str) else json.dumps(args, ensure_ascii=False)


def _blocks(step: Answer, number: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each content block as it ends up, with the deltas that make it."""
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for thought in () if isinstance(step, LengthInToolCall) else step.thinking:
        if thought.startswith("redacted:"):
            blocks.append(({"type": "redacted_thinking", "data": thought}, []))
            continue
        signature = f"signature of {thought}"
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces(thought, 2)]
        deltas += [{"type": "signature_delta", "signature": piece} for piece in pieces(signature, 2)]
        blocks.append(({"type": "thinking", "thinking": thought, "signature": signature}, deltas))
    if step.text:
        texts = pieces(step.text, step.chunks if isinstance(step, Say) else 2)
        blocks.append(({"type": "text", "text": step.text}, [{"type": "text_delta", "text": text} for text in texts]))
    for index, (name, args) in enumerate(_calls(step)):
        text = args if isinstance(args, str) else json.dumps(args, ensure_ascii=False)
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ["", *pieces(text, 4)]]
        blocks.append(({"type": "tool_use", "id": f"toolu_{number}_{index}", "name": name, "input": {}}, deltas))
    return blocks


_EMPTY = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}


def _events(step: Answer, number: int, model: str, usage: bool) -> list[dict[str, Any]]:
    start = _message(number, model)
    if usage:
        start["usage"] = {**_usage(step), "output_tokens": 1}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": start}, {"type": "ping"}]
    blocks = _blocks(step, number)
    for index, (block, deltas) in enumerate(blocks):
        events.append(
            {
                "type": "content_block_start",
                "index": index,
                "content_block": {**block, **_EMPTY.get(block["type"], {})},
            }
        )
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        if not isinstance(step, LengthInToolCall) or index < len(blocks) - 1:
            events.append({"type": "content_block_stop", "index": index})
    # Kinds of events that there will be one day.
    events.append({"type": "something_new", "index": 0, "delta": {"type": "text_delta", "text": "not yours"}})
    if step.wire.finish is not None:
        reason = _reason(step) if step.wire.finish == "auto" else step.wire.finish
        end: dict[str, Any] = {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}}
        events.append({**end, "usage": {"output_tokens": step.usage[1]}} if usage else end)
    return events
