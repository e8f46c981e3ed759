"""The door of every HTTP path: who asks, how often, and how a refusal looks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
from aiohttp import hdrs, web

from corral.gateway.auth import Authenticator, Known, bearer_token
from corral.gateway.dispatch import Dispatcher
from corral.gateway.frames import error_frame
from corral.gateway.limits import RequestLimiter, address_key
from corral.gateway.strangers import admitted
from corral.protocol.errors import CorralError, InternalError, RateLimited, Unauthorized
from corral.protocol.frames import INVALID_ID
from corral.protocol.types import Principal
from corral.storage.api import StoreUnavailable

logger = logging.getLogger(__name__)

_JSON = "application/json"
_STREAMS, _EVENTS = "/v1/sessions/", "/events"

PREFLIGHT = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST",
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "content-type, authorization, last-event-id",
    hdrs.ACCESS_CONTROL_MAX_AGE: "600",
}
"""What `OPTIONS` answers beside the origin, which `finishing` adds."""


def is_rpc(path: str) -> bool:
    return path == "/rpc" or path.startswith("/rpc/")


def for_pages(path: str) -> bool:
    """Whether pages of allowed origins may read the path's answers."""
    return is_rpc(path) or (path.startswith(_STREAMS) and path.endswith(_EVENTS))


class Refused(Exception):
    """A request that is answered with a status of its own. On `/rpc` the body has `frame_id`."""

    def __init__(self, status: int, error: CorralError, frame_id: str = INVALID_ID, allow: str | None = None) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error
        self.frame_id = frame_id
        self.allow = allow


class Door:
    """Finds out who asks. The token is read from the `Authorization` header and nowhere else."""

    def __init__(self, authenticator: Authenticator, limiter: RequestLimiter, dispatcher: Dispatcher) -> None:
        self._authenticator = authenticator
        self._limiter = limiter
        self._dispatcher = dispatcher

    async def admit(self, request: web.Request) -> Known:
        """Who shows the request's token, before anything else of the request is looked at.

        Raises Refused: 401 without a good token, 429, 503. The request is counted: for the
        principal, or for the address if there is none.
        """
        known = await self._authenticate(request)
        admitted(request)
        try:
            self._limiter.known(known.principal)
        except RateLimited as error:
            logger.debug("too many requests", extra=_about(request, "http.rate_limited", known.principal))
            raise Refused(429, error) from None
        return known

    async def _authenticate(self, request: web.Request) -> Known:
        address = address_key(request.remote)
        try:
            return await self._authenticator.known(bearer_token(request.headers.get(hdrs.AUTHORIZATION)), address)
        except Unauthorized as error:
            try:
                self._limiter.unknown(address)
            except RateLimited as limit:
                raise Refused(429, limit) from None
            raise Refused(401, error) from None
        except RateLimited as error:
            raise Refused(429, error) from None
        except StoreUnavailable as error:
            raise Refused(503, error) from None
        except Exception:
            logger.exception("authentication failed", extra=_about(request, "http.auth_failed"))
            raise Refused(503, InternalError("something went wrong in the server")) from None

    def refusal(self, request: web.BaseRequest, refused: Refused) -> web.Response:
        """A refusal as the path's clients expect it: `/rpc` always answers in its own shape."""
        frame = error_frame(refused.frame_id, refused.error, self._dispatcher.new_trace_id())
        if is_rpc(request.path):
            response = rpc_answer(refused.status, frame)
        else:
            body = b'{"error":%b}' % bytes(msgspec.json.decode(frame, type=_Response).error)
            response = web.Response(status=refused.status, body=body, content_type=_JSON)
        if refused.status == 401:
            response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
        if refused.allow is not None:
            response.headers[hdrs.ALLOW] = refused.allow
        wait_ms = retry_after_ms(refused.error.details)
        if wait_ms is not None:
            response.headers[hdrs.RETRY_AFTER] = str(math.ceil(wait_ms / 1000))
        return response


class _Response(msgspec.Struct):
    error: msgspec.Raw


def retry_after_ms(details: Mapping[str, object] | None) -> int | None:
    """What a rate limit's details say, None if they say nothing of the kind."""
    wait = (details or {}).get("retryAfterMs")
    return wait if isinstance(wait, int) else None


def rpc_answer(status: int, response: bytes, events: list[bytes] | None = None) -> web.Response:
    body = b'{"response":%b,"events":[%b]}' % (response, b",".join(events or []))
    return web.Response(status=status, body=body, content_type=_JSON)


def _about(request: web.Request, action: str, principal: Principal | None = None) -> dict[str, str | None]:
    return {
        "action": action,
        "route": route_of(request),
        "address": address_key(request.remote),
        "tenant": principal.tenant_id if principal is not None else None,
        "subject": principal.subject if principal is not None else None,
    }


def route_of(request: web.Request) -> str:
    """The route's pattern, of which there are few; never the path, which is the client's."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"
