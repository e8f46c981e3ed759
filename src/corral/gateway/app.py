"""The gateway put together: one port for WebSocket and HTTP."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from corral.bus.api import Bus
from corral.clock import Clock
from corral.config import Settings
from corral.gateway.auth import Authenticator, bearer_token
from corral.gateway.connection import Connection, ConnectionServices
from corral.gateway.cursors import FeedCursors
from corral.gateway.dispatch import Dispatcher, MethodTables
from corral.gateway.door import Door, Refused
from corral.gateway.feeds import FeedSystem
from corral.gateway.handshake import CloseCode, Handshake
from corral.gateway.http import Health, Rpc, finishing, guard, not_upgrading
from corral.gateway.limits import FailedAuthLimiter, PreauthGate, RequestLimiter, address_key
from corral.gateway.listening import Runner
from corral.gateway.metrics import GatewayMetrics
from corral.gateway.options import GatewayOptions
from corral.gateway.origin import OriginPolicy
from corral.gateway.peers import Peers
from corral.gateway.published import Published
from corral.gateway.runs import RunMethods, Runs
from corral.gateway.sse import Streams, StreamServices
from corral.gateway.strangers import Strangers, admitted
from corral.gateway.subscriptions import SubscriptionMethods
from corral.gateway.tasks import Background
from corral.gateway.websocket import Socket
from corral.governance.idempotency import Idempotency
from corral.governance.welcome import Welcome
from corral.ids import Ids
from corral.protocol.errors import InvalidRequest, NotFound, RateLimited, Unavailable
from corral.storage.api import Store
from corral.tracing import Record

logger = logging.getLogger(__name__)

_BACKLOG = 2048


class Gateway:
    """Listens, lets clients in, and carries their requests to the rooms below.

    `methods` are those of the rooms below; `agent.run`, `agent.abort` and the subscriptions are
    the gateway's own. `cursor_key` hides
    feed positions (see FeedCursors) and should be the same at every start.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        bus: Bus,
        core: Runs,
        idempotency: Idempotency,
        welcome: Welcome,
        methods: MethodTables,
        clock: Clock,
        ids: Ids,
        options: GatewayOptions | None = None,
        cursor_key: bytes = b"",
        record: Record | None = None,
    ) -> None:
        options = options or GatewayOptions()
        self._settings = settings
        self._options = options
        self._ids = ids
        self._store = store
        self._draining = asyncio.Event()
        self._background = Background()
        self._peers = Peers()
        self._metrics = self._new_metrics(core)
        self._stop_counting = store.add_listener(self._metrics.committed)
        self._gate = PreauthGate(options)
        self._authenticator = Authenticator(store, clock, FailedAuthLimiter(clock.monotonic, options))
        limiter = RequestLimiter(clock.monotonic, options, settings.requests_per_second)
        self._dispatcher = Dispatcher(
            store, idempotency, ids, methods, self._metrics.request, clock=clock, record=record
        )
        self._door = Door(self._authenticator, limiter, self._dispatcher)
        feeds = FeedSystem(store, bus, FeedCursors(cursor_key), options, self._background.spawn)
        runs = RunMethods(self._dispatcher, store, core, self._draining)
        SubscriptionMethods(self._dispatcher, feeds)
        handshake = Handshake(
            self._authenticator, self._dispatcher, welcome, settings, options, clock=clock, record=record
        )
        self._services = ConnectionServices(
            dispatcher=self._dispatcher,
            handshake=handshake,
            feeds=feeds,
            options=options,
            limiter=limiter,
            metrics=self._metrics,
        )
        self._rpc = Rpc(self._door, handshake, self._dispatcher, runs, ids, self._draining, settings.max_frame_bytes)
        self._streams = Streams(
            StreamServices(
                door=self._door,
                feeds=feeds,
                metrics=self._metrics,
                peers=self._peers,
                ids=ids,
                draining=self._draining,
            )
        )
        self._health = Health(store, clock, options, self._draining)
        strangers = Strangers(options.connect_timeout, options.kept_alive, options.strangers)
        self._runner = Runner(self._application(), self._door.refusal, strangers)

    def _new_metrics(self, core: Runs) -> GatewayMetrics:
        return GatewayMetrics(
            {
                "corral_connections_open": ("WebSockets open.", lambda: self._peers.count("websocket")),
                "corral_streams_open": ("Streams of server-sent events open.", lambda: self._peers.count("sse")),
                "corral_runs_active": ("Runs that are driven here now.", lambda: core.active_runs),
                "corral_tasks": ("Tasks of the event loop that have not ended.", lambda: len(asyncio.all_tasks())),
                "corral_store_waiting": ("Units of work that wait for their commit.", lambda: self._store.waiting),
            }
        )

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; returns the address that was bound (`port` 0 picks one)."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, backlog=_BACKLOG).start()
        self._background.spawn(self._peers.keep_watch(self._authenticator, self._options.token_recheck))
        address = self._runner.addresses[0]
        return str(address[0]), int(address[1])

    async def drain(self) -> None:
        """Say that this server goes down: not ready, no new sockets, no new runs; open sockets close with 1012,
        streams end.

        Returns when they are closed. Health and readiness go on answering until `close`.
        """
        self._draining.set()
        self._peers.begin_close(CloseCode.RESTARTING)
        try:
            async with asyncio.timeout(3 * self._options.drain_grace + 1):
                await self._peers.gone()
        except TimeoutError:
            logger.warning("sockets still open", extra={"action": "gateway.drain_timeout", "open": len(self._peers)})

    async def close(self) -> None:
        """Stop listening and release everything. Sockets that are still open are cut off."""
        self._draining.set()
        self._peers.begin_close(CloseCode.RESTARTING)
        await self._runner.cleanup()
        self._stop_counting()
        await self._background.close()

    @property
    def connections(self) -> int:
        """How many sockets and streams are open."""
        return len(self._peers)

    # ---- routes

    def _application(self) -> web.Application:
        origins = OriginPolicy(self._settings.host, self._settings.allowed_hosts, self._settings.allowed_origins)
        application = web.Application(middlewares=[guard(origins, self._door)])
        application.on_response_prepare.append(finishing(self._metrics))
        router = application.router
        router.add_get("/ws", self._upgrade, allow_head=False)
        router.add_route("*", "/rpc", self._rpc.handle)
        router.add_route("*", "/rpc/{rest:.*}", self._rpc.handle)
        router.add_route("*", "/v1/sessions/{session_id}/events", self._streams.handle)
        published = Published(self._door, self._metrics)
        router.add_route("*", "/metrics", published.metrics)
        router.add_route("*", "/schema/protocol.json", published.schema)
        router.add_route("*", "/openapi.json", published.openapi)
        router.add_route("*", "/healthz", self._read_only(self._health.healthz))
        router.add_route("*", "/readyz", self._read_only(self._health.readyz))
        router.add_route("*", "/{rest:.*}", self._nowhere)
        return application

    async def _nowhere(self, request: web.Request) -> web.StreamResponse:
        return self._door.refusal(request, Refused(404, NotFound("there is nothing here")))

    def _read_only(self, handler: Handler) -> Handler:
        """The handler, for GET and HEAD alone."""

        async def read(request: web.Request) -> web.StreamResponse:
            if request.method in (hdrs.METH_GET, hdrs.METH_HEAD):
                return await handler(request)
            return self._door.refusal(request, Refused(405, InvalidRequest("this is read with GET"), allow="GET, HEAD"))

        return read

    async def _upgrade(self, request: web.Request) -> web.StreamResponse:
        """`GET /ws`. Host and Origin are checked; who it is comes with `connect`."""
        address = address_key(request.remote)
        if self._draining.is_set():
            return self._door.refusal(request, Refused(503, Unavailable("the server is shutting down")))
        if not_upgrading(request):
            return await self._plain(request)
        try:
            await self._gate.enter(address)
        except RateLimited as error:
            return self._door.refusal(request, Refused(429, error))
        return await self._serve(request, address)

    async def _plain(self, request: web.Request) -> web.StreamResponse:
        """`/ws` without an upgrade tells its secret, that it wants one, to those alone who are known."""
        try:
            await self._door.admit(request)
        except Refused as refused:
            return self._door.refusal(request, refused)
        response = self._door.refusal(request, Refused(426, InvalidRequest("/ws speaks WebSocket")))
        response.headers[hdrs.UPGRADE] = "websocket"
        return response

    async def _serve(self, request: web.Request, address: str) -> web.StreamResponse:
        place = _Place(self._gate, address)
        try:
            socket = Socket(
                request,
                heartbeat=self._settings.heartbeat_ms / 1000,
                max_frame_bytes=self._settings.max_frame_bytes,
                close_grace=self._options.close_grace,
            )
            await socket.prepare(request)
            admitted(request)
            connection = Connection(
                self._services,
                socket,
                connection_id=self._ids.new("conn"),
                address=address,
                header_token=bearer_token(request.headers.get(hdrs.AUTHORIZATION)),
                on_connected=partial(self._connected, place, self._peers.revocations),
            )
            self._peers.add(connection)
            try:
                if self._draining.is_set():
                    connection.begin_close(CloseCode.RESTARTING)
                await connection.run()
            finally:
                self._peers.discard(connection)
        finally:
            place.leave()
        return socket

    # ---- tokens of open connections

    def tokens_changed(self) -> None:
        """A token was revoked: close what is open with it now, not at the next interval."""
        self._peers.tokens_changed()

    def _connected(self, place: _Place, revocations: int) -> None:
        """A client was let in; `revocations` as they were when its socket came."""
        place.leave()
        if self._peers.revocations != revocations:
            self._peers.look_again()


class _Place:
    """A place before the gate, given back once."""

    def __init__(self, gate: PreauthGate, address: str) -> None:
        self._gate: PreauthGate | None = gate
        self._address = address

    def leave(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.leave(self._address)
