"""What answers on the port before any route does: bytes that are no HTTP, and what no handler caught.

aiohttp would repeat what came, in its answer and with a traceback in the log, and with it a token that
stands in a header that is not quite right; and it would say its own and Python's version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from aiohttp import hdrs, web

from corral.gateway.door import Refused
from corral.gateway.limits import address_key
from corral.gateway.strangers import Connection, Strangers
from corral.protocol.errors import InternalError, InvalidRequest

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 1.0
_OPTIONS: dict[str, Any] = {"access_log": None, "lingering_time": 2.0, "auto_decompress": False}
"""Of aiohttp's request handlers; seconds. What is packed is unpacked after it is known who sends it."""

Refusal = Callable[[web.BaseRequest, Refused], web.Response]

_UNREADABLE = (web.RequestPayloadError, ConnectionError)
"""What the client alone is the cause of: a body that is not what its headers say, or that ends in the middle."""


class Runner(web.AppRunner):
    """An application's runner whose connections answer what is no request as `refusal` makes it."""

    def __init__(self, application: web.Application, refusal: Refusal, strangers: Strangers) -> None:
        super().__init__(application, shutdown_timeout=_SHUTDOWN_S, **_OPTIONS)
        self._refusal = refusal
        self._strangers = strangers

    # aiohttp (3.14) has no public way to give an application's connections a class of one's own: `ServerRunner` takes
    # a server, but only `AppRunner` makes one of an application. A test tells when aiohttp changes what this stands on.
    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(made.request_handler, made.request_factory, self._refusal, self._strangers)


class _Server(web.Server):
    def __init__(self, handler: Any, factory: Any, refusal: Refusal, strangers: Strangers) -> None:
        super().__init__(handler, request_factory=factory, **_OPTIONS)
        self._refusal = refusal
        self._strangers = strangers

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self._refusal, self._strangers)


class _Connection(Connection):
    """One connection."""

    __slots__ = ("_refusal",)

    def __init__(self, server: web.Server, refusal: Refusal, strangers: Strangers) -> None:
        super().__init__(server, strangers, _OPTIONS)
        self._refusal = refusal

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002  (it has what came)
    ) -> web.StreamResponse:
        """The answer to what could not be read (`status` 400), or to a request whose handler failed."""
        address = address_key(request.remote)
        if status == 400:
            logger.info("no HTTP request", extra={"action": "http.unreadable", "address": address})
            refused = Refused(400, InvalidRequest("this is no HTTP request that can be read"))
        elif isinstance(exc, _UNREADABLE):
            logger.info("a request broke off", extra={"action": "http.broken_off", "address": address})
            refused = Refused(400, InvalidRequest("the request broke off or is not what its headers say"))
        else:
            logger.error("a request failed", extra={"action": "http.failed", "address": address}, exc_info=exc)
            refused = Refused(503, InternalError("something went wrong in the server"))
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        response = self._refusal(request, refused)
        response.headers[hdrs.SERVER] = "corral"
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:  # noqa: ARG002  (they may have what came)
        """What went wrong beside the handler, such as the rest of a body that cannot be read."""
        if isinstance(kw.get("exc_info"), _UNREADABLE):
            logger.debug("the rest of a request cannot be read", extra={"action": "http.unreadable_rest"})
        else:
            logger.error("a connection failed", extra={"action": "http.connection_failed"}, **kw)
