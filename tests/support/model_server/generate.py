"""Google's generateContent, streamed, as a server writes it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.model_server.chat import pieces
from tests.support.model_server.steps import Answer, CallTools, ErrorInStream, Frame, LengthInToolCall, Say, Status

_REASONS = {"stop": "STOP", "tool_calls": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}
_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def signature(text: str) -> str:
    """The thought signature that stands beside what a thought led to."""
    return base64.b64encode(f"signature of {text}".encode()).decode()


class Generate:
    """The dialect, for the server."""

    def neutral(self, body: dict[str, Any], name: str) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        for content in body.get("contents", []):
            parts = content["parts"]
            if content.get("role") == "model":
                messages.append({"role": "assistant", "content": parts})
                continue
            results = [part["functionResponse"] for part in parts if "functionResponse" in part]
            messages += [{"role": "tool", "content": json.dumps(result["response"])} for result in results]
            if said := [part for part in parts if "functionResponse" not in part]:
                messages.append({"role": "user", "content": said})
        return {**body, "model": name, "messages": messages}

    def streams(self, _body: dict[str, Any]) -> bool:
        return True

    def frames(self, step: Answer, number: int, body: dict[str, Any], *, usage: bool = True) -> list[Frame]:
        return [(None, json.dumps(chunk, ensure_ascii=False)) for chunk in _chunks(step, number, usage)]

    def end(self, _step: Answer) -> list[Frame]:
        return []

    def whole(self, step: Answer, number: int, body: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError("this server streams")

    def stream_error(self, step: ErrorInStream) -> Frame:
        code = step.code if isinstance(step.code, int) else 503
        return None, json.dumps(_error(code, step.message, None))

    def error(self, step: Status) -> dict[str, Any]:
        return _error(step.status, step.message, step.code)


def _error(status: int, message: str, code: str | None) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "status": code or _STATUSES.get(status, "UNKNOWN")}}


def _calls(step: Answer) -> Sequence[tuple[str, Mapping[str, Any] | str]]:
    if isinstance(step, LengthInToolCall):
        return []  # a call comes whole here or not at all
    return step.calls if isinstance(step, CallTools) else []


def _chunks(step: Answer, number: int, usage: bool) -> list[dict[str, Any]]:
    thoughts = () if isinstance(step, LengthInToolCall) else step.thinking
    parts: list[dict[str, Any]] = [{"text": thought, "thought": True} for thought in thoughts]
    parts += [{"text": text} for text in pieces(step.text, step.chunks if isinstance(step, Say) else 2)]
    for name, args in _calls(step):
        parts.append({"functionCall": {"name": name, "args": args}})
    if thoughts:
        # The signature of what was thought stands at the first call, or at the end of the text.
        at = len(thoughts) + (len(parts) - len(thoughts) - len(_calls(step)) if _calls(step) else 0)
        parts[min(at, len(parts) - 1)]["thoughtSignature"] = signature(thoughts[-1])
    frame = {"modelVersion": "scripted", "responseId": f"r{number}"}
    chunks: list[dict[str, Any]] = [
        {**frame, "candidates": [{"content": {"role": "model", "parts": [part]}, "index": 0}]} for part in parts
    ]
    finish = "length" if isinstance(step, LengthInToolCall) else step.finish
    reason = _REASONS.get(finish, finish) if step.wire.finish == "auto" else step.wire.finish
    if reason is not None:
        last = {"content": {"role": "model", "parts": [{"text": ""}]}, "index": 0, "finishReason": reason}
        chunks.append({**frame, "candidates": [last]})
    if usage and chunks:
        counts = {"promptTokenCount": step.usage[0], "candidatesTokenCount": step.usage[1]}
        if not isinstance(step, LengthInToolCall) and step.cached[0]:
            counts["cachedContentTokenCount"] = step.cached[0]
        chunks[-1]["usageMetadata"] = counts
    return chunks
