"""`connect`: who are you, which workspace, which version of the protocol."""

from __future__ import annotations

import re
import time
from enum import IntEnum

from msgspec import UNSET, Struct, UnsetType, to_builtins

from corral import __version__
from corral.clock import Clock, rfc3339
from corral.config import Settings
from corral.gateway.auth import Authenticator
from corral.gateway.dispatch import Dispatcher, check_role, decode_params, enter
from corral.gateway.metrics import CANCELLED, OK
from corral.gateway.options import GatewayOptions
from corral.gateway.traces import connect_span
from corral.governance.caller import Caller
from corral.governance.welcome import Welcome
from corral.protocol import PROTOCOL_VERSION
from corral.protocol.errors import (
    CorralError,
    ErrorCode,
    Forbidden,
    InvalidRequest,
    RateLimited,
    Unauthorized,
    Unavailable,
)
from corral.protocol.events import EVENTS
from corral.protocol.frames import Features
from corral.protocol.methods import METHODS, ConnectParams, ConnectResult, Limits, ProtocolRange
from corral.protocol.types import Principal
from corral.tracing import Record, Stopwatch

_DEFAULT_STEPS = 50
_VERSION = re.compile(r"(\d{1,9})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?")
_BEYOND = 10**10


class CloseCode(IntEnum):
    """Why a socket was closed: PROTOCOL.md's own codes and those of RFC 6455, section 7.4."""

    NORMAL = 1000
    BINARY = 1003
    POLICY = 1008
    TOO_BIG = 1009
    INTERNAL = 1011
    RESTARTING = 1012
    TRY_LATER = 1013
    UNAUTHORIZED = 4401
    CONNECT_TIMEOUT = 4408
    PROTOCOL_VERSION = 4409
    TOO_SLOW = 4410
    RATE_LIMIT = 4429


class UnsupportedVersion(InvalidRequest):
    """The client's range of protocol versions leaves this server's out."""


def close_code_of(error: CorralError) -> CloseCode:
    """How a connection is closed whose `connect` was refused with `error`."""
    if isinstance(error, UnsupportedVersion):
        return CloseCode.PROTOCOL_VERSION
    if isinstance(error, RateLimited):
        return CloseCode.RATE_LIMIT
    if isinstance(error, Unavailable):
        return CloseCode.TRY_LATER
    if isinstance(error, Unauthorized | Forbidden | InvalidRequest):
        return CloseCode.UNAUTHORIZED
    return CloseCode.INTERNAL


class Admitted(Struct, kw_only=True, frozen=True):
    """A principal that was let in, and what to answer. `token_hash` is asked about again and again.

    `seconds_left` is how long the token still holds, None if it does not expire.
    """

    principal: Principal
    workspace_id: str
    token_hash: str
    seconds_left: float | None
    result: ConnectResult


class Handshake:
    """Checks `connect`, for sockets and `/rpc` alike."""

    def __init__(
        self,
        authenticator: Authenticator,
        dispatcher: Dispatcher,
        welcome: Welcome,
        settings: Settings,
        options: GatewayOptions,
        *,
        clock: Clock,
        record: Record | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._dispatcher = dispatcher
        self._welcome = welcome
        self._clock = clock
        self._record = record
        self._limits = Limits(
            max_frame_bytes=settings.max_frame_bytes,
            heartbeat_ms=settings.heartbeat_ms,
            max_subscriptions=options.max_subscriptions,
            max_steps_per_run=_DEFAULT_STEPS,
        )

    async def admit(self, params_text: bytes, header_token: str | None, address: str, connection_id: str) -> Admitted:
        """Let a client in; the frame's token comes before the header's.

        Raises InvalidRequest, UnsupportedVersion, Unauthorized, Forbidden, RateLimited, StoreUnavailable.
        """
        began = time.monotonic()
        watch = Stopwatch(self._clock.now_ms, self._clock.monotonic)
        outcome, admitted = CANCELLED, None
        try:
            admitted = await self._admit(params_text, header_token, address, connection_id)
            outcome = OK
        except CorralError as error:
            outcome = error.code.value
            raise
        except Exception:
            outcome = ErrorCode.INTERNAL_ERROR.value
            raise
        finally:
            self._dispatcher.count("connect", outcome, time.monotonic() - began)
            if self._record is not None:
                who, where = (admitted.principal, admitted.workspace_id) if admitted is not None else (None, None)
                self._record(connect_span(connection_id, who, where, watch, outcome))
        return admitted

    async def _admit(self, params_text: bytes, header_token: str | None, address: str, connection_id: str) -> Admitted:
        method = METHODS["connect"]
        params: ConnectParams = decode_params(method, params_text)
        check_version(params.protocol)
        token = params.auth.token if params.auth is not UNSET else header_token
        known = await self._authenticator.known(token, address)
        principal = known.principal
        check_role(method, principal)
        default = principal.workspace_ids[0] if principal.workspace_ids else ""
        told = {
            "connectionId": connection_id,
            "client": to_builtins(params.client) if params.client is not UNSET else None,
            "address": address,
        }
        try:
            workspace_id = enter(principal, params, default)
        except CorralError as error:
            caller = Caller(principal=principal, workspace_id=str(params.workspace_id), trace_id=connection_id)
            await self._welcome.refused(caller, {**told, "code": str(error.code)})
            raise
        caller = Caller(principal=principal, workspace_id=workspace_id, trace_id=connection_id)
        pending = await self._welcome.admitted(caller, told)
        result = ConnectResult(
            protocol_version=PROTOCOL_VERSION,
            server_time=rfc3339(self._clock.now_ms()),
            server_version=__version__,
            connection_id=connection_id,
            principal=principal,
            workspace_id=workspace_id,
            features=Features(methods=self._dispatcher.methods, events=list(EVENTS)),
            limits=self._limits,
            pending_approvals=pending,
        )
        return Admitted(
            principal=principal,
            workspace_id=workspace_id,
            token_hash=known.digest,
            seconds_left=known.ms_left / 1000 if known.ms_left is not None else None,
            result=result,
        )


def check_version(asked: ProtocolRange | UnsetType) -> None:
    """Raises UnsupportedVersion unless this server's protocol version lies in the client's range.

    A part left out means any: `max: "1"` takes in 1.9, `min: "1"` begins at 1.0.0.
    """
    if isinstance(asked, UnsetType):
        return
    ours = _parse(PROTOCOL_VERSION, 0)
    least = _parse(asked.min, 0) if asked.min is not UNSET else (0, 0, 0)
    most = _parse(asked.max, _BEYOND) if asked.max is not UNSET else (_BEYOND,) * 3
    if least is None or most is None:
        raise UnsupportedVersion('$.params.protocol must give versions such as 1, "1.0" or "1.0.0"')
    if ours is None or not least <= ours <= most:
        raise UnsupportedVersion(f"$.params.protocol leaves out {PROTOCOL_VERSION}, the version spoken here")


def _parse(version: str | float, filling: int) -> tuple[int, int, int] | None:
    found = _VERSION.fullmatch(str(version))
    if found is None:
        return None
    major, minor, patch = (int(part) if part is not None else filling for part in found.groups())
    return major, minor, patch
