"""The Messages dialect: `POST {base}/v1/messages`, streamed."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from corral.models import arguments
from corral.models.api import AssistantMessage, ModelRequest, Text, TextDelta, ToolCall, ToolMessage, UserMessage
from corral.models.http import Endpoint, HttpClient, Timeouts, error_fields, http_error
from corral.models.incoming import MAX_CALLS, Incoming, receive, token_count
from corral.models.provider import Answer, ProviderError, Remedy, Stop
from corral.models.tokens import message_tokens, request_tokens
from corral.models.transcript import (
    EMPTY_ANSWER,
    GO_ON,
    LEFT_OUT,
    Own,
    ToolNames,
    encode_body,
    note_parts,
    paired,
    parts_of,
    without_surrogates,
)

PROVIDER = "anthropic"
VERSION = "2023-06-01"
EMPTY_INPUT = "(empty message)"

DEFAULT_MAX_TOKENS = 16_000
"""`max_tokens`, which this wire requires, where nothing else is known: as much as Corral leaves free in a window."""

# The first that the name begins with counts. Up to the first models of generation 4 a request is refused
# whose input and `max_tokens` together exceed the window; later ones just stop there.
_MAX_TOKENS = (
    ("claude-3-5-", 8_192),
    ("claude-3-7-", DEFAULT_MAX_TOKENS),
    ("claude-3-", 4_096),
    ("claude-opus-4-0", DEFAULT_MAX_TOKENS),
    ("claude-opus-4-1", DEFAULT_MAX_TOKENS),
    ("claude-opus-4-2", DEFAULT_MAX_TOKENS),
    ("claude-sonnet-4-0", DEFAULT_MAX_TOKENS),
    ("claude-sonnet-4-2", DEFAULT_MAX_TOKENS),
    ("claude-", 32_000),
)
_STATUS_OF = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_STOPS: dict[str, Stop] = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refused",
}
_NOT_IN_IDS = re.compile(r"[^a-zA-Z0-9_-]")
_CACHED = {"type": "ephemeral"}


def max_tokens(name: str, asked: int | None) -> int:
    """`max_tokens` of a request: what was asked for, but no more than the model gives."""
    most = next((limit for prefix, limit in _MAX_TOKENS if name.startswith(prefix)), DEFAULT_MAX_TOKENS)
    return most if asked is None else max(1, min(asked, most))


class Anthropic:
    """One endpoint that speaks Messages. `new_id` makes the ids of tool calls."""

    def __init__(
        self, endpoint: Endpoint, client: HttpClient, *, timeouts: Timeouts, new_id: Callable[[], str]
    ) -> None:
        self._endpoint = endpoint
        self._client = client
        self._timeouts = timeouts
        self._new_id = new_id
        # The base URL is the server's root; some write it with the version, as other dialects have it.
        self._url = endpoint.join("/messages" if endpoint.shown.rstrip("/").endswith("/v1") else "/v1/messages")
        self._headers = {
            **endpoint.headers,
            "anthropic-version": VERSION,
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
        }

    async def stream(self, name: str, request: ModelRequest) -> AsyncGenerator[TextDelta | Answer, None]:
        """One attempt: text as it comes, then the Answer. Raises ProviderError."""
        names = ToolNames(request.tools)
        body = encode_body(wire_request(name, request, names))
        answer = _MessagesAnswer(self._endpoint, name)
        coming = receive(self._client, self._endpoint, self._timeouts, self._url, self._headers, body, answer)
        async with aclosing(coming) as texts:
            async for text in texts:
                yield TextDelta(text=text)
        yield answer.finish(request, names, self._new_id)


# ---- the request


def wire_request(name: str, request: ModelRequest, names: ToolNames) -> dict[str, Any]:
    """The body of a request, with its cache marks."""
    messages = _messages(name, request, names)
    body: dict[str, Any] = {
        "model": name,
        "max_tokens": max_tokens(name, request.max_output_tokens),
        "messages": messages,
        "stream": True,
    }
    if request.system.strip():
        body["system"] = [{"type": "text", "text": request.system}]
    tools = [
        {"name": names.to_wire(tool.name), "description": tool.description, "input_schema": _schema(tool.parameters)}
        for tool in request.tools
    ]
    if not tools and (called := _called(messages)):
        # The wire wants every tool that a transcript calls to be defined; this request gives none.
        tools = [{"name": tool, "description": "Not available.", "input_schema": _schema({})} for tool in called]
        body["tool_choice"] = {"type": "none"}
    if tools:
        body["tools"] = tools
    _mark(body)
    return body


def _mark(body: dict[str, Any]) -> None:
    """Say what to keep in the provider's cache: at most the four places that the wire allows.

    The tools, the system prompt, the end of this request, which the next step goes on from, and the
    end of the one before, where what the last step put into the cache is found.
    """
    for field in ("tools", "system"):
        if body.get(field):
            body[field][-1]["cache_control"] = _CACHED
    for message in [message for message in body["messages"] if message["role"] == "user"][-2:]:
        message["content"][-1]["cache_control"] = _CACHED


def _messages(name: str, request: ModelRequest, names: ToolNames) -> list[dict[str, Any]]:
    """The `messages` field: user and assistant by turns, the user first and last."""
    steps = list(paired(request.messages))
    turn_begins = max((number for number, step in enumerate(steps) if isinstance(step, UserMessage)), default=-1)
    merged: list[dict[str, Any]] = []

    def add(role: str, blocks: list[dict[str, Any]]) -> None:
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"].extend(blocks)
        elif blocks:
            merged.append({"role": role, "content": blocks})

    for number, step in enumerate(steps):
        if isinstance(step, UserMessage):
            add("user", _user_blocks(step))
            continue
        message, results = step
        if not merged:
            add("user", [_text(LEFT_OUT)])
        # Thinking belongs to its turn: during it the wire wants it back unchanged, later it has no use for it.
        add("assistant", _assistant_blocks(message, name if number > turn_begins else "", names))
        add("user", [_result_block(result) for result in results])
    if not merged:
        add("user", [_text(EMPTY_INPUT)])
    if merged[-1]["role"] == "assistant":
        add("user", [_text(GO_ON)])
    return merged


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _user_blocks(message: UserMessage) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for part in message.content:
        if not isinstance(part, Text):
            source = {"type": "base64", "media_type": part.mime_type, "data": part.data}
            blocks.append({"type": "image", "source": source})
        elif part.text.strip():  # the wire refuses text that is only space
            blocks.append(_text(part.text))
    return blocks or [_text(EMPTY_INPUT)]


def _assistant_blocks(message: AssistantMessage, name: str, names: ToolNames) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    parts = parts_of(message, PROVIDER, name)
    for part in parts:
        if isinstance(part, Own):
            blocks.append(part.value)
        elif isinstance(part, ToolCall):
            # Broken arguments are not sent back; the wire wants an object.
            use = {"type": "tool_use", "id": _wire_id(part.id), "name": names.to_wire(part.name)}
            blocks.append({**use, "input": part.args if part.args is not None else {}})
        elif part.strip():
            blocks.append(_text(part))
    if not blocks or isinstance(parts[-1], Own):  # a message may not end in thinking
        blocks.append(_text(EMPTY_ANSWER))
    return blocks


def _result_block(result: ToolMessage) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "tool_result", "tool_use_id": _wire_id(result.tool_call_id)}
    if result.output.strip():
        block["content"] = result.output
    if result.is_error:
        block["is_error"] = True
    return block


def _wire_id(call_id: str) -> str:
    return _NOT_IN_IDS.sub("_", call_id)


def _schema(parameters: dict[str, Any]) -> dict[str, Any]:
    return parameters if parameters.get("type") == "object" else {**parameters, "type": "object"}


def _called(messages: list[dict[str, Any]]) -> list[str]:
    blocks = [block for message in messages for block in message["content"]]
    return sorted({block["name"] for block in blocks if block["type"] == "tool_use"})


# ---- the answer


class _Block:
    """A content block that is coming in. `size` is how many characters of the message's text are its own."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.kind = content.get("type")
        self.content = content
        self.size = 0
        self.json: list[str] = []
        self._pieces: dict[str, list[str]] = {}

    def append(self, field: str, piece: Any) -> None:
        """Put `piece` behind what the field holds; joined at the end alone, so that a long one costs linear time."""
        if isinstance(piece, str):
            self._pieces.setdefault(field, []).append(piece)

    def end(self) -> None:
        """The block is whole: its content has all that was appended."""
        for field, pieces in self._pieces.items():
            before = self.content.get(field)
            self.content[field] = "".join([before if isinstance(before, str) else "", *pieces])
        self._pieces = {}


class _MessagesAnswer(Incoming):
    """An answer as it comes in."""

    url_hint = ", which is the server's address without a path"

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        super().__init__(endpoint)
        self._model = model
        self._blocks: list[_Block] = []
        self._by_index: dict[int, _Block] = {}
        self._calls = 0
        self._usage: dict[str, int] = {}
        self._reason: str | None = None
        self._started = False

    @property
    def has_reason(self) -> bool:
        return self._reason is not None

    # -- taking in

    def _take_object(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "content_block_delta":
            block, delta = self._by_index.get(_index(event)), event.get("delta")
            if block is not None and isinstance(delta, dict):
                self._add_delta(block, delta)
        elif kind == "content_block_start":
            content = event.get("content_block")
            if isinstance(content, dict):
                self._by_index[_index(event)] = self._open(content)
        elif kind == "message_start":
            self._started = True
            message = event.get("message")
            self._count(message.get("usage") if isinstance(message, dict) else None)
        elif kind == "message_delta":
            self._end_with(event.get("delta"))
            self._count(event.get("usage"))
        elif kind == "message_stop":
            self.done = True
        elif kind == "error" or (kind is None and event.get("error")):
            raise self._error(event)

    def _take_whole_object(self, body: dict[str, Any]) -> None:
        if body.get("type") == "error" or body.get("error"):
            raise self._error(body)
        self._started = body.get("type") == "message"
        content = body.get("content")
        for block in content if isinstance(content, list) else []:
            if isinstance(block, dict):
                self._open(block)
        self._end_with(body)
        self._count(body.get("usage"))

    def _open(self, content: dict[str, Any]) -> _Block:
        block = _Block(dict(content))
        self._blocks.append(block)
        if block.kind == "text":
            self._add_block_text(block, content.get("text"))
        self._calls += block.kind == "tool_use"
        if self._calls > MAX_CALLS:
            raise ProviderError(f"more than {MAX_CALLS} tool calls in one answer", Remedy.RETRY)
        return block

    def _add_delta(self, block: _Block, delta: dict[str, Any]) -> None:
        kind = delta.get("type")
        if kind == "text_delta":
            self._add_block_text(block, delta.get("text"))
        elif kind == "input_json_delta":
            piece = delta.get("partial_json")
            if isinstance(piece, str):
                block.json.append(piece)
        elif kind == "thinking_delta":
            block.append("thinking", delta.get("thinking"))
        elif kind == "signature_delta":
            block.append("signature", delta.get("signature"))

    def _add_block_text(self, block: _Block, text: Any) -> None:
        if isinstance(text, str) and text:
            block.size += len(self._add_text(text))

    def _end_with(self, holder: Any) -> None:
        if isinstance(holder, dict) and isinstance(holder.get("stop_reason"), str):
            self._reason = holder["stop_reason"]

    def _count(self, usage: Any) -> None:
        """Counts come at the start and, grown, at the end: the last of each counts."""
        for field in ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            count = token_count(usage.get(field)) if isinstance(usage, dict) else None
            if count is not None:
                self._usage[field] = count

    def _error(self, event: dict[str, Any]) -> ProviderError:
        """An error object where an event should be: the status was sent long before."""
        message, kind = error_fields(event)
        told = str(kind or "error in the stream")
        return http_error(self._endpoint, _STATUS_OF.get(told, 500), told, message, kind, retry_after=None)

    # -- the end

    def finish(self, request: ModelRequest, names: ToolNames, new_id: Callable[[], str]) -> Answer:
        """The whole answer. Raises ProviderError where the stream ended before the answer did."""
        if not self._started or (self._reason is None and not self.done):
            raise self._cut_short()
        stop = _STOPS.get(self._reason or "", "end")
        parts = self._parts(names, new_id, cut=stop == "length")
        calls = [part for part in parts if isinstance(part, ToolCall)]
        noted = note_parts(parts, self._model)
        message = AssistantMessage(text=self.text, tool_calls=calls, extra={PROVIDER: noted} if noted else {})
        read, written = self._usage.get("cache_read_input_tokens", 0), self._usage.get("cache_creation_input_tokens", 0)
        fresh = self._usage.get("input_tokens")
        # What of the input was cached is not part of the wire's `input_tokens`.
        return Answer(
            message=message,
            input_tokens=fresh + read + written if fresh is not None else max(request_tokens(request), read + written),
            output_tokens=self._usage.get("output_tokens") or message_tokens(message),
            cache_read_tokens=read,
            cache_write_tokens=written,
            stop="tool_calls" if stop == "end" and calls else stop,
        )

    def _parts(self, names: ToolNames, new_id: Callable[[], str], *, cut: bool) -> list[str | ToolCall | Own]:
        """The message in its order; blocks of kinds that are not known are left out."""
        parts: list[str | ToolCall | Own] = []
        text, at = self.text, 0
        for number, block in enumerate(self._blocks):
            block.end()
            if block.kind == "text":
                parts.append(text[at : at + block.size])
                at += block.size
            elif block.kind == "tool_use":
                parts.append(_call(block, names, new_id(), cut and number == len(self._blocks) - 1))
            elif block.kind == "redacted_thinking" or (block.kind == "thinking" and block.content.get("signature")):
                # Without its signature (the limit came first) thinking is not taken back.
                parts.append(Own(without_surrogates(block.content)))
        return parts


def _index(event: dict[str, Any]) -> int:
    """The number of the block that an event is about; -1 where it gives none."""
    index = event.get("index")
    return index if isinstance(index, int) else -1


def _call(block: _Block, names: ToolNames, call_id: str, cut: bool) -> ToolCall:
    name = block.content.get("name")
    if not isinstance(name, str) or not name:
        return ToolCall(id=call_id, name="", args=None, problem=arguments.NO_NAME)
    given = block.content.get("input")
    if not block.json and given:  # some servers send the whole input at the start
        args, problem = arguments.check(given)
    else:
        args, problem = arguments.parse("".join(block.json), cut=cut)
    return ToolCall(id=call_id, name=names.from_wire(without_surrogates(name)), args=args, problem=problem)
