"""One WebSocket connection from its upgrade to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any

import msgspec
from aiohttp import WSMsgType
from msgspec import Struct

from corral.gateway.dispatch import Answer, Dispatcher, is_side_effect
from corral.gateway.feeds import ConnectionFeeds, FeedSystem
from corral.gateway.frames import BadFrame, RequestFrame, error_frame, read_request
from corral.gateway.handshake import Admitted, CloseCode, Handshake, close_code_of
from corral.gateway.limits import RequestLimiter
from corral.gateway.metrics import GatewayMetrics
from corral.gateway.options import GatewayOptions
from corral.gateway.outbox import Outbox
from corral.gateway.websocket import Socket
from corral.protocol.errors import CorralError, InternalError, InvalidRequest, RateLimited, Unauthorized

logger = logging.getLogger(__name__)

# The writer lets others run after so many bytes that the kernel took at once.
_WRITE_BURST = 64 * 1024


class ConnectionState(Enum):
    AWAITING_CONNECT = "awaiting_connect"
    CONNECTED = "connected"
    CLOSING = "closing"
    CLOSED = "closed"


_TRANSITIONS: dict[ConnectionState, frozenset[ConnectionState]] = {
    ConnectionState.AWAITING_CONNECT: frozenset({ConnectionState.CONNECTED, ConnectionState.CLOSING}),
    ConnectionState.CONNECTED: frozenset({ConnectionState.CLOSING}),
    ConnectionState.CLOSING: frozenset({ConnectionState.CLOSED}),
    ConnectionState.CLOSED: frozenset(),
}


class ConnectionServices(Struct, kw_only=True, frozen=True):
    """What every connection uses of its gateway."""

    dispatcher: Dispatcher
    handshake: Handshake
    feeds: FeedSystem
    options: GatewayOptions
    limiter: RequestLimiter
    metrics: GatewayMetrics


class Connection:
    """Reads requests, answers them, and sends the events of what its client follows.

    `on_connected` is called once, when the client is known.
    """

    def __init__(
        self,
        services: ConnectionServices,
        socket: Socket,
        *,
        connection_id: str,
        address: str,
        header_token: str | None,
        on_connected: Callable[[], None],
    ) -> None:
        options = services.options
        self._services = services
        self._socket = socket
        self._address = address
        self._header_token = header_token
        self._on_connected = on_connected
        self.id = connection_id
        self.state = ConnectionState.AWAITING_CONNECT
        self.admitted: Admitted | None = None
        self.effects_in_flight = 0
        self.outbox = Outbox(options.outbox_bytes, options.outbox_frames, self.too_slow, services.metrics.sent)
        self._feeds = ConnectionFeeds(services.feeds, self)
        self._bad_frames = 0
        self._in_flight = asyncio.Semaphore(options.in_flight)
        self._requests: set[asyncio.Task[None]] = set()
        self._helpers: set[asyncio.Task[None]] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._close_code = CloseCode.NORMAL
        self._closing = asyncio.Event()

    transport = "websocket"

    @property
    def token_hash(self) -> str | None:
        """Of the token that it was let in with."""
        return self.admitted.token_hash if self.admitted is not None else None

    # ---- life

    async def run(self) -> None:
        """Serve the client until the connection ends, for whichever reason; then leave nothing behind."""
        options = self._services.options
        self._deadline = asyncio.get_running_loop().call_later(options.connect_timeout, self._connect_timed_out)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                writer = tasks.create_task(self._write())
                reader = tasks.create_task(self._read())
                try:
                    await self._closing.wait()
                    await self._wind_up(reader, writer)
                finally:
                    for task in (reader, writer, *self._requests, *self._helpers):
                        task.cancel()
        finally:
            self.begin_close(CloseCode.INTERNAL)
            self._deadline.cancel()
            self._feeds.close()
            self.outbox.discard()
            try:
                await self._socket.finish(self._close_code, self._grace)
            finally:
                self._move(ConnectionState.CLOSED)
                self._services.metrics.closed(self.transport, int(self._close_code))
                logger.info("connection closed", extra=self._about("connection.closed", code=int(self._close_code)))

    def begin_close(self, code: CloseCode) -> None:
        """Take no more requests and close, with `code` if nobody closed before. Does not wait."""
        if self.state in (ConnectionState.AWAITING_CONNECT, ConnectionState.CONNECTED):
            self._close_code = code
            self._move(ConnectionState.CLOSING)
            self._closing.set()

    def too_slow(self) -> None:
        """The client does not read what it asked for: it gets no more here and may resume elsewhere by its cursors."""
        self.outbox.discard()
        self.begin_close(CloseCode.TOO_SLOW)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the connection; a failure of it ends the connection."""
        if self._tasks is None or self._closing.is_set():
            work.close()
            return
        task = self._tasks.create_task(self._guarded(work))
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    async def _wind_up(self, reader: asyncio.Task[None], writer: asyncio.Task[None]) -> None:
        """What was asked and answered before the end still goes out, if the client takes it soon."""
        reader.cancel()
        if self._close_code is CloseCode.RESTARTING and self._requests:
            await asyncio.wait(self._requests, timeout=self._services.options.drain_grace)
        self._feeds.close()
        self.outbox.finish()
        await asyncio.wait({writer}, timeout=self._grace)

    @property
    def _grace(self) -> float:
        """How long the client is waited for: a server that goes down has less time than any."""
        options = self._services.options
        return options.drain_grace if self._close_code is CloseCode.RESTARTING else options.close_grace

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            logger.exception("connection's helper failed", extra=self._about("connection.helper_failed"))
            self.begin_close(CloseCode.INTERNAL)

    def _connect_timed_out(self) -> None:
        logger.info("no connect in time", extra=self._about("connection.connect_timeout"))
        self.begin_close(CloseCode.CONNECT_TIMEOUT)

    def _move(self, to: ConnectionState) -> None:
        if to not in _TRANSITIONS[self.state]:
            raise RuntimeError(f"a connection that is {self.state.value} cannot become {to.value}")
        self.state = to

    def _about(self, action: str, **more: Any) -> dict[str, Any]:
        tenant = self.admitted.principal.tenant_id if self.admitted is not None else None
        return {"action": action, "connection": self.id, "tenant": tenant, **more}

    # ---- writing

    async def _write(self) -> None:
        try:
            while await self.outbox.wait():
                while frames := self._next_frames():
                    await self._socket.send_texts(frames)
                    # Others are served between two bursts, however much waits here.
                    await asyncio.sleep(0)
        except ConnectionError:
            self.begin_close(CloseCode.NORMAL)

    def _next_frames(self) -> list[bytes]:
        """What waits now, up to a burst's size."""
        frames: list[bytes] = []
        size = 0
        while size < _WRITE_BURST and (frame := self.outbox.take()) is not None:
            frames.append(frame)
            size += len(frame)
        return frames

    # ---- reading

    async def _read(self) -> None:
        try:
            while not self._closing.is_set():
                message = await self._socket.receive()
                if message.type is WSMsgType.TEXT:
                    await self._take(message.data)
                elif message.type is WSMsgType.BINARY:
                    self.begin_close(CloseCode.BINARY)
                else:
                    # The peer closed, or broke the protocol: the socket has said so to it.
                    self.begin_close(CloseCode.NORMAL)
        except Exception:
            logger.exception("reading failed", extra=self._about("connection.read_failed"))
            self.begin_close(CloseCode.INTERNAL)

    async def _take(self, text: str) -> None:
        """One text frame. Returns when it may be followed by the next."""
        waiting = self.state is ConnectionState.AWAITING_CONNECT
        if waiting and _bytes(text) > self._services.options.preauth_frame_bytes:
            self.begin_close(CloseCode.TOO_BIG)
            return
        try:
            frame = read_request(text)
        except BadFrame as error:
            if self._within_rate(error.frame_id, ""):
                self._refuse(error.frame_id, error)
            self._bad_frames += 1 if error.counts else 0
            if self._bad_frames >= self._services.options.bad_frames:
                self.begin_close(CloseCode.POLICY)
            return
        self._bad_frames = 0
        # `connect` from nobody known has limits of its own: failed ones are counted, good ones are welcome.
        if not (waiting and frame.method == "connect") and not self._within_rate(frame.id, frame.method):
            return
        if waiting and frame.method != "connect":
            self._refuse(frame.id, Unauthorized("the first request must be connect"))
        elif waiting:
            await self._connect(frame)
        elif frame.method == "connect":
            self._refuse(frame.id, InvalidRequest("this connection is connected already"))
        else:
            await self._start(frame)

    async def _connect(self, frame: RequestFrame) -> None:
        """The handshake. Requests behind it wait unread, so they find it done."""
        if self._deadline is not None:
            self._deadline.cancel()
        try:
            admitted = await self._services.handshake.admit(frame.params, self._header_token, self._address, self.id)
        except CorralError as error:
            logger.info("connect refused", extra=self._about("connection.refused", code=error.code.value))
            self._refuse(frame.id, error)
            self.begin_close(close_code_of(error))
            return
        except Exception:
            logger.exception("connect failed", extra=self._about("connection.connect_failed"))
            self._refuse(frame.id, InternalError("something went wrong in the server"))
            self.begin_close(CloseCode.INTERNAL)
            return
        if self.state is not ConnectionState.AWAITING_CONNECT:
            return
        self._move(ConnectionState.CONNECTED)
        self.admitted = admitted
        if admitted.seconds_left is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(admitted.seconds_left, self.begin_close, CloseCode.UNAUTHORIZED)
        self._on_connected()
        Answer(frame.id, self.outbox.put).give(msgspec.json.encode(admitted.result))
        logger.info("connected", extra=self._about("connection.connected"))

    async def _start(self, frame: RequestFrame) -> None:
        """Begin a request and let the next be read; handlers start in the order in which their frames came."""
        await self._in_flight.acquire()
        if self._tasks is None or self._closing.is_set():
            return
        effect = is_side_effect(frame.method)
        self.effects_in_flight += effect
        task = self._tasks.create_task(self._handle(frame))
        self._requests.add(task)
        task.add_done_callback(lambda done: self._done(done, effect))

    def _done(self, task: asyncio.Task[None], effect: bool) -> None:
        self._requests.discard(task)
        self.effects_in_flight -= effect
        self._in_flight.release()

    async def _handle(self, frame: RequestFrame) -> None:
        admitted = self.admitted
        if admitted is None:
            raise RuntimeError("a request was started before connect")
        answer = Answer(frame.id, self.outbox.put)
        await self._services.dispatcher.handle(frame, admitted.principal, admitted.workspace_id, answer, self._feeds)

    def _within_rate(self, frame_id: str, method: str) -> bool:
        """Count a frame for its sender; False, and it is answered, if that has used its requests up."""
        limiter = self._services.limiter
        try:
            if self.admitted is not None:
                limiter.known(self.admitted.principal)
            else:
                limiter.unknown(self._address)
        except RateLimited as error:
            self._services.metrics.request(method, error.code.value, 0.0)
            logger.debug("too many requests", extra=self._about("connection.rate_limited"))
            self._refuse(frame_id, error)
            return False
        return True

    def _refuse(self, frame_id: str, error: CorralError) -> None:
        self.outbox.put(error_frame(frame_id, error, self._services.dispatcher.new_trace_id()))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
