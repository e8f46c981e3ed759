"""One link to a gateway that outlives its sockets: requests are answered once, streams go on.

A socket may die at any moment. The link then connects again, asks for every stream from where
it was, and sends again what was not answered: reads are harmless, and a method with a side
effect carries its idempotency key, so that it happens once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable
from typing import Any, Literal

import aiohttp
import msgspec
from msgspec import UNSET

from corral.client.errors import GatewayUnreachable, error_from, is_final
from corral.client.streams import Channels
from corral.protocol.errors import CorralError, InvalidRequest, RateLimited, Unauthorized, Unavailable
from corral.protocol.events import EVENTS
from corral.protocol.frames import Event, Request, Response
from corral.protocol.methods import METHODS, ConnectResult

CONNECT_TIMEOUT = 10.0
HEARTBEAT = 30.0
_MAX_MESSAGE = 64 * 1024 * 1024
_CLOSE_UNAUTHORIZED = 4401
_CLOSE_VERSION = 4409
_MAX_BARREN = 10

State = Literal["lost", "restored"]

_response = msgspec.json.Decoder(Response)
_event = msgspec.json.Decoder(Event)


class _Kind(msgspec.Struct):
    type: str


_kind = msgspec.json.Decoder(_Kind)


class _Pending:
    """A request that is not answered yet. `on_result` runs before any later frame is looked at."""

    def __init__(self, request: Request, on_result: Callable[[Any], None] | None) -> None:
        self.frame = msgspec.json.encode(request).decode()
        self.on_result = on_result
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Link:
    def __init__(
        self,
        address: Callable[[], tuple[str, str]],
        *,
        connect_params: dict[str, Any],
        reconnect_for: float,
        on_state: Callable[[State, str], None] | None,
    ) -> None:
        """`address` says (URL, token) anew for every attempt: a gateway may come back elsewhere."""
        self._address = address
        self._connect_params = connect_params
        self._reconnect_for = reconnect_for
        self._on_state = on_state or _nobody_asked
        self._pending: dict[str, _Pending] = {}
        self.channels = Channels(self)
        self._count = 0
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._dead: Exception | None = None
        self.hello: ConnectResult | None = None

    # ---- life

    async def open(self) -> None:
        """Connect once. Raises GatewayUnreachable, or what the gateway refuses with."""
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT)
        self._http = aiohttp.ClientSession(timeout=timeout, trust_env=False)
        try:
            socket = await self._connect()
        except BaseException:
            await self._http.close()
            raise
        self._socket = socket
        self._keeper = asyncio.get_running_loop().create_task(self._keep(socket), name="corral-link")

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self.channels.close()
        self._end(GatewayUnreachable("the client was closed"))
        if self._socket is not None:
            await self._socket.close()
        if self._http is not None:
            await self._http.close()

    async def _keep(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Read socket after socket until one cannot be had any more."""
        patience = _Patience(self._reconnect_for)
        try:
            while True:
                since = time.monotonic()
                useful, reason = await self._read(socket)
                self._socket = None
                self.channels.socket_lost()
                await socket.close()
                patience.lost(useful or time.monotonic() - since > 5.0)
                self._on_state("lost", reason)
                socket = await self._connect_again(patience)
                self._socket = socket
                self._on_state("restored", "")
                await self._go_on()
        except Exception as error:  # whatever ended it is what every waiting caller gets
            self._socket = None
            self._end(error)

    def _end(self, error: Exception) -> None:
        self._dead = self._dead or error
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(self._dead)
                pending.answer.exception()  # a caller that went away is no cause for a complaint
        self._pending.clear()
        self.channels.end(self._dead)

    # ---- connecting

    async def _connect_again(self, patience: _Patience) -> aiohttp.ClientWebSocketResponse:
        while True:
            await asyncio.sleep(patience.delay())
            try:
                return await self._connect()
            except (GatewayUnreachable, CorralError) as error:
                if is_final(error) or patience.used_up():
                    raise

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        """One socket on which `connect` was answered."""
        assert self._http is not None
        url, token = self._address()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                socket = await self._http.ws_connect(
                    url.rstrip("/") + "/ws", heartbeat=HEARTBEAT, max_msg_size=_MAX_MESSAGE, compress=0
                )
        except aiohttp.WSServerHandshakeError as error:
            raise _refused(error.status, url) from None
        except (aiohttp.ClientError, OSError) as error:
            raise GatewayUnreachable(f"no gateway answers at {url} ({_words(error)})") from None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                params = {**self._connect_params, "auth": {"type": "Bearer", "token": token}}
                await socket.send_str(_encode("connect", "connect", params))
                self.hello = await self._hello(socket, url)
        except (TimeoutError, ConnectionError) as error:
            await socket.close()
            raise GatewayUnreachable(f"{url} did not answer `connect` ({_words(error)})") from None
        except BaseException:
            await socket.close()
            raise
        return socket

    async def _hello(self, socket: aiohttp.ClientWebSocketResponse, url: str) -> ConnectResult:
        message = await socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            if socket.close_code == _CLOSE_UNAUTHORIZED:
                raise Unauthorized(f"{url} does not take this token")
            raise GatewayUnreachable(f"{url} closed the connection ({socket.close_code})")
        try:
            answer = _response.decode(message.data)
            if answer.error is not UNSET:
                raise error_from(answer.error)
            return msgspec.convert(answer.payload, ConnectResult)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"{url} does not speak this protocol: {error}") from None

    # ---- reading

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> tuple[bool, str]:
        """Take frames in until the socket ends; (whether any came, why it ended)."""
        useful = False
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                break
            useful = True
            try:
                self._frame(message.data)
            except msgspec.DecodeError as error:
                raise InvalidRequest(f"the gateway sent a frame that is none of this protocol: {error}") from None
        if socket.close_code == _CLOSE_UNAUTHORIZED:
            raise Unauthorized("the gateway takes this token no longer")
        if socket.close_code == _CLOSE_VERSION:
            raise InvalidRequest("the gateway speaks another version of the protocol")
        return useful, f"connection lost ({socket.close_code or 'no close code'})"

    def _frame(self, text: str) -> None:
        kind = _kind.decode(text).type
        if kind == "event":
            self._deliver(_event.decode(text))
        elif kind == "res":
            self._answer(_response.decode(text))

    def _deliver(self, event: Event) -> None:
        self.channels.deliver(event.payload.get("sessionId"), lambda: _typed(event))

    def _answer(self, response: Response) -> None:
        pending = self._pending.pop(response.id, None)
        if pending is None or pending.answer.done():
            return
        if response.error is not UNSET:
            pending.answer.set_exception(error_from(response.error))
            return
        # Before the next frame: the events that this answer announces find their stream.
        if pending.on_result is not None:
            pending.on_result(response.payload)
        pending.answer.set_result(response.payload)

    # ---- asking

    async def request(self, method: str, params: dict[str, Any], on_result: Callable[[Any], None] | None = None) -> Any:
        """Send a request and wait for its answer, over as many sockets as it takes."""
        return await self.send(self.make(method, params), on_result)

    def make(self, method: str, params: dict[str, Any]) -> Request:
        """A request frame with an id of its own and, where the method needs one, a key."""
        known = METHODS.get(method)
        if known is not None and known.side_effect and "idempotencyKey" not in params:
            params = {**params, "idempotencyKey": _key()}
        self._count += 1
        return Request(type="req", id=f"r{self._count}", method=method, params=params)

    async def send(self, request: Request, on_result: Callable[[Any], None] | None = None) -> Any:
        if self._dead is not None:
            raise self._dead
        pending = _Pending(request, on_result)
        limit = self.hello.limits.max_frame_bytes if self.hello is not None else _MAX_MESSAGE
        if len(pending.frame.encode()) > limit:
            raise InvalidRequest(f"the request is larger than the gateway takes ({limit} bytes)")
        self._pending[request.id] = pending
        try:
            await self._transmit(pending.frame)
            return await pending.answer
        finally:
            self._pending.pop(request.id, None)

    def is_pending(self, request: Request) -> bool:
        return request.id in self._pending

    async def _go_on(self) -> None:
        """On a new socket: send again what was not answered, ask for the streams again."""
        for pending in list(self._pending.values()):
            await self._transmit(pending.frame)
        self.channels.socket_opened()

    async def _transmit(self, frame: str) -> None:
        socket = self._socket
        if socket is not None:
            with contextlib.suppress(ConnectionError):  # the reader sees it too, and all is sent again
                await socket.send_str(frame)


class _Patience:
    """How long to go on trying, and how long to wait before each try."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = 0.0
        self._tries = 0
        self._barren = 0

    def lost(self, useful: bool) -> None:
        """A socket ended. One that brought nothing does not count as success, or a gateway that
        closes every socket at once would be tried for ever. Raises GatewayUnreachable."""
        self._barren = 0 if useful else self._barren + 1
        if self._barren > _MAX_BARREN:
            raise GatewayUnreachable("the gateway closes every connection at once")
        if self._barren <= 1:
            self._tries = 0
            self._until = time.monotonic() + self._seconds

    def delay(self) -> float:
        self._tries += 1
        longest: float = min(2.0, 0.05 * 2 ** min(self._tries - 1, 8))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - it only spreads the load

    def used_up(self) -> bool:
        return time.monotonic() >= self._until


def _typed(event: Event) -> Event:
    """With the payload as its own type. One of a later protocol stays a dict."""
    if event.event in EVENTS:
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.structs.replace(event, payload=msgspec.convert(event.payload, EVENTS[event.event]))
    return event


def _nobody_asked(_state: State, _reason: str) -> None:
    """The `on_state` of a caller that gave none."""


def _words(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and (error.os_error.errno or 0) > 0:
        # Not its own text, which names the address once more, and a Python tuple.
        return os.strerror(error.os_error.errno or 0)
    return str(error) or type(error).__name__


def _encode(request_id: str, method: str, params: dict[str, Any]) -> str:
    return msgspec.json.encode(Request(type="req", id=request_id, method=method, params=params)).decode()


def _key() -> str:
    return f"py-{random.SystemRandom().getrandbits(128):032x}"


def _refused(status: int, url: str) -> Exception:
    if status == 401:
        return Unauthorized(f"{url} does not take this token")
    if status == 429:
        return RateLimited(f"{url} has too many connections from here")
    if status == 503:
        return Unavailable(f"{url} is starting or stopping")
    return GatewayUnreachable(f"{url} answers {status}: it is no gateway, or does not let this host in")
