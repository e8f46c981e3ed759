"""From a request frame to its answer: who may, with which params, and the one place where errors become codes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from corral.clock import Clock
from corral.gateway.feeds import ConnectionFeeds
from corral.gateway.frames import RequestFrame, error_frame, response_frame
from corral.gateway.metrics import CANCELLED, OK, OTHER
from corral.gateway.problems import params_problem
from corral.gateway.traces import TRACED, request_span
from corral.governance.caller import Caller
from corral.governance.idempotency import Idempotency, Performed
from corral.ids import Ids
from corral.protocol.canonical import MAX_DEPTH, is_too_deep
from corral.protocol.errors import CorralError, ErrorCode, Forbidden, InternalError, InvalidRequest, MethodNotFound
from corral.protocol.methods import METHODS, Method, Params, SideEffectParams
from corral.protocol.types import Principal, Wire
from corral.storage.api import Store
from corral.storage.repositories import Transaction
from corral.tracing import WHERE, Record, Stopwatch

logger = logging.getLogger(__name__)

MethodFunction = Callable[[Transaction, Caller, Any], Any]
"""One synchronous function over a transaction."""


class Effect(Struct, kw_only=True, frozen=True):
    """A method of which more is to be done than a transaction.

    `finish` makes the answer out of the one that was kept, each time that it is given: for what must
    not lie in the store. `committed` is called on the event loop right after the commit, also if the
    caller has gone by then; it must not raise.
    """

    function: MethodFunction
    finish: Callable[[Caller, bytes], bytes] | None = None
    committed: Callable[[], None] | None = None


OtherFunction = Callable[[Caller, Any], Awaitable[Any]]


class MethodTables(Struct, kw_only=True, frozen=True):
    """Functions of the rooms below, by method name.

    `reads` and `writes` are one synchronous function over a transaction each; `others` read,
    and see to their own transactions.
    """

    reads: Mapping[str, MethodFunction]
    writes: Mapping[str, MethodFunction | Effect]
    others: Mapping[str, OtherFunction]


CountRequest = Callable[[str, str, float], None]
"""Hears of each request that was answered: method, outcome, seconds."""


class Answer:
    """The one answer to a request; what comes after the first changes nothing.

    `send` gets it as a frame at once. `payload` is kept for who needs to know what it said.
    """

    def __init__(self, frame_id: str, send: Callable[[bytes], None]) -> None:
        self._frame_id = frame_id
        self._send = send
        self._given = asyncio.Event()
        self.payload: bytes | None = None
        self.code: ErrorCode | None = None

    def give(self, payload: bytes) -> None:
        """Answer with `payload`, JSON text."""
        if not self._given.is_set():
            self._given.set()
            self.payload = payload
            self._send(response_frame(self._frame_id, payload))

    def refuse(self, error: CorralError, trace_id: str) -> None:
        if not self._given.is_set():
            self._given.set()
            self.code = error.code
            self._send(error_frame(self._frame_id, error, trace_id))

    @property
    def outcome(self) -> str:
        """How it went, as the metrics call it."""
        if not self._given.is_set():
            return CANCELLED
        return OK if self.code is None else self.code.value

    async def wait(self) -> None:
        """Until it is given."""
        await self._given.wait()


class Call:
    """One request with its caller, decoded params, and the place for its answer.

    `feeds` are the subscriptions of the connection that it came on; None on `/rpc`.
    """

    __slots__ = ("answer", "caller", "feeds", "method", "params")

    def __init__(
        self, method: Method, params: Params, caller: Caller, answer: Answer, feeds: ConnectionFeeds | None
    ) -> None:
        self.method = method
        self.params: Any = params
        self.caller = caller
        self.answer = answer
        self.feeds = feeds

    def reply(self, result: Wire) -> None:
        self.answer.give(msgspec.json.encode(result))


Handler = Callable[[Call], Awaitable[None]]


class Dispatcher:
    """Every method that this server has, behind one door for all transports.

    Checks go in this order: the method exists, the caller's role allows it, its params decode,
    tenant and workspace are the caller's.

    `count` hears of every request that was answered; who answers `connect` tells it too.
    """

    def __init__(
        self,
        store: Store,
        idempotency: Idempotency,
        ids: Ids,
        methods: MethodTables,
        count: CountRequest,
        *,
        clock: Clock,
        record: Record | None = None,
    ) -> None:
        self._store = store
        self._idempotency = idempotency
        self._ids = ids
        self.count = count
        self._clock = clock
        self._record = record
        self._handlers: dict[str, Handler] = {}
        for name, function in methods.reads.items():
            self.add(name, self._reading(function))
        for name, write in methods.writes.items():
            self.add(name, self._effect(write) if isinstance(write, Effect) else self._writing(write))
        for name, other in methods.others.items():
            self.add(name, self._other(other))

    def add(self, name: str, handler: Handler) -> None:
        """Give a method of the registry its handler."""
        if name not in METHODS:
            raise ValueError(f"{name} is not in the method registry")
        self._handlers[name] = handler

    @property
    def methods(self) -> list[str]:
        """What `features.methods` lists, in the registry's order."""
        return [name for name in METHODS if name == "connect" or name in self._handlers]

    def new_trace_id(self) -> str:
        return self._ids.new("tr")

    async def handle(
        self,
        frame: RequestFrame,
        principal: Principal,
        workspace_id: str,
        answer: Answer,
        feeds: ConnectionFeeds | None,
    ) -> None:
        """Carry a request out and answer it, whatever happens. Raises nothing but cancellation."""
        trace_id = self.new_trace_id()
        began = time.monotonic()
        record = self._record if frame.method in TRACED else None
        watch = Stopwatch(self._clock.now_ms, self._clock.monotonic) if record is not None else None
        where = WHERE.set({"trace_id": trace_id, "tenant": principal.tenant_id})
        try:
            await self._carry_out(frame, principal, workspace_id, trace_id, answer, feeds)
        except Exception as error:
            self.fail(answer, error, trace_id, frame.method, principal.tenant_id)
        finally:
            WHERE.reset(where)
            self.count(frame.method, answer.outcome, time.monotonic() - began)
            if record is not None and watch is not None:
                on = feeds.peer.id if feeds is not None else ""
                record(request_span(frame.method, trace_id, principal, on, answer.payload, watch, answer.outcome))

    async def _carry_out(
        self,
        frame: RequestFrame,
        principal: Principal,
        workspace_id: str,
        trace_id: str,
        answer: Answer,
        feeds: ConnectionFeeds | None,
    ) -> None:
        method = METHODS.get(frame.method)
        handler = self._handlers.get(frame.method)
        if method is None or handler is None:
            raise MethodNotFound("there is no such method here: features.methods lists those there are")
        check_role(method, principal)
        params = decode_params(method, frame.params)
        caller = Caller(principal=principal, workspace_id=enter(principal, params, workspace_id), trace_id=trace_id)
        await handler(Call(method, params, caller, answer, feeds))

    def fail(self, answer: Answer, error: Exception, trace_id: str, method: str, tenant_id: str) -> None:
        """The funnel: an error of ours answers with its code, any other as INTERNAL_ERROR, told to the log alone."""
        known = method if method in METHODS else OTHER
        about = {"action": "request.failed", "trace_id": trace_id, "method": known, "tenant": tenant_id}
        if not isinstance(error, CorralError):
            logger.error("request failed unexpectedly", exc_info=error, extra=about)
            error = InternalError("something went wrong in the server: its log has more under this traceId")
        else:
            logger.info("request refused", extra={**about, "action": "request.refused", "code": error.code.value})
        answer.refuse(error, trace_id)

    def _reading(self, function: MethodFunction) -> Handler:
        async def handler(call: Call) -> None:
            result = await self._store.read(lambda tx: function(tx, call.caller, call.params))
            call.reply(result)

        return handler

    def _other(self, function: OtherFunction) -> Handler:
        async def handler(call: Call) -> None:
            call.reply(await function(call.caller, call.params))

        return handler

    def _writing(self, function: MethodFunction) -> Handler:
        async def handler(call: Call) -> None:
            # The answer goes out in the unit's on_commit, so before the events that it caused.
            await self.perform(call, lambda tx: function(tx, call.caller, call.params), lambda done: _reply(call, done))

        return handler

    def _effect(self, effect: Effect) -> Handler:
        async def handler(call: Call) -> None:
            def on_commit(done: Performed) -> None:
                if effect.finish is None:
                    _reply(call, done)
                if effect.committed is not None:
                    effect.committed()

            done = await self.perform(call, lambda tx: effect.function(tx, call.caller, call.params), on_commit)
            if effect.finish is not None and done.payload is not None:
                # Here and not in on_commit, as it may raise.
                call.answer.give(effect.finish(call.caller, done.payload))

        return handler

    async def perform(
        self, call: Call, work: Callable[[Transaction], Any], on_commit: Callable[[Performed], None]
    ) -> Performed:
        """Idempotency.perform for a call."""
        return await self._idempotency.perform(call.caller, call.method, call.params, work, on_commit)


def _reply(call: Call, done: Performed) -> None:
    if done.payload is not None:
        call.answer.give(done.payload)


def check_role(method: Method, principal: Principal) -> None:
    """Raises Forbidden unless one of the principal's roles may call the method."""
    if method.roles.isdisjoint(principal.roles):
        raise Forbidden(f"none of your roles may call {method.name}")


def enter(principal: Principal, params: Params, default_workspace: str) -> str:
    """The workspace that a request is about. Raises Forbidden for a foreign tenant or workspace."""
    if params.tenant_id is not UNSET and params.tenant_id != principal.tenant_id:
        raise Forbidden("$.params.tenantId is not your tenant")
    wanted = params.workspace_id if params.workspace_id is not UNSET else default_workspace
    if wanted not in principal.workspace_ids:
        raise Forbidden("$.params.workspaceId is no workspace that you may enter")
    return wanted


def decode_params(method: Method, text: bytes) -> Any:
    """The params as the method's struct, unknown fields left out. Raises InvalidRequest that names the field."""
    try:
        params = _decoder(method.params).decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise params_problem(error) from None
    # Only objects of any content can be deep: all other params have the shape of their types.
    for name in params.__struct_fields__:
        if isinstance(value := getattr(params, name), dict) and is_too_deep(value):
            raise InvalidRequest(f"$.params.{name} is nested too deeply: at most {MAX_DEPTH} levels")
    return params


def is_side_effect(name: str) -> bool:
    """Whether the registry's method changes something."""
    method = METHODS.get(name)
    return method is not None and issubclass(method.params, SideEffectParams)


@cache
def _decoder(params: type[Params]) -> msgspec.json.Decoder[Params]:
    return msgspec.json.Decoder(params)
