"""A test client for the wire: WebSocket, `/rpc`, and sockets without any library's help.

    async with await Wire.open(url) as wire:
        await wire.connect(token)
        run = await wire.request("agent.run", {"input": "hi", "idempotencyKey": "k"})
        await wire.event("agent.completed")

Every frame that arrives is kept in `frames`. The client itself checks what must always hold:
`seq` counts 1, 2, 3, …; no durable event comes twice; within a session the durable versions
ascend (`ordered=False` where a test asks for older ones later).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import socket
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import aiohttp

from tests.support.invariants import Promise

TIMEOUT = 60.0
TRANSIENT = frozenset({"agent.delta"})

_keys = itertools.count(1)

Json = dict[str, Any]


def new_key() -> str:
    """An idempotency key that no other call has."""
    return f"key-{os.getpid()}-{next(_keys)}"


class Refused(Exception):
    """A response with `ok: false`."""

    def __init__(self, error: Json) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code: str = error["code"]
        self.message: str = error["message"]
        self.error = error


class Gone(AssertionError):
    """The connection ended before what was waited for had come."""


class Wire:
    """One WebSocket. `frames` has all that came, `events` the events, `close_code` how it ended."""

    def __init__(
        self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, *, ordered: bool
    ) -> None:
        self._session = session
        self._socket = socket
        self._ordered = ordered
        self._ids = itertools.count(1)
        self._versions: dict[str, set[int]] = {}
        self._highest: dict[str, int] = {}
        self._news = asyncio.Condition()
        self._broken: str | None = None
        self._sent: dict[str, tuple[str, Json]] = {}
        self.frames: list[Json] = []
        self.close_code: int | None = None
        self.hello: Json = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(
        cls, url: str, *, headers: Mapping[str, str] | None = None, ordered: bool = True, autoping: bool = True
    ) -> Wire:
        """Upgrade `URL/ws`. Raises aiohttp.WSServerHandshakeError if that is refused."""
        session = aiohttp.ClientSession()
        try:
            socket = await session.ws_connect(
                f"{url}/ws", headers=headers, max_msg_size=0, autoclose=True, autoping=autoping
            )
        except BaseException:
            await session.close()
            raise
        return cls(session, socket, ordered=ordered)

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
        if error is None:
            self.check()

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()
        await asyncio.wait({self._reader})

    def cut(self) -> None:
        """End the connection as a network does: no close frame, and no answer to what is under way."""
        sock = self._socket.get_extra_info("socket")
        # It may be gone already.
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raises AssertionError if anything that came broke a rule that always holds."""
        assert self._broken is None, self._broken

    # ---- sending

    async def send(self, frame: Any) -> None:
        """Send text as it is, anything else as JSON."""
        await self._socket.send_str(frame if isinstance(frame, str) else json.dumps(frame))

    async def send_bytes(self, data: bytes) -> None:
        await self._socket.send_bytes(data)

    async def start(self, method: str, params: Any = None, *, frame_id: str | None = None) -> str:
        """Send a request without waiting; its id."""
        frame_id = frame_id or f"r{next(self._ids)}"
        frame: Json = {"type": "req", "id": frame_id, "method": method}
        if params is not None:
            frame["params"] = params
        self._sent[frame_id] = (method, params if isinstance(params, dict) else {})
        await self.send(frame)
        return frame_id

    async def response(self, frame_id: str) -> Json:
        """The response to the request of that id."""
        return await self.frame(lambda frame: frame["type"] == "res" and frame["id"] == frame_id)

    async def call(self, method: str, params: Any = None) -> Json:
        """Send a request; its response frame, whatever it says."""
        return await self.response(await self.start(method, params))

    async def request(self, method: str, params: Any = None) -> Any:
        """Send a request; its payload. Raises Refused."""
        response = await self.call(method, params)
        if not response["ok"]:
            raise Refused(response["error"])
        return response["payload"]

    async def effect(self, method: str, **params: Any) -> Any:
        """`request` with a fresh idempotency key."""
        return await self.request(method, {"idempotencyKey": new_key(), **params})

    async def connect(self, token: str | None, **params: Any) -> Json:
        """The handshake; the payload. Raises Refused."""
        if token is not None:
            params["auth"] = {"token": token}
        self.hello = await self.request("connect", params)
        return self.hello

    # ---- receiving

    @property
    def events(self) -> list[Json]:
        return [frame for frame in self.frames if frame["type"] == "event"]

    @property
    def durable(self) -> list[Json]:
        return [frame for frame in self.events if frame["event"] not in TRANSIENT]

    @property
    def promises(self) -> list[Promise]:
        """What was asked for here and answered with `ok: true`, once this client is connected."""
        if not self.hello:
            return []
        who = self.hello["principal"]
        return [
            Promise(who["tenantId"], who["subject"], *self._sent[frame["id"]], frame["payload"])
            for frame in self.frames
            if frame["type"] == "res" and frame["ok"] and frame["id"] in self._sent
        ]

    def index(self, wanted: Callable[[Json], bool]) -> int:
        """Where the first such frame stands among all that came."""
        return next(place for place, frame in enumerate(self.frames) if wanted(frame))

    async def frame(self, wanted: Callable[[Json], bool], timeout: float = TIMEOUT) -> Json:
        """The first frame of that kind, come already or still to come."""
        found: list[Json] = []

        def there() -> bool:
            found[:] = [frame for frame in self.frames if wanted(frame)][:1]
            return bool(found) or self.close_code is not None

        async with self._news:
            async with asyncio.timeout(timeout):
                await self._news.wait_for(there)
        if not found:
            raise Gone(f"closed with {self.close_code} before that frame came; last: {self.frames[-3:]}")
        return found[0]

    async def event(self, name: str, timeout: float = TIMEOUT, **payload: Any) -> Json:
        """The first event of that name whose payload has these fields."""
        return await self.frame(lambda frame: is_event(frame, name, **payload), timeout)

    async def until(self, holds: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        """Wait until `holds()` after some frame."""
        async with self._news:
            async with asyncio.timeout(timeout):
                await self._news.wait_for(lambda: holds() or self.close_code is not None)
        if not holds():
            raise Gone(f"closed with {self.close_code} before that held")

    async def closed(self, timeout: float = TIMEOUT) -> int:
        """Wait for the server to close; the code."""
        async with self._news:
            async with asyncio.timeout(timeout):
                await self._news.wait_for(lambda: self.close_code is not None)
        assert self.close_code is not None
        return self.close_code

    async def _read(self) -> None:
        while True:
            message = await self._socket.receive()
            async with self._news:
                if message.type is aiohttp.WSMsgType.TEXT:
                    frame = json.loads(message.data)
                    self._check(frame)
                    self.frames.append(frame)
                elif message.type in (aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG):
                    pass
                else:
                    self.close_code = self._socket.close_code or 1006
                self._news.notify_all()
                if self.close_code is not None:
                    return

    def _check(self, frame: Json) -> None:
        if frame["type"] != "event":
            return
        seq = self._next_seq()
        if frame["seq"] != seq:
            self._broken = self._broken or f"seq {frame['seq']} where {seq} was due"
        session, version = frame["payload"]["sessionId"], frame["stateVersion"]
        if frame["event"] in TRANSIENT:
            return
        had = self._versions.setdefault(session, set())
        if version in had:
            self._broken = self._broken or f"{session} version {version} came twice"
        if self._ordered and version < self._highest.get(session, 0):
            self._broken = self._broken or f"{session} version {version} came after {self._highest[session]}"
        had.add(version)
        self._highest[session] = max(version, self._highest.get(session, 0))

    def _next_seq(self) -> int:
        for frame in reversed(self.frames):
            if frame["type"] == "event":
                return int(frame["seq"]) + 1
        return 1

    def forget_versions(self, session_id: str) -> None:
        """For tests that delete a session and make it anew: its versions begin again."""
        self._versions.pop(session_id, None)
        self._highest.pop(session_id, None)

    def versions(self, session_id: str) -> list[int]:
        """The durable versions of a session in the order in which they came."""
        return [frame["stateVersion"] for frame in self.durable if frame["payload"]["sessionId"] == session_id]


def is_event(frame: Json, name: str, **payload: Any) -> bool:
    return (
        frame["type"] == "event"
        and frame["event"] == name
        and all(frame["payload"].get(key) == value for key, value in payload.items())
    )


def is_response(frame: Json, frame_id: str) -> bool:
    return bool(frame["type"] == "res" and frame["id"] == frame_id)


class Answer:
    """What `/rpc` answered: `status`, `headers`, and the two halves of the body."""

    def __init__(self, status: int, headers: Mapping[str, str], body: Json) -> None:
        self.status = status
        self.headers = headers
        assert set(body) == {"response", "events"}, body
        self.response: Json = body["response"]
        self.events: list[Json] = body["events"]

    @property
    def code(self) -> str | None:
        error = self.response.get("error")
        return error["code"] if error else None


async def rpc(
    url: str,
    method: str | None = None,
    params: Any = None,
    *,
    token: str | None = None,
    body: bytes | None = None,
    verb: str = "POST",
    path: str = "/rpc",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request to `/rpc`. `body` instead of `method` sends those bytes."""
    sent = {"Content-Type": "application/json"}
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    sent.update(headers or {})
    if body is None:
        frame = {"type": "req", "id": "h1", "method": method}
        body = json.dumps(frame if params is None else {**frame, "params": params}).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.request(verb, url + path, data=io.BytesIO(body), headers=sent) as response,
    ):
        return Answer(response.status, response.headers, json.loads(await response.read()))


async def raw_http(url: str, request: bytes, *, timeout: float = 10.0) -> tuple[int, str]:
    """Send bytes, read to the end of the head; (status, everything that came). 0: closed without an answer."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    try:
        writer.write(request)
        await writer.drain()
        text = b""
        async with asyncio.timeout(timeout):
            while b"\r\n\r\n" not in text:
                chunk = await reader.read(65536)
                if not chunk:
                    break
                text += chunk
        head = text.decode("latin-1")
        return (int(head.split(" ", 2)[1]) if head.startswith("HTTP/") else 0), head
    finally:
        writer.close()
        # The server may have hung up first; that is not what is tested here.
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def upgrade_request(*headers: str, path: str = "/ws") -> bytes:
    """The bytes of a WebSocket upgrade with exactly these further headers: Host is not among them by itself."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
