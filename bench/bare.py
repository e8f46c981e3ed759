"""The bare server: what aiohttp on uvloop does with WebSockets when nothing else is asked of it.

`python -m bench.bare` prints `listening on URL`. `/ws` takes sockets and keeps them; `/burst?frames=&size=`
sends so many text frames of that size to each, with awaited `send_str`, the last beginning with `END`.
It ends by SIGTERM, or when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading

import uvloop
from aiohttp import web

END = "the last one "


class Bare:
    def __init__(self) -> None:
        self._sockets: set[web.WebSocketResponse] = set()

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get("/ws", self._socket)
        application.router.add_get("/burst", self._burst)
        application.router.add_get("/readyz", self._ready)
        return application

    async def _ready(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(heartbeat=30, compress=False, max_msg_size=1024 * 1024)
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            async for _message in socket:
                pass
        finally:
            self._sockets.discard(socket)
        return socket

    async def _burst(self, request: web.Request) -> web.Response:
        frames, size = int(request.query["frames"]), int(request.query["size"])
        text = "x" * size
        for number in range(frames):
            if number == frames - 1:
                text = END.ljust(size, "x")
            for socket in self._sockets:
                await socket.send_str(text)
        return web.Response(text="sent")


async def serve() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    threading.Thread(target=_watch_stdin, args=(loop, stop), daemon=True).start()
    runner = web.AppRunner(Bare().application(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    if not loop.is_closed():
        loop.call_soon_threadsafe(stop.set)


if __name__ == "__main__":
    uvloop.run(serve())
