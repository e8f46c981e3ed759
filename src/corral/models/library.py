"""Dialects that are not ours to write: pydantic-ai's model layer behind the interface of `provider.py`.

It is an optional extra and imported when its first call is made, in a thread of its own: that takes
2 to 7 s and 70 MiB, which nobody pays who does not use it. docs/decisions/0003-providers.md has the figures.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from corral.models import arguments
from corral.models.api import AssistantMessage, ModelRequest, Text, TextDelta, ToolCall, UserMessage
from corral.models.http import MAX_CONNECTIONS, Endpoint, HttpClient, Timeouts, error_fields, http_error
from corral.models.incoming import MAX_ANSWER_BYTES
from corral.models.provider import Answer, ProviderError, Remedy, Stop
from corral.models.tokens import message_tokens, request_tokens
from corral.models.transcript import GO_ON, LEFT_OUT, Own, ToolNames, note_parts, paired, parts_of, without_surrogates

if TYPE_CHECKING:
    import httpx2
    from pydantic_ai import messages as m
    from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse

MISSING = (
    "{name}:NAME needs a library that is not installed: pip install 'corral[providers]', "
    "or, in a clone of Corral, make providers"
)
KEY_HEADER = "x-goog-api-key"
_STOPS: dict[str, Stop] = {"length": "length", "content_filter": "refused"}
# What they log at lower levels has whole requests in it.
_QUIET = ("httpx", "httpx2", "httpcore", "httpcore2", "google_genai", "pydantic_ai")


class Library:
    """A provider that pydantic-ai speaks to. `name` is the provider's; `new_id` makes the ids of tool calls."""

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        client: HttpClient,
        *,
        timeouts: Timeouts,
        new_id: Callable[[], str],
    ) -> None:
        self._name = name
        self._endpoint = endpoint
        self._timeouts = timeouts
        self._new_id = new_id
        self._client = client
        self._loading = asyncio.Lock()
        self._make: Callable[[str], Model] | None = None

    async def stream(self, name: str, request: ModelRequest) -> AsyncGenerator[TextDelta | Answer, None]:
        """One attempt: text as it comes, then the Answer. Raises ProviderError."""
        model = (await self._loaded())(name)
        texts: asyncio.Queue[str | None] = asyncio.Queue()
        # A task of its own, so that it is always waiting for the server where it is cancelled, never for us.
        task = asyncio.create_task(self._call(model, name, request, texts.put_nowait))
        try:
            while (text := await texts.get()) is not None:
                yield TextDelta(text=text)
            yield await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _call(self, model: Model, name: str, request: ModelRequest, show: Callable[[str | None], None]) -> Answer:
        """The whole call; `show` gets each text, and None at the end. Raises ProviderError."""
        names = ToolNames(request.tools)
        failure: ProviderError
        opened: list[httpx2.Response] = []
        _opened.set(opened)
        try:
            async with asyncio.timeout(self._timeouts.total):
                async with _open(model, name, request, names, self._name) as stream:
                    size = 0
                    async for event in stream:
                        if text := _text_of(event):
                            size += len(text)
                            if size > MAX_ANSWER_BYTES:
                                raise ProviderError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes", Remedy.RETRY)
                            show(without_surrogates(text))
                return self._answer(stream, name, request, names)
        except ProviderError as error:
            failure = error
        except TimeoutError:
            reason = f"no whole answer from {self._endpoint.shown} within {self._timeouts.total:g} s"
            failure = ProviderError(reason, Remedy.RETRY)
        except Exception as error:
            # Servers that answer with what the libraries do not expect make them fail in any way there is.
            failure = self._failure(error)
        finally:
            # The library leaves its nested generators, and with them the connection, to the garbage collector.
            for response in opened:
                await response.aclose()
            show(None)
        # Raised out here, without its cause: the library's errors carry the server's own words.
        raise failure

    # -- the library

    async def _loaded(self) -> Callable[[str], Model]:
        async with self._loading:
            if self._make is None:
                try:
                    self._make = await asyncio.to_thread(self._load)
                except ImportError:
                    reason = MISSING.format(name=self._name)
                else:
                    return self._make
                raise ProviderError(reason, Remedy.NEXT)
            return self._make

    def _load(self) -> Callable[[str], Model]:
        """Import what is needed and make its client. Takes seconds; raises ImportError."""
        import httpx2
        from pydantic_ai.models.google import GoogleModel
        from pydantic_ai.providers.google import GoogleProvider

        for logger in _QUIET:
            logging.getLogger(logger).setLevel(logging.WARNING)
        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
        headers = dict(self._endpoint.headers)
        key = headers.pop(KEY_HEADER, "none")  # a server of one's own may need none; the library does
        http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(self._timeouts.idle, connect=self._timeouts.connect),
            limits=limits,
            event_hooks={"response": [_note_response]},
            trust_env=False,  # no proxies out of the environment, as everywhere here
        )
        self._client.also_close(http.aclose)
        provider = GoogleProvider(api_key=key, base_url=self._endpoint.shown.rstrip("/"), http_client=http)
        return lambda name: GoogleModel(name, provider=provider)

    # -- the answer

    def _answer(self, stream: StreamedResponse, name: str, request: ModelRequest, names: ToolNames) -> Answer:
        response = stream.get()
        reason = response.finish_reason
        if reason is None:
            raise ProviderError(f"{self._endpoint.shown} ended the stream before the answer was whole", Remedy.RETRY)
        if reason == "error":
            raise ProviderError(f"{self._endpoint.shown} could not finish the answer it began", Remedy.RETRY)
        stop = _STOPS.get(reason, "end")
        parts = list(_parts(response, names, self._new_id, cut=stop == "length"))
        calls = [part for part in parts if isinstance(part, ToolCall)]
        noted = note_parts(parts, name)
        text = "".join(part for part in parts if isinstance(part, str))
        message = AssistantMessage(text=text, tool_calls=calls, extra={self._name: noted} if noted else {})
        usage = response.usage
        return Answer(
            message=message,
            input_tokens=usage.input_tokens or request_tokens(request),
            output_tokens=usage.output_tokens or message_tokens(message),
            cache_read_tokens=min(usage.cache_read_tokens, usage.input_tokens),
            cache_write_tokens=min(usage.cache_write_tokens, usage.input_tokens - usage.cache_read_tokens),
            stop="tool_calls" if stop == "end" and calls else stop,
        )

    def _failure(self, error: Exception) -> ProviderError:
        from pydantic_ai import exceptions

        endpoint = self._endpoint
        if isinstance(error, exceptions.ModelHTTPError):
            message, code = error_fields(error.body)
            kind = error.provider_error_code or ""
            message = message or str(error.body)
            return http_error(endpoint, error.status_code, kind, message, kind or code, retry_after=error.retry_after)
        if isinstance(error, exceptions.ModelTimeoutError):
            return ProviderError(f"nothing came from {endpoint.shown} for {self._timeouts.idle:g} s", Remedy.RETRY)
        if isinstance(error, exceptions.ModelConnectionError):
            kind = type(error.__cause__).__name__
            words = f"cannot connect to {endpoint.shown}" if kind == "ConnectError" else ""
            return ProviderError(words or f"the connection to {endpoint.shown} broke ({kind})", Remedy.RETRY)
        if isinstance(error, exceptions.UserError):
            return ProviderError(endpoint.clean(str(error)), Remedy.NEXT)
        kind = type(error).__name__
        return ProviderError(f"{endpoint.shown} answered with something that is not understood ({kind})", Remedy.RETRY)


_opened: ContextVar[list[httpx2.Response]] = ContextVar("opened")


async def _note_response(response: httpx2.Response) -> None:
    _opened.get().append(response)


def _open(
    model: Model, name: str, request: ModelRequest, names: ToolNames, provider: str
) -> AbstractAsyncContextManager[StreamedResponse]:
    """The call, as the library's context manager of a stream."""
    from pydantic_ai.direct import model_request_stream

    limit = request.max_output_tokens
    return model_request_stream(
        model,
        _messages(request, model, name, names, provider),
        model_settings={"max_tokens": limit} if limit is not None else None,
        model_request_parameters=_parameters(request, names),
        instrument=False,
    )


def _parameters(request: ModelRequest, names: ToolNames) -> ModelRequestParameters:
    from pydantic_ai.messages import InstructionPart
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.tools import ToolDefinition

    tools = [
        ToolDefinition(
            name=names.to_wire(tool.name), description=tool.description, parameters_json_schema=tool.parameters
        )
        for tool in request.tools
    ]
    system = [InstructionPart(content=request.system)] if request.system.strip() else []
    return ModelRequestParameters(function_tools=tools, instruction_parts=system)


def _messages(request: ModelRequest, model: Model, name: str, names: ToolNames, provider: str) -> list[m.ModelMessage]:
    """The transcript in the library's form: requests and responses by turns, a request first and last."""
    from pydantic_ai import messages as m

    found: list[m.ModelMessage] = []

    def ask(*parts: m.ModelRequestPart) -> None:
        last = found[-1] if found else None
        if isinstance(last, m.ModelRequest):
            last.parts = [*last.parts, *parts]
        elif parts:
            found.append(m.ModelRequest(parts=list(parts)))

    for step in paired(request.messages):
        if isinstance(step, UserMessage):
            ask(m.UserPromptPart(content=_user_content(step)))
            continue
        message, results = step
        if not found:
            ask(m.UserPromptPart(content=LEFT_OUT))
        parts = list(_response_parts(parts_of(message, provider, name), names, model.system))
        found.append(m.ModelResponse(parts=parts, model_name=name, provider_name=model.system))
        ask(
            *(
                m.ToolReturnPart(
                    tool_name=names.to_wire(result.name),
                    content=result.output,
                    tool_call_id=result.tool_call_id,
                    outcome="failed" if result.is_error else "success",
                )
                for result in results
            )
        )
    if not found or not isinstance(found[-1], m.ModelRequest):
        ask(m.UserPromptPart(content=GO_ON))
    return found


def _user_content(message: UserMessage) -> list[m.UserContent]:
    from pydantic_ai.messages import BinaryContent

    return [
        without_surrogates(part.text)
        if isinstance(part, Text)
        else BinaryContent(data=base64.b64decode(part.data), media_type=part.mime_type)
        for part in message.content
    ]


def _response_parts(
    parts: list[str | ToolCall | Own], names: ToolNames, system: str
) -> list[m.TextPart | m.ToolCallPart | m.ThinkingPart]:
    from pydantic_ai import messages as m

    made: list[m.TextPart | m.ToolCallPart | m.ThinkingPart] = []
    own: dict[str, Any] = {}  # what belongs to the next part
    for part in parts:
        if isinstance(part, Own) and "thinking" in part.value:
            thought = part.value
            made.append(
                m.ThinkingPart(
                    content=thought["thinking"],
                    id=thought.get("id"),
                    signature=thought.get("signature"),
                    provider_name=system,
                    provider_details=thought.get("details"),
                )
            )
        elif isinstance(part, Own):
            own = {**part.value, "provider_name": system}
            continue
        elif isinstance(part, ToolCall):
            args = part.args if part.args is not None else {}
            made.append(m.ToolCallPart(tool_name=names.to_wire(part.name), args=args, tool_call_id=part.id, **own))
        elif part or own:
            made.append(m.TextPart(content=without_surrogates(part), **own))
        own = {}
    return made


def _text_of(event: Any) -> str:
    """The text that a stream's event adds."""
    from pydantic_ai import messages as m

    if isinstance(event, m.PartStartEvent) and isinstance(event.part, m.TextPart):
        return event.part.content
    if isinstance(event, m.PartDeltaEvent) and isinstance(event.delta, m.TextPartDelta):
        return event.delta.content_delta
    return ""


def _parts(response: m.ModelResponse, names: ToolNames, new_id: Callable[[], str], *, cut: bool) -> Any:
    """The answer in its order; what only the provider understands stands before what it belongs to."""
    from pydantic_ai import messages as m

    for number, part in enumerate(response.parts):
        if isinstance(part, m.ThinkingPart):
            fields = {"id": part.id, "signature": part.signature, "details": part.provider_details}
            kept = {name: value for name, value in fields.items() if value is not None}
            yield Own({"thinking": part.content, **kept})
            continue
        if not isinstance(part, m.TextPart | m.ToolCallPart):
            continue
        if part.provider_details:
            yield Own({"provider_details": part.provider_details})
        if isinstance(part, m.TextPart):
            yield without_surrogates(part.content)
        else:
            yield _call(part, names, new_id(), cut and number == len(response.parts) - 1)


def _call(part: m.ToolCallPart, names: ToolNames, call_id: str, cut: bool) -> ToolCall:
    if isinstance(part.args, str):
        args, problem = arguments.parse(part.args, cut=cut)
    else:
        args, problem = arguments.check(part.args if part.args is not None else {})
    return ToolCall(id=call_id, name=names.from_wire(without_surrogates(part.tool_name)), args=args, problem=problem)
