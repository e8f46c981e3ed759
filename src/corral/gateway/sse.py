"""`GET /v1/sessions/{id}/events`: one session's events as server-sent events.

The same feed and the same outbox as on a WebSocket, with one subscription that is there from
the start. What is written differs, and the end: a stream has no close code, so the last
thing it gets is a comment with the code, and the client comes again with `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Coroutine
from typing import Any

from aiohttp import hdrs, web
from msgspec import Struct

from corral.gateway.auth import Known
from corral.gateway.dispatch import check_role
from corral.gateway.door import PREFLIGHT, Door, Refused
from corral.gateway.feeds import ConnectionFeeds, FeedSystem
from corral.gateway.frames import EventFrame
from corral.gateway.handshake import CloseCode
from corral.gateway.metrics import GatewayMetrics
from corral.gateway.outbox import Outbox
from corral.gateway.peers import Peers
from corral.gateway.subscriptions import StartingPoint, starting_point
from corral.governance.caller import Caller
from corral.ids import Ids
from corral.protocol.errors import Forbidden, InvalidRequest, NotFound, Unavailable
from corral.protocol.methods import METHODS
from corral.storage.api import StoreUnavailable

logger = logging.getLogger(__name__)

_SESSION_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_VERSION = re.compile(r"[0-9]{1,18}")
_LAST_EVENT_ID = "Last-Event-ID"
_HEADERS = {hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
# The writer lets others run after so many bytes that the kernel took at once.
_WRITE_BURST = 256 * 1024


class Stream:
    """One stream from its first event to its end."""

    transport = "sse"
    # A stream carries no requests.
    effects_in_flight = 0

    def __init__(
        self, system: FeedSystem, metrics: GatewayMetrics, caller: Caller, *, stream_id: str, known: Known
    ) -> None:
        options = system.options
        self.id = stream_id
        self.token_hash = known.digest
        self._ms_left = known.ms_left
        self._options = options
        self._metrics = metrics
        self._caller = caller
        self.outbox = Outbox(options.outbox_bytes, options.outbox_frames, self.too_slow, metrics.sent)
        self._feeds = ConnectionFeeds(system, self, lambda _session_id: self.begin_close(CloseCode.NORMAL))
        self._tasks: asyncio.TaskGroup | None = None
        self._helpers: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._close_code = CloseCode.NORMAL

    async def run(self, request: web.Request, session_id: str, start: StartingPoint) -> web.StreamResponse:
        """Send the session's events until the stream is closed or the client is gone."""
        response = web.StreamResponse(headers=_HEADERS)
        transport = request.transport
        about = {"stream": self.id, "session": session_id, "tenant": self._caller.tenant_id}
        logger.info("stream opened", extra={"action": "stream.opened", **about, "after": start.after})
        expiry = self._expiry()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                # It follows before the head goes out: who has the head misses nothing from then on.
                self._feeds.follow(self._caller, session_id, start.workspace_id, start.after, by_run=False).go()
                writer = tasks.create_task(self._write(request, response))
                try:
                    await self._closing.wait()
                    await self._wind_up(writer)
                finally:
                    for task in (writer, *self._helpers):
                        task.cancel()
        finally:
            if expiry is not None:
                expiry.cancel()
            self._feeds.close()
            self.outbox.discard()
            if transport is not None and not response._eof_sent:
                # The rest cannot be had any more, and the client must not take what it has for the whole.
                transport.abort()
            code = int(self._close_code)
            self._metrics.closed(self.transport, code)
            logger.info("stream closed", extra={"action": "stream.closed", **about, "code": code})
        return response

    def begin_close(self, code: CloseCode) -> None:
        """End the stream, for the reason of `code` if nobody gave one before. Does not wait."""
        if not self._closing.is_set():
            self._close_code = code
            self._closing.set()

    def too_slow(self) -> None:
        """The client does not read what it asked for: it gets no more here and may come again."""
        self.outbox.discard()
        self.begin_close(CloseCode.TOO_SLOW)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the stream; a failure of it ends the stream."""
        if self._tasks is None or self._closing.is_set():
            work.close()
            return
        task = self._tasks.create_task(self._guarded(work))
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    def _expiry(self) -> asyncio.TimerHandle | None:
        if self._ms_left is None:
            return None
        loop = asyncio.get_running_loop()
        return loop.call_later(self._ms_left / 1000, self.begin_close, CloseCode.UNAUTHORIZED)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            about = {"action": "stream.helper_failed", "stream": self.id, "tenant": self._caller.tenant_id}
            logger.exception("stream's helper failed", extra=about)
            self.begin_close(CloseCode.INTERNAL)

    async def _wind_up(self, writer: asyncio.Task[None]) -> None:
        """What waits still goes out, if the client takes it soon."""
        self._feeds.close()
        self.outbox.finish()
        restarting = self._close_code is CloseCode.RESTARTING
        await asyncio.wait({writer}, timeout=self._options.drain_grace if restarting else self._options.close_grace)

    async def _write(self, request: web.Request, response: web.StreamResponse) -> None:
        loop = asyncio.get_running_loop()
        written = 0
        try:
            await response.prepare(request)
            comment_at = loop.time() + self._options.stream_comment
            while await self._news(comment_at):
                if loop.time() >= comment_at:
                    await response.write(b":\n\n")
                    comment_at = loop.time() + self._options.stream_comment
                while loop.time() < comment_at and (item := self.outbox.take_item()) is not None:
                    text = item.as_stream() if isinstance(item, EventFrame) else item
                    await response.write(text)
                    written += len(text)
                    if written > _WRITE_BURST:
                        written = 0
                        await asyncio.sleep(0)
            await response.write(b": closed %d\n\n" % self._close_code)
            await response.write_eof()
        except ConnectionError:
            # The client is gone.
            self.begin_close(CloseCode.NORMAL)

    async def _news(self, until: float) -> bool:
        """Wait for something to write, until the time of the next comment; False when there will be no more."""
        try:
            async with asyncio.timeout_at(until):
                return await self.outbox.wait()
        except TimeoutError:
            return True


class StreamServices(Struct, kw_only=True, frozen=True):
    """What every stream uses of its gateway."""

    door: Door
    feeds: FeedSystem
    metrics: GatewayMetrics
    peers: Peers
    ids: Ids
    draining: asyncio.Event


class Streams:
    """The route."""

    def __init__(self, services: StreamServices) -> None:
        self._services = services

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Who asks is settled before anything else is looked at; an error is answered before a stream begins."""
        services = self._services
        if request.method == hdrs.METH_OPTIONS:
            return web.Response(status=204, headers=PREFLIGHT)
        revocations = services.peers.revocations
        try:
            stream, session_id, start = await self._open(request)
        except Refused as refused:
            return services.door.refusal(request, refused)
        with services.peers.holding(stream):
            if services.peers.revocations != revocations:
                services.peers.look_again()
            if services.draining.is_set():
                stream.begin_close(CloseCode.RESTARTING)
            return await stream.run(request, session_id, start)

    async def _open(self, request: web.Request) -> tuple[Stream, str, StartingPoint]:
        services = self._services
        known = await services.door.admit(request)
        principal = known.principal
        if request.method != hdrs.METH_GET:
            raise Refused(405, InvalidRequest("the events of a session are read with GET"), allow="GET, OPTIONS")
        workspace = principal.workspace_ids[0] if principal.workspace_ids else ""
        stream_id = services.ids.new("conn")
        caller = Caller(principal=principal, workspace_id=workspace, trace_id=stream_id)
        session_id = request.match_info["session_id"]
        try:
            if services.draining.is_set():
                raise Unavailable("the server is shutting down: try again in a moment")
            check_role(METHODS["events.subscribe"], principal)
            after, field = resume_from(request)
            if _SESSION_ID.fullmatch(session_id) is None:
                raise _no_such_session()
            start = await starting_point(services.feeds, caller, session_id, after, field)
        except NotFound:
            raise Refused(404, _no_such_session()) from None
        except Forbidden as error:
            raise Refused(403, error) from None
        except InvalidRequest as error:
            raise Refused(400, error) from None
        except (Unavailable, StoreUnavailable) as error:
            raise Refused(503, error) from None
        stream = Stream(services.feeds, services.metrics, caller, stream_id=stream_id, known=known)
        return stream, session_id, start


def resume_from(request: web.Request) -> tuple[int | None, str]:
    """The version after which to begin, None for from now, and the name of what said so.

    Where there are both, `Last-Event-ID` holds: a browser that comes again sends it with the
    address that it began with, whose `after` lies further back. Both must be right, though.
    Raises InvalidRequest.
    """
    asked = _one(request.query.getall("after", []), "after")
    last = _one(request.headers.getall(_LAST_EVENT_ID, []), _LAST_EVENT_ID)
    return (last, _LAST_EVENT_ID) if last is not None else (asked, "after")


def _one(given: list[str], field: str) -> int | None:
    if not given:
        return None
    if len(given) > 1 or _VERSION.fullmatch(given[0]) is None:
        raise InvalidRequest(f"{field} must be one stateVersion to go on from, an integer of 0 or more")
    return int(given[0])


def _no_such_session() -> NotFound:
    return NotFound("there is no such session that you may see")
