"""Servers that are no gateway, for clients to meet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def at_ws(endpoint: Callable[[web.Request], Awaitable[web.StreamResponse]], port: int) -> AsyncIterator[str]:
    """Serve `endpoint` as `/ws` on this port of the loopback; gives the URL."""
    app = web.Application()
    app.router.add_get("/ws", endpoint)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
