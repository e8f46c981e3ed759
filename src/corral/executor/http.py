"""http.request: the one way by which a tool's call reaches the network, and the guard on it.

A name is resolved once. Every address it has is judged, and the connection is made to one of exactly
these: there is no second look-up that could answer otherwise. The same is done for each redirect.
Host header, TLS server name and certificate check keep the name. No proxy, cookie jar or netrc is used.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import socket
import threading
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from corral.executor import addresses
from corral.executor.api import FULL_OUTPUT_LIMIT, CallContext
from corral.executor.catalogue import HttpRequest
from corral.executor.output import Result
from corral.protocol.errors import ToolExecFailed

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""(name, port) to all addresses of that name. Raises OSError."""

MAX_REDIRECTS = 5
MAX_BODY_BYTES = FULL_OUTPUT_LIMIT // 2
TOTAL_S = 60.0
CONNECT_S = 15.0
_CHUNK = 64 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NOT_YOURS = frozenset(
    {
        "host",
        "content-length",
        "transfer-encoding",
        "connection",
        "keep-alive",
        "upgrade",
        "te",
        "trailer",
        "expect",
        "proxy-authorization",
        "proxy-connection",
        "accept-encoding",
    }
)
"""Headers that say where a request goes or how it is framed: never the model's to set."""
_SECRETS = frozenset({"authorization", "cookie"})
_SHOWN = (
    "content-type",
    "content-length",
    "content-encoding",
    "content-language",
    "location",
    "last-modified",
    "etag",
    "retry-after",
    "www-authenticate",
    "allow",
    "link",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
)
_NOT_CHARSETS = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "utf-7"})


def parse_url(text: str) -> URL:
    """An http(s) URL. Raises ToolExecFailed in words for the model.

    The parser is the one that the client connects with, so that there are no two opinions on the host.
    """
    if any(character <= " " or character in "\\\x7f" for character in text):
        raise ToolExecFailed("$.url: may not contain spaces, control characters or backslashes")
    try:
        url = URL(text)
        host, port = url.raw_host, url.port
    except ValueError as error:
        raise ToolExecFailed("$.url: not a URL") from error
    if url.scheme not in ("http", "https"):
        raise ToolExecFailed("$.url: only http and https are possible")
    if not host or not port:
        raise ToolExecFailed("$.url: has no host")
    if url.raw_user is not None or url.raw_password is not None:
        raise ToolExecFailed("$.url: may not contain a user name or password; use an Authorization header")
    return url.with_fragment(None)


class Fetcher:
    """Makes requests. `resolve` and `allowed_private` come from the server, never from a call."""

    def __init__(
        self, *, allowed_private: frozenset[tuple[str, int]] = frozenset(), resolve: Resolve | None = None
    ) -> None:
        self._allowed_private = frozenset((host.lower(), port) for host, port in allowed_private)
        self._resolve = resolve or Names()

    async def request(self, args: HttpRequest, context: CallContext) -> Result:  # noqa: ARG002 - no folder needed
        """Carry out one call. Raises ToolExecFailed, also after `TOTAL_S`; the driver holds it to the call's time."""
        method = args.method or "GET"
        headers = _checked(args.headers or {})
        body = args.body.encode() if args.body is not None else None
        url = parse_url(args.url)
        try:
            async with asyncio.timeout(TOTAL_S):
                return await self._follow(method, url, headers, body)
        except TimeoutError as error:
            raise ToolExecFailed(f"the server did not answer within {TOTAL_S:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            log.info("http.request failed: %r", error, extra={"action": "http.failed"})
            raise ToolExecFailed(f"the request failed: {_reason(error)}") from error

    async def close(self) -> None:
        """Nothing is kept open between calls."""

    async def _follow(self, method: str, url: URL, headers: dict[str, str], body: bytes | None) -> Result:
        trail: list[str] = []
        for _ in range(MAX_REDIRECTS + 1):
            pinned = await self._addresses(url)
            connector = aiohttp.TCPConnector(
                resolver=_Pinned(pinned), use_dns_cache=False, force_close=True, family=socket.AF_UNSPEC
            )
            async with (
                aiohttp.ClientSession(
                    connector=connector,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                    trust_env=False,
                    auto_decompress=False,
                    headers={"User-Agent": "corral", "Accept": "*/*", "Accept-Encoding": "identity"},
                ) as session,
                session.request(method, url, headers=headers, data=body, allow_redirects=False) as response,
            ):
                target = response.headers.get("Location")
                if response.status not in _REDIRECTS or target is None:
                    return Result(text=await _text(response, trail))
                to = _redirected(url, target)
                if (response.status == 303 and method != "HEAD") or (
                    response.status in (301, 302) and method == "POST"
                ):
                    method, body = "GET", None
                    headers = {
                        name: value for name, value in headers.items() if not name.lower().startswith("content-")
                    }
            if to.origin() != url.origin():
                headers = {name: value for name, value in headers.items() if name.lower() not in _SECRETS}
            trail.append(str(to))
            url = to
        raise ToolExecFailed(f"more than {MAX_REDIRECTS} redirects")

    async def _addresses(self, url: URL) -> list[str]:
        """All addresses of the URL's host, each of them judged. Raises ToolExecFailed."""
        host, port = url.raw_host, url.port
        if host is None or port is None:
            raise ToolExecFailed("$.url: has no host")
        name = host.rstrip(".").lower()
        try:
            found = [str(ip_address(name))]
        except ValueError:
            try:
                found = await self._resolve(host, port)
            except (OSError, UnicodeError) as error:
                raise ToolExecFailed(f"$.url: the name {host} cannot be resolved") from error
        if not found:
            raise ToolExecFailed(f"$.url: the name {host} has no address")
        if (name, port) not in self._allowed_private:
            for address in found:
                why = addresses.refusal(address)
                if why is not None:
                    raise ToolExecFailed(
                        f"$.url: {host} is not a public address ({why}); requests to private and local "
                        "addresses are refused"
                    )
        return found


class _Pinned(AbstractResolver):
    """Gives the addresses that were judged, whatever is asked."""

    def __init__(self, found: list[str]) -> None:
        self._found = found

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - both families were judged
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._found
        ]

    async def close(self) -> None:
        """Holds nothing."""


class Names:
    """Looks names up by the system, each in a thread of its own, so many at once.

    The loop's own look-ups have a few threads in all (libuv's), which the clients of models need: names whose servers
    keep silent, each for half a minute, would keep every run from its model. Daemons, for which no exit waits.
    """

    def __init__(self, at_once: int = 8) -> None:
        self._free = asyncio.Semaphore(at_once)

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses. Raises OSError."""
        loop = asyncio.get_running_loop()
        await self._free.acquire()
        found: asyncio.Future[list[str]] = loop.create_future()

        def answer(addresses: list[str], error: Exception | None) -> None:
            # Not before: who has given up waiting has a thread at work all the same.
            self._free.release()
            if found.done():
                return
            if error is not None:
                found.set_exception(error)
            else:
                found.set_result(addresses)

        def look() -> None:
            addresses, problem = [], None
            try:
                infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
            except Exception as error:  # whatever it is, it is the caller's
                problem = error
            # If the loop is closed, nobody waits any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(answer, addresses, problem)

        threading.Thread(target=look, name="corral-name", daemon=True).start()
        return await found


def _checked(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if name.lower() in _NOT_YOURS:
            raise ToolExecFailed(f"$.headers.{name}: this header is set by the server")
        if any(character in "\r\n\0" for character in value):
            raise ToolExecFailed(f"$.headers.{name}: may not contain line breaks")
    return headers


def _redirected(url: URL, target: str) -> URL:
    try:
        return parse_url(str(url.join(URL(target))))
    except ValueError as error:
        raise ToolExecFailed("the server redirects to something that is not a URL") from error
    except ToolExecFailed as error:
        raise ToolExecFailed(f"the server redirects to an address that is refused: {error.message}") from error


async def _text(response: aiohttp.ClientResponse, trail: list[str]) -> str:
    lines = [f"HTTP {response.status} {response.reason or ''}".rstrip()]
    lines += [f"redirected to {url}" for url in trail]
    lines += [f"{name}: {value}" for name in _SHOWN for value in response.headers.getall(name, [])]
    raw = bytearray()
    cut = False
    async for chunk in response.content.iter_chunked(_CHUNK):
        raw += chunk[: MAX_BODY_BYTES - len(raw)]
        if len(raw) >= MAX_BODY_BYTES:
            cut = True
            break
    body, cut_short = _decoded(bytes(raw), response.headers.get("Content-Encoding", "").strip().lower())
    if cut or cut_short:
        lines.append(f"[only the first {len(body)} bytes of the body were read]")
    lines += ["", _body_text(body, response.charset)]
    return "\n".join(lines)


def _decoded(body: bytes, encoding: str) -> tuple[bytes, bool]:
    """`body` without its Content-Encoding, and whether that was cut: a small body may unpack to a huge one."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return body, False
    # 32 finds out by itself whether it is gzip or zlib.
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        plain = unpack.decompress(body, MAX_BODY_BYTES)
    except zlib.error:
        return body, False
    return plain, bool(unpack.unconsumed_tail)


def _body_text(body: bytes, charset: str | None) -> str:
    if b"\0" in body[:8192] and "16" not in (charset or "") and "32" not in (charset or ""):
        return f"[binary body of {len(body)} bytes]"
    try:
        known = codecs.lookup(charset or "utf-8").name
        if known in _NOT_CHARSETS:
            known = "utf-8"
        return body.decode(known, "replace")
    except LookupError:
        return body.decode("utf-8", "replace")


def _reason(error: Exception) -> str:
    """What went wrong, in words without addresses or paths."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return "the server's certificate was not accepted"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection to the server"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer broke off"
    return "the server's answer could not be understood"
