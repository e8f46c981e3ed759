"""One streamed answer over HTTP, whatever the dialect: the request, the events, the limits, the end."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, ClassVar

import aiohttp
from yarl import URL

from corral.models.api import ModelRequest
from corral.models.arguments import decode_json
from corral.models.http import Endpoint, HttpClient, Timeouts, describe, error_of, read_at_most
from corral.models.provider import Answer, ProviderError, Remedy
from corral.models.sse import EventTooLong, SseParser
from corral.models.transcript import ToolNames, without_surrogates

MAX_ANSWER_BYTES = 32 * 1024 * 1024
MAX_CALLS = 128
MAX_TOKENS = 10**9
_DRAIN_SECONDS = 0.1


class Incoming(ABC):
    """An answer as it comes in; a dialect says what its events mean."""

    url_hint: ClassVar[str] = ""
    """What else to say of the base URL where a web page answers."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._size = 0
        self._text: list[str] = []
        self._held = ""
        self.done = False
        """The event that ends a stream of this dialect has come."""

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    @abstractmethod
    def has_reason(self) -> bool:
        """Whether the answer has said why it ends: it is whole, whatever becomes of the connection behind it."""

    @abstractmethod
    def finish(self, request: ModelRequest, names: ToolNames, new_id: Callable[[], str]) -> Answer:
        """The whole answer. Raises ProviderError where the stream ended before the answer did."""

    @abstractmethod
    def _take_object(self, event: dict[str, Any]) -> None:
        """Take the JSON object of one event."""

    @abstractmethod
    def _take_whole_object(self, body: dict[str, Any]) -> None:
        """Take the answer of a server that does not stream."""

    def take(self, events: list[bytes], size: int) -> str:
        """Take the data of some events, `size` bytes together; returns their text."""
        self._size += size
        if self._size > MAX_ANSWER_BYTES:
            raise ProviderError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes", Remedy.RETRY)
        before = len(self._text)
        for data in events:
            if data.strip() == b"[DONE]":
                self.done = True
                break
            if data.strip():
                self._take_object(_object(data))
        return "".join(self._text[before:])

    def take_whole(self, body: bytes) -> None:
        """Take a body that is one JSON object."""
        self._take_whole_object(_object(body))
        self.done = True

    def _add_text(self, content: str) -> str:
        """Add a piece of text; returns what of it can be shown already."""
        # Servers written in JavaScript cut between the two halves of a surrogate pair: the first
        # half waits for the second.
        content = self._held + content
        self._held = ""
        if content and "\ud800" <= content[-1] <= "\udbff":
            self._held, content = content[-1], content[:-1]
        if not content.isascii():
            content = without_surrogates(content)
        if content:
            self._text.append(content)
        return content

    def _cut_short(self) -> ProviderError:
        return ProviderError(f"{self._endpoint.shown} ended the stream before the answer was whole", Remedy.RETRY)


async def receive(
    client: HttpClient,
    endpoint: Endpoint,
    timeouts: Timeouts,
    url: URL,
    headers: Mapping[str, str],
    body: bytes,
    answer: Incoming,
) -> AsyncGenerator[str, None]:
    """POST, and take everything that comes into `answer`; yields its text as it comes. Raises ProviderError."""
    failure: ProviderError
    try:
        async with client.post(url, headers, body) as response:
            if response.status != 200:
                raise await error_of(response, endpoint, client)
            if response.content_type == "text/html":
                reason = f"{endpoint.shown} answered with a web page; check {endpoint.url_variable}{answer.url_hint}"
                raise ProviderError(reason, Remedy.NEXT)
            if response.content_type == "application/json":
                answer.take_whole(await read_at_most(response, MAX_ANSWER_BYTES))
                if answer.text:
                    yield answer.text
            else:
                async with aclosing(_read(response, answer)) as texts:
                    async for text in texts:
                        yield text
        return
    except (aiohttp.ClientError, TimeoutError) as error:
        if answer.has_reason:
            return
        failure = ProviderError(describe(error, endpoint, timeouts), Remedy.RETRY)
    # Raised out here, without its cause: aiohttp's errors carry the request, and so its headers with the key.
    raise failure


async def _read(response: aiohttp.ClientResponse, answer: Incoming) -> AsyncGenerator[str, None]:
    """The text of the stream; what came in one read is one piece."""
    parser = SseParser()
    try:
        async for chunk in response.content.iter_any():
            if text := answer.take(parser.feed(chunk), len(chunk)):
                yield text
            if answer.done:
                await _drain(response)
                return
        if text := answer.take(parser.end(), 0):
            yield text
    except EventTooLong as error:
        raise ProviderError(str(error), Remedy.RETRY) from error


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read the end of the body behind the last event, without which the connection could not be kept."""
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while not response.content.at_eof():
                await response.content.readany()
    except (TimeoutError, aiohttp.ClientError):
        # The answer is whole; a server that does not end its body only loses the connection.
        return


def _object(data: bytes) -> dict[str, Any]:
    value, valid = decode_json(data)
    if not valid or not isinstance(value, dict):
        raise ProviderError("the stream holds something that is no JSON object", Remedy.RETRY)
    return value


def token_count(value: Any) -> int | None:
    """A number of tokens as a server sends it; None for what is none, and for more than any answer has."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_TOKENS:
        return None
    return int(value)
