"""Chat Completions, as a server writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.model_server.steps import Answer, CallTools, ErrorInStream, Frame, LengthInToolCall, Say, Status


def pieces(text: str, count: int) -> list[str]:
    if not text:
        return []
    size = max(1, math.ceil(len(text) / max(1, count)))
    return [text[start : start + size] for start in range(0, len(text), size)]


def _call_deltas(step: CallTools | LengthInToolCall, number: int) -> list[dict[str, Any]]:
    """The `tool_calls` entries, each of which goes into a chunk of its own."""
    wire = step.wire
    calls: Sequence[tuple[str, Mapping[str, Any] | str]]
    if isinstance(step, LengthInToolCall):
        calls, ids, fragments = [(step.name, step.partial_args)], None, 4
    else:
        calls, ids, fragments = step.calls, step.ids, step.fragments
    deltas = []
    for index, (name, args) in enumerate(calls):
        call_id = ids[index] if ids else f"call_{number}_{index}"
        head: dict[str, Any] = {"type": "function"}
        if wire.keep_index:
            head["index"] = index
        if wire.keep_id:
            head["id"] = call_id
        if wire.args_as_object:
            deltas.append({**head, "function": {"name": name, "arguments": args}})
            continue
        text = args if isinstance(args, str) else json.dumps(args, ensure_ascii=False)
        if wire.whole_calls:
            deltas.append({**head, "function": {"name": name, "arguments": text}})
            continue
        deltas.append({**head, "function": {"name": name, "arguments": ""}})
        for piece in pieces(text, fragments):
            function = {"name": name, "arguments": piece} if wire.repeat_name else {"arguments": piece}
            deltas.append({"index": index, "function": function} if wire.keep_index else {"function": function})
    return deltas


def answer_chunks(step: Answer, number: int, model: str, usage: bool) -> list[dict[str, Any]]:
    """The chunk objects of a streamed answer, the usage chunk last."""

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**frame, "choices": [choice]} if not usage else {**frame, "choices": [choice], "usage": None}

    frame = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": 0, "model": model}
    chunks = [chunk({"role": "assistant", "content": ""})]
    text_pieces = pieces(step.text, step.chunks if isinstance(step, Say) else 2)
    chunks += [chunk({"content": piece}) for piece in text_pieces]
    if isinstance(step, Say) and step.refusal:
        chunks.append(chunk({"refusal": step.refusal}))
    if not isinstance(step, Say):
        chunks += [chunk({"tool_calls": [delta]}) for delta in _call_deltas(step, number)]
    finish: str | None = "length" if isinstance(step, LengthInToolCall) else step.finish
    if step.wire.finish != "auto":
        finish = step.wire.finish
    if finish is not None:
        chunks.append(chunk({}, finish))
    if usage:
        chunks.append({**frame, "choices": [], "usage": _usage(step)})
    return chunks


def _usage(step: Answer) -> dict[str, Any]:
    prompt, completion = step.usage
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    total = {"total_tokens": (prompt or 0) + (completion or 0)}
    if isinstance(step, LengthInToolCall) or not step.cached[0]:
        return {**usage, **total}
    return {**usage, **total, "prompt_tokens_details": {"cached_tokens": step.cached[0]}}


def whole_answer(step: Answer, number: int, model: str) -> dict[str, Any]:
    """The answer to a request with `stream: false`."""
    message: dict[str, Any] = {"role": "assistant", "content": step.text or None}
    finish = "length" if isinstance(step, LengthInToolCall) else step.finish
    if not isinstance(step, Say):
        calls = [(step.name, step.partial_args)] if isinstance(step, LengthInToolCall) else step.calls
        message["tool_calls"] = [
            {
                "id": f"call_{number}_{index}",
                "type": "function",
                "function": {"name": name, "arguments": args if isinstance(args, str) else json.dumps(args)},
            }
            for index, (name, args) in enumerate(calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "model": model,
        "choices": [choice],
        "usage": _usage(step),
    }


class Chat:
    """The dialect, for the server."""

    def neutral(self, body: dict[str, Any], _name: str) -> dict[str, Any]:
        return body

    def streams(self, body: dict[str, Any]) -> bool:
        return bool(body.get("stream"))

    def frames(self, step: Answer, number: int, body: dict[str, Any], *, usage: bool = True) -> list[Frame]:
        usage = usage and bool((body.get("stream_options") or {}).get("include_usage"))
        chunks = answer_chunks(step, number, str(body.get("model")), usage)
        return [(None, json.dumps(chunk, ensure_ascii=False)) for chunk in chunks]

    def end(self, step: Answer) -> list[Frame]:
        return [(None, "[DONE]")] if step.wire.done else []

    def whole(self, step: Answer, number: int, body: dict[str, Any]) -> dict[str, Any]:
        return whole_answer(step, number, str(body.get("model")))

    def stream_error(self, step: ErrorInStream) -> Frame:
        error = {"message": step.message, "type": step.type, "code": step.code}
        return None, json.dumps({"error": error})

    def error(self, step: Status) -> dict[str, Any]:
        return {"error": {"message": step.message, "type": "scripted", "code": step.code}}
