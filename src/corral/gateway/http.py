"""The HTTP side of the port: the Host and Origin guard, `/rpc`, health and readiness, the upgrade to WebSocket."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from corral.clock import Clock
from corral.gateway.auth import bearer_token
from corral.gateway.dispatch import Answer, Dispatcher
from corral.gateway.door import PREFLIGHT, Door, Refused, for_pages, route_of, rpc_answer
from corral.gateway.frames import BadFrame, RequestFrame, read_request
from corral.gateway.handshake import Handshake
from corral.gateway.limits import address_key
from corral.gateway.metrics import GatewayMetrics
from corral.gateway.options import GatewayOptions
from corral.gateway.origin import OriginPolicy
from corral.gateway.runs import RunMethods
from corral.gateway.strangers import answered
from corral.governance.caller import Caller
from corral.ids import Ids
from corral.protocol.errors import ErrorCode, Forbidden, InvalidRequest, NotFound
from corral.protocol.methods import AgentRunParams, AgentRunResult
from corral.protocol.types import Principal
from corral.storage.api import Store, StoreUnavailable

logger = logging.getLogger(__name__)

_JSON = "application/json"
_CODINGS = frozenset({"identity", "gzip", "x-gzip", "deflate"})
"""What a body may be coded as. Unpacked here and not by aiohttp, which would refuse what it does not know
before it is asked who calls and for what."""


def guard(policy: OriginPolicy, door: Door) -> Middleware:
    """The middleware in front of every path, also of those that there are not."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            policy.check(request)
        except Forbidden as error:
            about = {"action": "http.foreign", "route": route_of(request), "address": address_key(request.remote)}
            logger.info("foreign host or origin", extra=about)
            return door.refusal(request, Refused(403, error))
        return await handler(request)

    return middleware


def finishing(metrics: GatewayMetrics) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """What every answer gets: its headers, and that it is counted."""

    async def finish(request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers[hdrs.SERVER] = "corral"
        headers["X-Content-Type-Options"] = "nosniff"
        headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
        origin = request.headers.get(hdrs.ORIGIN)
        if for_pages(request.path):
            headers[hdrs.VARY] = hdrs.ORIGIN
            # A foreign origin is answered 403 and must not be able to read even that.
            if origin is not None and response.status != 403:
                headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
        metrics.answer(route_of(request), response.status)
        answered(request)

    return finish


class Rpc:
    """`POST /rpc`: one request frame, one answer."""

    def __init__(
        self,
        door: Door,
        handshake: Handshake,
        dispatcher: Dispatcher,
        runs: RunMethods,
        ids: Ids,
        draining: asyncio.Event,
        max_frame_bytes: int,
    ) -> None:
        self._door = door
        self._handshake = handshake
        self._dispatcher = dispatcher
        self._runs = runs
        self._ids = ids
        self._draining = draining
        self._max_bytes = max_frame_bytes

    async def handle(self, request: web.Request) -> web.Response:
        """Who asks is settled before anything of the request's content is looked at."""
        try:
            if request.method == hdrs.METH_OPTIONS and request.path == "/rpc":
                return web.Response(status=204, headers=PREFLIGHT)
            principal = (await self._door.admit(request)).principal
            frame = await self._read(request)
            return await self._answer(request, frame, principal)
        except Refused as refused:
            return self._door.refusal(request, refused)

    async def _read(self, request: web.Request) -> RequestFrame:
        if request.path != "/rpc":
            raise Refused(404, NotFound("there is nothing here: POST /rpc"))
        if request.method != hdrs.METH_POST:
            raise Refused(405, InvalidRequest("/rpc takes POST"), allow="POST, OPTIONS")
        if request.headers.get(hdrs.CONTENT_TYPE) is None or request.content_type != _JSON:
            raise Refused(415, InvalidRequest("the Content-Type must be application/json"))
        coding = ", ".join(request.headers.getall(hdrs.CONTENT_ENCODING, ["identity"])).strip().lower()
        if coding not in _CODINGS:
            raise Refused(415, InvalidRequest("the Content-Encoding must be gzip, deflate or none"))
        body = await self._body(request, coding)
        try:
            return read_request(body.decode("utf-8"))
        except UnicodeDecodeError:
            raise Refused(400, InvalidRequest("a frame must be JSON text in UTF-8")) from None
        except BadFrame as error:
            raise Refused(400, error, error.frame_id) from None

    async def _body(self, request: web.Request, coding: str) -> bytes:
        too_big = Refused(413, InvalidRequest(f"a frame must not be longer than {self._max_bytes} bytes"))
        if request.content_length is not None and request.content_length > self._max_bytes:
            raise too_big
        body = bytearray()
        try:
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > self._max_bytes:
                    raise too_big
            plain = bytes(body) if coding == "identity" else _unpacked(body, coding, self._max_bytes + 1)
        except (web.RequestPayloadError, zlib.error):
            raise Refused(400, InvalidRequest("the body is not what its headers say")) from None
        if len(plain) > self._max_bytes:
            raise too_big
        return plain

    async def _answer(self, request: web.Request, frame: RequestFrame, principal: Principal) -> web.Response:
        frames: list[bytes] = []
        answer = Answer(frame.id, frames.append)
        if frame.method == "connect":
            await self._connect(request, frame, principal, answer)
        else:
            default = principal.workspace_ids[0] if principal.workspace_ids else ""
            await self._dispatcher.handle(frame, principal, default, answer, None)
        events: list[bytes] = []
        if frame.method == "agent.run" and answer.payload is not None:
            events = await self._run_events(frame, principal, answer.payload)
        refused_by_drain = self._draining.is_set() and answer.code is ErrorCode.UNAVAILABLE
        return rpc_answer(503 if refused_by_drain else 200, frames[0], events)

    async def _connect(self, request: web.Request, frame: RequestFrame, principal: Principal, answer: Answer) -> None:
        """Nothing is connected by it; it tells what it would tell."""
        token = bearer_token(request.headers.get(hdrs.AUTHORIZATION))
        try:
            admitted = await self._handshake.admit(
                frame.params, token, address_key(request.remote), self._ids.new("conn")
            )
        except Exception as error:
            self._dispatcher.fail(answer, error, self._dispatcher.new_trace_id(), frame.method, principal.tenant_id)
        else:
            answer.give(msgspec.json.encode(admitted.result))

    async def _run_events(self, frame: RequestFrame, principal: Principal, payload: bytes) -> list[bytes]:
        """Wait for the run as long as was asked. The run goes on whatever becomes of this request."""
        params = msgspec.json.decode(frame.params, type=AgentRunParams)
        result = msgspec.json.decode(payload, type=AgentRunResult)
        caller = Caller(principal=principal, workspace_id="", trace_id="")
        try:
            await self._runs.finished(caller.tenant_id, result.run_id, params.wait_ms)
            return await self._runs.events_so_far(caller, result)
        except Exception:
            # The run is accepted, which is what the answer says; its events can be had again.
            logger.exception(
                "events of a run not read",
                extra={"action": "http.run_events_failed", "run": result.run_id, "tenant": caller.tenant_id},
            )
            return []


def _unpacked(body: bytes | bytearray, coding: str, most: int) -> bytes:
    """`body` without its coding, at most `most` bytes. Raises zlib.error if it is not so coded, or broken off."""
    # What is called deflate comes with zlib's header (whose first byte ends in 8) or, from some clients, without it;
    # 32 finds out by itself whether it is gzip or zlib.
    bare = coding == "deflate" and body[:1] != b"" and body[0] & 15 != 8
    unpack = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
    plain = unpack.decompress(body, most)
    if unpack.unused_data or (not unpack.eof and len(plain) < most):
        raise zlib.error("the end is missing, or something follows it")
    return plain


class Health:
    """`/healthz` and `/readyz`: no token, no detail."""

    def __init__(self, store: Store, clock: Clock, options: GatewayOptions, draining: asyncio.Event) -> None:
        self._store = store
        self._clock = clock
        self._cache_s, self._wait_s = options.readiness_cache, options.readiness_wait
        self._draining = draining
        self._lock = asyncio.Lock()
        self._checked: tuple[float, bool] | None = None

    async def healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(self, _request: web.Request) -> web.Response:
        ready = not self._draining.is_set() and await self._writable()
        return web.json_response({"status": "ready" if ready else "unavailable"}, status=200 if ready else 503)

    async def _writable(self) -> bool:
        """Asked of the store once in a while, however often it is asked here."""
        async with self._lock:
            now = self._clock.monotonic()
            if self._checked is None or now - self._checked[0] >= self._cache_s:
                try:
                    async with asyncio.timeout(self._wait_s):
                        writable = await self._store.check_writable()
                except (StoreUnavailable, TimeoutError):
                    writable = False
                self._checked = (self._clock.monotonic(), writable)
            return self._checked[1]


def not_upgrading(request: web.Request) -> bool:
    return request.headers.get(hdrs.UPGRADE, "").strip().lower() != "websocket"
