"""The Chat Completions dialect: `POST {base}/chat/completions`, streamed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from corral.models import arguments
from corral.models.api import AssistantMessage, ModelRequest, TextDelta, ToolCall
from corral.models.http import Endpoint, HttpClient, Timeouts, error_fields, remedy_for
from corral.models.incoming import MAX_CALLS, Incoming, receive, token_count
from corral.models.provider import Answer, ProviderError, Remedy, Stop
from corral.models.tokens import message_tokens, request_tokens
from corral.models.transcript import ToolNames, encode_body, wire_messages, wire_tools, without_surrogates


class ChatCompletions:
    """One endpoint that speaks Chat Completions.

    `token_limit_field` is what the endpoint calls the limit of output tokens (`max_tokens`
    nearly everywhere, `max_completion_tokens` at its inventor's). `new_id` makes the ids of tool
    calls; the server's own are not used, for some servers begin at `call_0` in every answer.
    `strict`: fields that not every server knows are left out (these count tokens unasked).
    `short_ids`: the wire wants ids of nine letters and digits.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        client: HttpClient,
        *,
        timeouts: Timeouts,
        new_id: Callable[[], str],
        token_limit_field: str = "max_tokens",  # noqa: S107 - a field of the wire
        strict: bool = False,
        short_ids: bool = False,
    ) -> None:
        self._endpoint = endpoint
        self._client = client
        self._timeouts = timeouts
        self._new_id = new_id
        self._token_limit_field = token_limit_field
        self._strict = strict
        self._wire_id = _short_id if short_ids else str
        self._url = endpoint.join("/chat/completions")
        self._headers = {**endpoint.headers, "Content-Type": "application/json", "Accept": "text/event-stream"}

    async def stream(self, name: str, request: ModelRequest) -> AsyncGenerator[TextDelta | Answer, None]:
        """One attempt: text as it comes, then the Answer. Raises ProviderError."""
        names = ToolNames(request.tools)
        body = self._body(name, request, names)
        answer = _ChatAnswer(self._endpoint)
        coming = receive(self._client, self._endpoint, self._timeouts, self._url, self._headers, body, answer)
        async with aclosing(coming) as texts:
            async for text in texts:
                yield TextDelta(text=text)
        yield answer.finish(request, names, self._new_id)

    def _body(self, name: str, request: ModelRequest, names: ToolNames) -> bytes:
        body: dict[str, Any] = {
            "model": name,
            "messages": wire_messages(request, names, self._wire_id),
            "stream": True,
        }
        if not self._strict:
            body["stream_options"] = {"include_usage": True}
        if request.tools:
            body["tools"] = wire_tools(request.tools, names)
        if request.max_output_tokens is not None:
            body[self._token_limit_field] = request.max_output_tokens
        return encode_body(body)


def _short_id(call_id: str) -> str:
    """Nine characters that are always the same for an id; two of one transcript coincide at odds of 1 to 10**9."""
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


_MARKS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_STATUS = re.compile(r"[0-9]{3}")


class _Brackets:
    """Whether the brackets of a JSON text that comes in pieces are all closed again.

    Servers that repeat a call's name in each fragment have this asked at each of them: to decode all that
    there is so far every time would take time by the square of its length.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._opened = self._quoted = False
        self._half = ""
        self.spent = False

    def add(self, piece: str) -> None:
        """Take the next piece."""
        text = self._half + piece
        # A backslash at the very end waits for what it stands before.
        backslashes = len(text) - len(text.rstrip("\\"))
        self._half = "\\" if backslashes % 2 else ""
        for mark in _MARKS.findall(text[: len(text) - len(self._half)]):
            if mark == '"':
                self._quoted = not self._quoted
            elif not self._quoted and len(mark) == 1:
                self._opened = True
                self._depth += 1 if mark in "{[" else -1

    @property
    def closed(self) -> bool:
        return self._opened and not self._quoted and self._depth == 0 and not self.spent


class _CallInProgress:
    """A tool call whose fragments are coming in."""

    def __init__(self, wire_id: str | None) -> None:
        self.wire_id = wire_id
        self.name = ""
        self.args: list[str] = []
        self.parsed: Any = None
        """Arguments that came as an object and not as text."""
        self._brackets = _Brackets()

    def add(self, function: Any) -> None:
        if not isinstance(function, dict):
            return
        name = function.get("name")
        # Some servers repeat the name in every fragment; none is known to send it in pieces.
        if isinstance(name, str) and name and not self.name:
            self.name = name
        args = function.get("arguments")
        if isinstance(args, str):
            self.args.append(args)
            self._brackets.add(args)
        elif args is not None:
            self.parsed = args

    def is_whole(self) -> bool:
        """Whether the arguments so far are a JSON value, so that a new name can only be a new call."""
        if self.parsed is not None:
            return True
        if not self._brackets.closed:
            return False
        # Looked at once: what comes behind the last bracket makes nothing whole again.
        text = "".join(self.args)
        whole = arguments.decode_json(text.encode("utf-8", "surrogatepass"))[1]
        self._brackets.spent = not whole
        return whole


class _ChatAnswer(Incoming):
    """An answer as it comes in."""

    url_hint = ", which often ends in /v1"

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self._calls: list[_CallInProgress] = []
        self._by_index: dict[int, _CallInProgress] = {}
        self._usage: dict[str, Any] = {}
        self._finish: str | None = None
        self._refused = False
        self._choices_seen = False

    @property
    def has_reason(self) -> bool:
        return self._finish is not None

    # -- taking in

    def _take_whole_object(self, body: dict[str, Any]) -> None:
        self._take_object(body)

    def _take_object(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error"):
            raise self._stream_error(chunk)
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        self._choices_seen = True
        choice = choices[0]
        if isinstance(choice.get("finish_reason"), str):
            self._finish = choice["finish_reason"]
        delta = choice.get("delta") or choice.get("message")
        if not isinstance(delta, dict):
            return
        self._add_content(delta.get("content"))
        refusal = delta.get("refusal")
        if isinstance(refusal, str) and refusal:
            self._refused = True
            self._add_text(refusal)
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            for call in calls:
                if isinstance(call, dict):
                    self._add_call(call)

    def _add_content(self, content: Any) -> None:
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if isinstance(part, dict) and _is_text(part))
        if isinstance(content, str) and content:
            self._add_text(content)

    def _add_call(self, fragment: dict[str, Any]) -> None:
        call = self._call_of(fragment)
        call.add(fragment.get("function"))
        if len(self._calls) > MAX_CALLS:
            raise ProviderError(f"more than {MAX_CALLS} tool calls in one answer", Remedy.RETRY)

    def _call_of(self, fragment: dict[str, Any]) -> _CallInProgress:
        """The call that a fragment belongs to.

        By index, as the dialect has it. Some servers give every call of an answer the index 0, or
        none at all: there another id begins a new call, and so does another name, or the same once
        the last call's arguments are whole.
        """
        index = fragment.get("index")
        wire_id = fragment.get("id") if isinstance(fragment.get("id"), str) and fragment.get("id") else None
        function = fragment.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(index, int):
            call = self._by_index.get(index)
        else:
            call = self._calls[-1] if self._calls else None
            if wire_id is not None:
                call = next((known for known in self._calls if known.wire_id == wire_id), call)
        if call is not None:
            other_id = wire_id is not None and call.wire_id is not None and wire_id != call.wire_id
            nameless = not name or wire_id is not None or isinstance(index, int)
            new_name = not nameless and (name != call.name or call.is_whole())
            if not other_id and not new_name:
                if call.wire_id is None:
                    call.wire_id = wire_id
                return call
        call = _CallInProgress(wire_id)
        self._calls.append(call)
        if isinstance(index, int):
            self._by_index[index] = call
        return call

    def _stream_error(self, chunk: dict[str, Any]) -> ProviderError:
        """An error object where a chunk should be: the status was sent long before."""
        message, code = error_fields(chunk)
        error = chunk["error"]
        kind = error.get("type") if isinstance(error, dict) else None
        status = int(code) if isinstance(code, int) or (isinstance(code, str) and _STATUS.fullmatch(code)) else None
        if status is None and ("invalid_request_error" in (code, kind) or code == "context_length_exceeded"):
            status = 400
        known = status is not None and 400 <= status < 600
        remedy = remedy_for(status, code, message) if status is not None and known else Remedy.RETRY
        told = self._endpoint.clean(message or str(code or "unknown"))
        return ProviderError(f"error in the stream: {told}", remedy)

    # -- the end

    def finish(self, request: ModelRequest, names: ToolNames, new_id: Callable[[], str]) -> Answer:
        """The whole answer. Raises ProviderError where the stream ended before the answer did."""
        if not self._choices_seen or (self._finish is None and not self.done):
            raise self._cut_short()
        cut = self._finish == "length"
        calls = [
            _finished_call(call, names, new_id(), cut and number == len(self._calls) - 1)
            for number, call in enumerate(self._calls)
        ]
        message = AssistantMessage(text=self.text, tool_calls=calls)
        prompt, completion, cached = self._tokens()
        return Answer(
            message=message,
            input_tokens=prompt if prompt is not None else request_tokens(request),
            output_tokens=completion if completion is not None else message_tokens(message),
            cache_read_tokens=cached,
            stop=self._stop(),
        )

    def _tokens(self) -> tuple[int | None, int | None, int]:
        """Input, output, and how many of the input came out of the provider's cache."""
        usage = self._usage
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else usage.get("prompt_cache_hit_tokens")
        prompt = token_count(usage.get("prompt_tokens"))
        read = min(token_count(cached) or 0, prompt or 0)
        return prompt, token_count(usage.get("completion_tokens")), read

    def _stop(self) -> Stop:
        if self._finish == "length":
            return "length"
        if self._refused or self._finish == "content_filter":
            return "refused"
        # Some servers say `stop` and call tools all the same.
        return "tool_calls" if self._calls else "end"


def _finished_call(call: _CallInProgress, names: ToolNames, call_id: str, cut: bool) -> ToolCall:
    name = names.from_wire(without_surrogates(call.name))
    args, problem = _arguments(call, cut)
    return ToolCall(id=call_id, name=name, args=args, problem=problem)


def _arguments(call: _CallInProgress, cut: bool) -> tuple[dict[str, Any] | None, str | None]:
    """The arguments, or None and what is wrong with them, in words that the model can act on."""
    if not call.name:
        return None, arguments.NO_NAME
    if call.parsed is not None:
        return arguments.check(call.parsed)
    return arguments.parse("".join(call.args), cut=cut)


def _is_text(part: dict[str, Any]) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)
