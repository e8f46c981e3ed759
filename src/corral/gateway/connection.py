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
from corral.gateway.handshake import CloseCode, Handshake, close_code_of
from corral.gateway.limits import RequestLimiter
from corral.gateway.metrics import GatewayMetrics
from corral.gateway.options import GatewayOptions
from corral.gateway.outbox import Outbox
from corral.gateway.websocket import Socket
from corral.protocol.errors import CorralError, InternalError, InvalidRequest, RateLimited, Unauthorized
from corral.protocol.types import Principal

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


class _Known(Struct, kw_only=True, frozen=True):
    """Who was let in, with what."""

    principal: Principal
    workspace_id: str
    token_hash: str


class Connection:
    """Reads requests, answers them, and sends the events of what its client follows.

    `on_connected` is called once, when the client is known.

    Most connections do nothing most of the time, thousands of them. So the task that calls `run` is the one that
    reads, another writes while something waits to be written, and what only a request needs is made by the first.
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
        self._on_connected: Callable[[], None] | None = on_connected
        self.id = connection_id
        self.state = ConnectionState.AWAITING_CONNECT
        self.admitted: _Known | None = None
        self.effects_in_flight = 0
        self.outbox = Outbox(
            options.outbox_bytes, options.outbox_frames, self.too_slow, services.metrics.sent, self._wake_writer
        )
        self._feeds = ConnectionFeeds(services.feeds, self)
        self._bad_frames = 0
        self._in_flight: asyncio.Semaphore | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._helpers: set[asyncio.Task[None]] = set()
        self._writer: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._close_code = CloseCode.NORMAL
        self._closing = False
        # That of `run`, while it reads; cancelled to tell it that the connection is to be closed.
        self._reader: asyncio.Task[Any] | None = None
        self._running = False

    transport = "websocket"

    @property
    def token_hash(self) -> str | None:
        """Of the token that it was let in with."""
        return self.admitted.token_hash if self.admitted is not None else None

    # ---- life

    async def run(self) -> None:
        """Serve the client until the connection ends, for whichever reason; then leave nothing behind."""
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._services.options.connect_timeout, self._connect_timed_out)
        self._running = True
        try:
            try:
                await self._read_until_told()
                await self._wind_up()
            finally:
                self._running = False
                await self._end_tasks()
        finally:
            self.begin_close(CloseCode.INTERNAL)
            self._stop_deadline()
            self._feeds.close()
            self.outbox.discard()
            try:
                await self._socket.finish(self._close_code, self._grace)
            finally:
                self._move(ConnectionState.CLOSED)
                self._services.metrics.closed(self.transport, int(self._close_code))
                logger.info("connection closed", extra=self._about("connection.closed", code=int(self._close_code)))

    async def _read_until_told(self) -> None:
        """Read until the connection is to be closed, whoever says so."""
        task = self._reader = asyncio.current_task()
        try:
            await self._read()
        except asyncio.CancelledError:
            # `begin_close` cancels once. Whatever else cancels this task wants more than the end of the reading.
            if not self._closing or task is None or task.uncancel() > 0:
                raise
        finally:
            self._reader = None

    async def _end_tasks(self) -> None:
        """Cancel what runs for the connection, and wait for it."""
        tasks = {*self._requests, *self._helpers}
        if self._writer is not None:
            tasks.add(self._writer)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def begin_close(self, code: CloseCode) -> None:
        """Take no more requests and close, with `code` if nobody closed before. Does not wait."""
        if self.state in (ConnectionState.AWAITING_CONNECT, ConnectionState.CONNECTED):
            self._close_code = code
            self._move(ConnectionState.CLOSING)
            self._closing = True
            if self._reader is not None and self._reader is not asyncio.current_task():
                self._reader.cancel()

    def too_slow(self) -> None:
        """The client does not read what it asked for: it gets no more here and may resume elsewhere by its cursors."""
        self.outbox.discard()
        self.begin_close(CloseCode.TOO_SLOW)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the connection; a failure of it ends the connection."""
        if not self._running or self._closing:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(self._guarded(work))
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    async def _wind_up(self) -> None:
        """What was asked and answered before the end still goes out, if the client takes it soon."""
        if self._close_code is CloseCode.RESTARTING and self._requests:
            await asyncio.wait(self._requests, timeout=self._services.options.drain_grace)
        self._feeds.close()
        self.outbox.finish()
        # While something waits there is a writer.
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=self._grace)

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

    def _wake_writer(self) -> None:
        """The outbox has something where there was nothing."""
        if self._writer is None and self._running:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        """Write until nothing waits any more."""
        try:
            while frames := self._next_frames():
                await self._socket.send_texts(frames)
                # Others are served between two bursts, however much waits here.
                await asyncio.sleep(0)
        except ConnectionError:
            self.outbox.discard()
            self.begin_close(CloseCode.NORMAL)
        except Exception:
            logger.exception("writing failed", extra=self._about("connection.write_failed"))
            self.outbox.discard()
            self.begin_close(CloseCode.INTERNAL)
        finally:
            # In the same step as the look that found nothing: what comes next wakes another.
            self._writer = None

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
            while not self._closing:
                try:
                    message = await self._socket.receive()
                except ConnectionError:
                    # The peer was gone before it could be told what it broke, or that its ping arrived.
                    self.begin_close(CloseCode.NORMAL)
                    return
                if message.type is WSMsgType.TEXT:
                    await self._take(message.data)
                elif message.type is WSMsgType.BINARY:
                    self.begin_close(CloseCode.BINARY)
                else:
                    # The peer closed, or broke the protocol: the socket has said so to it.
                    self.begin_close(CloseCode.NORMAL)
                del message  # the next one may be long in coming
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
        self._stop_deadline()
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
        # Without the answer: once given, it is of no more use.
        self.admitted = _Known(
            principal=admitted.principal, workspace_id=admitted.workspace_id, token_hash=admitted.token_hash
        )
        if admitted.seconds_left is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(admitted.seconds_left, self.begin_close, CloseCode.UNAUTHORIZED)
        connected, self._on_connected = self._on_connected, None
        if connected is not None:
            connected()
        Answer(frame.id, self.outbox.put).give(msgspec.json.encode(admitted.result))
        logger.info("connected", extra=self._about("connection.connected"))

    async def _start(self, frame: RequestFrame) -> None:
        """Begin a request and let the next be read; handlers start in the order in which their frames came."""
        if self._in_flight is None:
            self._in_flight = asyncio.Semaphore(self._services.options.in_flight)
        await self._in_flight.acquire()
        if not self._running or self._closing:
            return
        effect = is_side_effect(frame.method)
        self.effects_in_flight += effect
        task = asyncio.get_running_loop().create_task(self._handle(frame))
        self._requests.add(task)
        task.add_done_callback(lambda done: self._done(done, effect))

    def _done(self, task: asyncio.Task[None], effect: bool) -> None:
        self._requests.discard(task)
        self.effects_in_flight -= effect
        if self._in_flight is not None:
            self._in_flight.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            # The dispatcher answers whatever happens; what gets past it is a mistake in it.
            logger.error("a request failed", exc_info=error, extra=self._about("connection.request_failed"))
            self.begin_close(CloseCode.INTERNAL)

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
