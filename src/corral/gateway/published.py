"""`/metrics`, `/schema/protocol.json` and `/openapi.json`: for those with a token."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import msgspec
from aiohttp import hdrs, web

from corral.gateway.door import Door, Refused
from corral.gateway.metrics import GatewayMetrics
from corral.gateway.openapi import openapi
from corral.protocol.errors import InvalidRequest
from corral.protocol.schema import protocol_schema


class Published:
    """The three routes."""

    def __init__(self, door: Door, metrics: GatewayMetrics) -> None:
        self._door = door
        self._metrics = metrics

    async def metrics(self, request: web.Request) -> web.Response:
        return await self._serve(request, self._metrics.page)

    async def schema(self, request: web.Request) -> web.Response:
        return await self._serve(request, lambda: (_schema(), "application/schema+json"))

    async def openapi(self, request: web.Request) -> web.Response:
        return await self._serve(request, lambda: (_openapi(), "application/json"))

    async def _serve(self, request: web.Request, page: Callable[[], tuple[bytes, str]]) -> web.Response:
        try:
            await self._door.admit(request)
            if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
                raise Refused(405, InvalidRequest("this is read with GET"), allow="GET, HEAD")
        except Refused as refused:
            return self._door.refusal(request, refused)
        body, kind = page()
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: kind})


@cache
def _schema() -> bytes:
    return msgspec.json.encode(protocol_schema())


@cache
def _openapi() -> bytes:
    return msgspec.json.encode(openapi())
