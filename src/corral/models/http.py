"""The one HTTP client of all providers: a shared aiohttp session, time-outs, and errors without secrets."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from msgspec import Struct
from yarl import URL

from corral.models.provider import ProviderError, Remedy

MAX_CONNECTIONS = 1024
_ERROR_BODY_BYTES = 64 * 1024
_ERROR_TEXT_LIMIT = 300
_SHORTEST_KEY = 6
_AT_ONCE = 64 * 1024
"""Bytes of a request that are written at once; aiohttp writes pieces of this size."""


class Timeouts(Struct, kw_only=True, frozen=True):
    """Seconds. `idle` is how long nothing may come, before the first byte as between two chunks."""

    connect: float = 15
    idle: float = 120
    total: float = 300


class HttpClient:
    """A session made on the loop that first uses it; every provider shares it. Safe for concurrent use."""

    def __init__(self, timeouts: Timeouts, now_ms: Callable[[], int]) -> None:
        self._timeouts = timeouts
        self._now_ms = now_ms
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        self._others: list[Callable[[], Awaitable[None]]] = []

    @asynccontextmanager
    async def post(self, url: URL, headers: Mapping[str, str], body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a POST, whatever its status; leaving the block in the middle of it closes the connection.

        A connection that the server has closed while it was idle, which the client could not know
        yet, fails on first use: the request is then made once more, at once, on a new connection.
        aiohttp does that itself for idempotent methods alone (`IDEMPOTENT_METHODS`, aiohttp 3.14).
        Raises aiohttp's errors and TimeoutError.
        """
        state = SimpleNamespace(reused=False)
        try:
            response = await self._pooled().post(
                url, headers=headers, data=_payload(body), allow_redirects=False, trace_request_ctx=state
            )
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError):
            if not state.reused:
                raise
            response = await self._unpooled().post(url, headers=headers, data=_payload(body), allow_redirects=False)
        async with response:
            yield response

    async def close(self) -> None:
        """Close every connection."""
        for session in (self._session, self._fresh):
            if session is not None:
                await session.close()
        self._session = self._fresh = None
        while self._others:
            await self._others.pop()()

    def also_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """Have `close` called by `close()`: for a provider that brings a client of its own."""
        self._others.append(close)

    def _pooled(self) -> aiohttp.ClientSession:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_reuseconn.append(_mark_reused)
            self._session = self._make(aiohttp.TCPConnector(limit=MAX_CONNECTIONS), [trace])
        return self._session

    def _unpooled(self) -> aiohttp.ClientSession:
        """Never reuses a connection: after a restart of the server the whole pool may be stale."""
        if self._fresh is None:
            self._fresh = self._make(aiohttp.TCPConnector(limit=MAX_CONNECTIONS, force_close=True), [])
        return self._fresh

    def _make(self, connector: aiohttp.TCPConnector, traces: list[aiohttp.TraceConfig]) -> aiohttp.ClientSession:
        timeouts = self._timeouts
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=timeouts.total, connect=timeouts.connect, sock_read=timeouts.idle),
            trace_configs=traces,
            auto_decompress=True,
            trust_env=False,
        )

    def retry_after(self, headers: Mapping[str, str]) -> float | None:
        """Seconds that the server asks to be left alone; `Retry-After` is seconds or an HTTP-date."""
        value = headers.get("Retry-After", "").strip()
        if not value:
            return None
        try:
            seconds = float(value)
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - self._now_ms() / 1000
            except (ValueError, OverflowError):
                return None
        return max(0.0, seconds) if seconds < float("inf") else None


def _payload(body: bytes) -> bytes | io.BytesIO:
    """The body as aiohttp wants it: bytes go out in one write, which would hold up every other run for a large one."""
    return body if len(body) <= _AT_ONCE else io.BytesIO(body)


async def _mark_reused(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    context.trace_request_ctx.reused = True


class Endpoint:
    """A base URL and what opens it. Its `repr` and `shown` hold no secret.

    `base_url` may carry `user:password@`, which becomes basic authentication and takes precedence
    over `api_key` (as in the usual clients), and a query, which every request keeps.
    `key_header`: where the key goes, if not into `Authorization`; it then goes along with the URL's credentials.
    Raises ValueError with words for a person where a part cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        url_variable: str,
        key_variable: str | None,
        key_header: str | None = None,
    ) -> None:
        self.url_variable = url_variable
        self.key_variable = key_variable
        try:
            url = URL(base_url.strip())
        except ValueError:
            raise ValueError(f"{url_variable} is not a URL") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{url_variable} is not an http:// or https:// URL")
        key = (api_key or "").strip()
        if not key.isascii() or not key.isprintable():
            raise ValueError(f"{key_variable} has characters that no key has")
        self._secrets = {key, url.password or "", url.raw_password or ""}
        # Some take a key as user name or in the query; what is short there is a name or a version.
        maybe = (url.user or "", url.raw_user or "", *url.query.values())
        self._secrets.update(value for value in maybe if len(value) >= _SHORTEST_KEY)
        self.headers: dict[str, str] = {}
        if url.user is not None or url.password is not None:
            pair = f"{url.user or ''}:{url.password or ''}".encode()
            basic = base64.b64encode(pair).decode()
            self._secrets.add(basic)
            self.headers["Authorization"] = f"Basic {basic}"
        elif key and key_header is None:
            self.headers["Authorization"] = f"Bearer {key}"
        if key and key_header is not None:
            self.headers[key_header] = key
        # As a server may write them: in a URL, or in JSON in JSON.
        self._secrets.update([quote(secret, safe="") for secret in self._secrets])
        self._secrets.update([secret.replace("/", "\\/") for secret in self._secrets])
        self._secrets -= {""}
        self._base = url.with_user(None)
        self.shown = str(self._base.with_query(None).with_fragment(None))

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r})"

    @property
    def host(self) -> str:
        return self._base.host or ""

    def join(self, path: str) -> URL:
        """`base_url` + `path` (which begins with a slash), as the usual clients join them."""
        base = self._base
        return base.with_path(base.raw_path.rstrip("/") + path, encoded=True, keep_query=True).with_fragment(None)

    def clean(self, text: str) -> str:
        """`text` from the server, in one line, cut, and without our secrets in it."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "[hidden]")
        text = _KEY_LIKE.sub("[hidden]", text)
        text = " ".join(text.split())
        return text if len(text) <= _ERROR_TEXT_LIMIT else text[:_ERROR_TEXT_LIMIT] + "…"


# Servers repeat a refused key in part: "Incorrect API key provided: sk-proj-****abcd".
_KEY_LIKE = re.compile(r"\b(?:(?:sk|pk|rk|gsk|xai|hf|key|Bearer)[-_ ]|AIza|AQ\.)[\w*.\-]{8,}")

_RETRY = frozenset({408, 409, 425, 429})
_REFUSED = frozenset({400, 413, 415, 422})
_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error"})
_TOO_LONG = re.compile(
    r"context_length_exceeded|context.?(?:length|window|size)|prompt is too long|input is too long"
    r"|input token count\b.*\bexceeds|exceeds the maximum number of tokens",
    re.IGNORECASE | re.DOTALL,
)
# What some answer with status 400 although another request would fare no better: it is the account.
_ACCOUNT = re.compile(r"credit balance|API[_ ]key[_ ](?:not valid|invalid|expired)", re.IGNORECASE)


def remedy_for(status: int, code: object = None, message: str = "") -> Remedy:
    """What is left to do after an HTTP status (or an error of that number in a stream)."""
    if status == 429 and isinstance(code, str) and code in _QUOTA:
        return Remedy.NEXT
    if status in _RETRY or status >= 500:
        return Remedy.RETRY
    if status in _REFUSED:
        if _ACCOUNT.search(message):
            return Remedy.NEXT
        return Remedy.LONGER if _TOO_LONG.search(f"{code} {message}") else Remedy.GIVE_UP
    return Remedy.NEXT


async def read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, or its first `limit` bytes."""
    try:
        return await response.content.readexactly(limit)
    except asyncio.IncompleteReadError as error:
        return error.partial


async def error_of(response: aiohttp.ClientResponse, endpoint: Endpoint, client: HttpClient) -> ProviderError:
    """The ProviderError for a response that is not 200."""
    status = response.status
    body = await read_at_most(response, _ERROR_BODY_BYTES)
    message, code = _error_text(body)
    return http_error(
        endpoint, status, response.reason or "", message, code, retry_after=client.retry_after(response.headers)
    )


def http_error(
    endpoint: Endpoint, status: int, phrase: str, message: str, code: object, *, retry_after: float | None
) -> ProviderError:
    """The ProviderError for a status, the server's own words about it and its code."""
    remedy = remedy_for(status, code, message)
    if status in (401, 403) or (status == 400 and remedy is Remedy.NEXT and "credit" not in message):
        # What the server says of a key may hold the key.
        what = endpoint.key_variable or endpoint.url_variable
        reason = f"{status}: {endpoint.shown} refused the key; check {what}"
    elif status == 404:
        reason = f"404: {endpoint.shown} has no such model or path; check the model's name and {endpoint.url_variable}"
    elif 300 <= status < 400:
        reason = f"{status}: {endpoint.shown} redirects elsewhere; set {endpoint.url_variable} to the final address"
    else:
        told = f"{phrase}: {message}" if phrase and message else phrase or message
        reason = f"{status} {endpoint.clean(told)}".strip()
    return ProviderError(reason, remedy, retry_after=retry_after)


def _error_text(body: bytes) -> tuple[str, object]:
    """Message and code out of an error's body, in the forms that servers give it."""
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return body.decode("utf-8", "replace"), None
    return error_fields(decoded)


def error_fields(decoded: Any) -> tuple[str, object]:
    """`{"error": {"message", "code"}}`, `{"error": "…"}`, `{"message": "…"}`, `{"detail": …}`: message and code."""
    if not isinstance(decoded, dict):
        return "", None
    error = decoded.get("error", decoded)
    if isinstance(error, str):
        return error, decoded.get("code")
    if not isinstance(error, dict):
        return "", None
    message = error.get("message", error.get("detail", ""))
    code = error.get("code")
    if code is None:
        code = error.get("type")
    return message if isinstance(message, str) else msgspec.json.encode(message).decode("utf-8", "replace"), code


def describe(error: BaseException, endpoint: Endpoint, timeouts: Timeouts) -> str:
    """A connection error or time-out in words, without the URL's credentials."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection to {endpoint.shown} within {timeouts.connect:g} s"
    if isinstance(error, aiohttp.SocketTimeoutError):
        return f"nothing came from {endpoint.shown} for {timeouts.idle:g} s"
    if isinstance(error, TimeoutError):
        return f"no whole answer from {endpoint.shown} within {timeouts.total:g} s"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the host name of {endpoint.shown} is not known; check {endpoint.url_variable}"
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        words = os.strerror(cause.errno) if cause.errno is not None and cause.errno > 0 else type(cause).__name__
        return f"cannot connect to {endpoint.shown} ({words})"
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"{endpoint.shown} broke off in the middle of the answer"
    return f"the connection to {endpoint.shown} broke ({type(error).__name__})"
