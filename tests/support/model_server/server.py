"""The server: real sockets, and everything that a script may ask for on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from aiohttp import web

from tests.support.model_server.chat import Chat
from tests.support.model_server.choose import default_brain, player
from tests.support.model_server.generate import Generate
from tests.support.model_server.messages import Messages
from tests.support.model_server.steps import (
    Answer,
    CallTools,
    CloseKeepAlive,
    CutAfter,
    Drop,
    ErrorInStream,
    Frame,
    Hang,
    LengthInToolCall,
    Malformed,
    NoHttp,
    NoUsage,
    Raw,
    Say,
    Script,
    Slow,
    Status,
)


class Dialect(Protocol):
    """How a provider's API is spoken."""

    def neutral(self, body: dict[str, Any], name: str) -> dict[str, Any]:
        """A request as Chat Completions would have it, for scripts to look at. `name` is the model in the path."""
        ...

    def streams(self, body: dict[str, Any]) -> bool: ...

    def frames(self, step: Answer, number: int, body: dict[str, Any], *, usage: bool = True) -> list[Frame]: ...

    def end(self, step: Answer) -> list[Frame]: ...

    def whole(self, step: Answer, number: int, body: dict[str, Any]) -> dict[str, Any]: ...

    def stream_error(self, step: ErrorInStream) -> Frame: ...

    def error(self, step: Status) -> dict[str, Any]: ...


@dataclass
class Recorded:
    """A request as it came: its JSON, its headers, where to, and the number of the connection that it came on."""

    json: dict[str, Any]
    headers: dict[str, str]
    path: str
    url: str
    connection: int


class ModelServer:
    """The server; see the module's text. Use it as an async context manager, or `start()` and `close()`."""

    def __init__(self, script: Script = default_brain, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.requests: list[Recorded] = []
        self.disconnects = 0
        """How many clients went away while they were being answered."""
        self._choose = player(script)
        self._host, self._port = host, port
        self._connections: dict[web.RequestHandler, int] = {}
        self._poisoned: set[int] = set()
        self._seen_connections = 0
        self._closing = False
        self._changed = asyncio.Event()
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._handler(Chat()))
        app.router.add_post("/v1/messages", self._handler(Messages()))
        app.router.add_post("/v1beta/models/{name}:streamGenerateContent", self._handler(Generate()))
        app.router.add_get("/_state", self._state)
        # With cancellation a handler that hangs learns at once that its client has gone.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)

    @property
    def port(self) -> int:
        return self._port

    @property
    def base_url(self) -> str:
        """What goes into OPENAI_BASE_URL."""
        return f"http://{self._host}:{self._port}/v1"

    @property
    def root_url(self) -> str:
        """What goes into ANTHROPIC_BASE_URL and GOOGLE_GEMINI_BASE_URL."""
        return f"http://{self._host}:{self._port}"

    @property
    def open_connections(self) -> int:
        """How many TCP connections clients hold open now."""
        server = self._runner.server
        return len(server.connections) if server is not None else 0

    @property
    def connections_seen(self) -> int:
        """How many different connections carried requests so far."""
        return self._seen_connections

    def set_script(self, script: Script) -> None:
        self._choose = player(script)

    async def wait(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """Until `condition()` holds; TimeoutError after `seconds`. Looks when a request comes, ends or breaks off."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                try:
                    async with asyncio.timeout(0.02):  # a connection's own end tells nobody
                        await self._changed.wait()
                except TimeoutError:
                    continue

    async def start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = self._runner.addresses[0][1]

    async def close(self) -> None:
        self._closing = True
        await self._runner.cleanup()

    async def __aenter__(self) -> ModelServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- handlers

    async def _state(self, _request: web.Request) -> web.Response:
        requests = [{"json": r.json, "headers": r.headers, "connection": r.connection} for r in self.requests]
        state = {"requests": requests, "disconnects": self.disconnects, "open": self.open_connections - 1}
        return web.json_response(state)

    def _connection_number(self, request: web.Request) -> int:
        protocol = request.protocol
        if protocol not in self._connections:
            for gone in [known for known in self._connections if known.transport is None]:
                del self._connections[gone]
            self._seen_connections += 1
            self._connections[protocol] = self._seen_connections
        return self._connections[protocol]

    def _handler(self, dialect: Dialect) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._answer(request, dialect)

        return handle

    async def _answer(self, request: web.Request, dialect: Dialect) -> web.StreamResponse:
        number = self._connection_number(request)
        if number in self._poisoned:
            _abort(request)
            return web.Response()
        body = await request.json()
        self.requests.append(Recorded(body, dict(request.headers), request.path, str(request.url), number))
        self._changed.set()
        step = self._choose(dialect.neutral(body, request.match_info.get("name", "")))
        try:
            return await self._play(request, dialect, body, step, number)
        except (asyncio.CancelledError, ConnectionError):
            if not self._closing:
                self.disconnects += 1
            raise
        finally:
            self._changed.set()

    async def _play(
        self, request: web.Request, dialect: Dialect, body: dict[str, Any], step: Any, connection: int
    ) -> web.StreamResponse:
        match step:
            case Slow(seconds=seconds, of=inner):
                await asyncio.sleep(seconds)
                return await self._play(request, dialect, body, inner, connection)
            case Status():
                return _error_response(step, dialect)
            case Hang(after=None):
                await asyncio.Event().wait()
                raise AssertionError("unreachable")
            case Drop():
                _abort(request)
                return web.Response()
            case NoHttp(data=data):
                if request.transport is not None:
                    request.transport.write(data)
                    request.transport.close()
                return web.Response()
            case CloseKeepAlive(of=inner):
                self._poisoned.add(connection)
                return await self._play(request, dialect, body, inner, connection)
            case Raw(body=raw, content_type=content_type):
                return web.Response(body=raw, headers={"Content-Type": content_type})
            case Say() | CallTools() | LengthInToolCall() if not dialect.streams(body):
                return web.json_response(dialect.whole(step, len(self.requests), body))
        return await self._stream(request, dialect, body, step)

    async def _stream(
        self, request: web.Request, dialect: Dialect, body: dict[str, Any], step: Any
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        number = len(self.requests)
        text = Say("Some words before it happens, in several pieces.", chunks=8)
        match step:
            case CutAfter(chunks=count, of=inner, delay=delay):
                await self._write(response, dialect.frames(inner, number, body)[:count], inner)
                await asyncio.sleep(delay)
                _abort(request)
                return response
            case NoUsage(of=inner):
                frames = dialect.frames(inner, number, body, usage=False)
                await self._write(response, frames + dialect.end(inner), inner)
            case Malformed(data=data, after=after):
                await self._write(response, [*dialect.frames(text, number, body)[:after], (None, data)], text)
            case Hang(after=after):
                await self._write(response, dialect.frames(text, number, body)[: after or 0], text)
                await asyncio.Event().wait()
            case ErrorInStream(after=after):
                frames = dialect.frames(text, number, body)[:after]
                await self._write(response, [*frames, dialect.stream_error(step)], text)
            case Say() | CallTools() | LengthInToolCall():
                await self._write(response, dialect.frames(step, number, body) + dialect.end(step), step)
                await asyncio.sleep(step.wire.linger)
            case _:
                raise TypeError(f"no step: {step!r}")
        await response.write_eof()
        return response

    async def _write(self, response: web.StreamResponse, frames: Sequence[Frame], answer: Answer) -> None:
        wire, delay = answer.wire, getattr(answer, "delay", 0)
        end = "\r\n" if wire.crlf else "\n"
        for index, (name, data) in enumerate(frames):
            if delay and index:
                await asyncio.sleep(delay)
            text = f": keep-alive{end}{end}" if wire.comments else ""
            if wire.event_lines:
                text += f"event: {name or 'message'}{end}id: {index}{end}retry: 10{end}"
            elif name is not None:
                text += f"event: {name}{end}"
            raw = f"{text}data: {data}{end}{end}".encode()
            if wire.split_bytes is None:
                await response.write(raw)
                continue
            for start in range(0, len(raw), wire.split_bytes):
                await response.write(raw[start : start + wire.split_bytes])
                await asyncio.sleep(0)


def _abort(request: web.Request) -> None:
    """Tear the connection down with a reset, as a crashed server's kernel does."""
    if request.transport is not None:
        request.transport.abort()


def _error_response(step: Status, dialect: Dialect) -> web.Response:
    headers = dict(step.headers)
    if step.retry_after is not None:
        headers["Retry-After"] = str(step.retry_after)
    return web.json_response(dialect.error(step), status=step.status, reason=step.phrase, headers=headers)
