"""Many WebSockets in one process that costs as little as can be: they count what comes.

`python -m bench.subscribers` takes one JSON object a line on standard input and answers each with one:

- `{"do": "open", "port": p, "count": n, "say": [text…], "answers": a}`: n more sockets to /ws, each says its
  texts and has got `a` text frames since;
- `{"do": "say", "text": t}`: each says t and has got one more text frame than before;
- `{"do": "arm", "end": beginning}`: count anew, until each has got a frame that begins so;
- `{"do": "wait", "seconds": s}`: until then; `{"seconds", "frames", "bytes"}` from the first frame that any of
  them got to the last that all waited for.

It ends when its standard input does. An answer with `error` says what went wrong.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import uvloop

_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10
_AT_ONCE = 50
_HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Failed(Exception):
    """What the others are told of as `error`."""


def masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame (RFC 6455, section 5.2). The mask is zero: it hides nothing here."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, 0x80 | size)) + bytes(4) + payload
    return bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big") + bytes(4) + payload


class Counter:
    """What all sockets of this process got since `arm`."""

    def __init__(self) -> None:
        self.end = b""
        self.frames = self.bytes = self.waited_for = 0
        self.first = self.last = 0.0
        self.done = asyncio.Event()
        self.lost: str | None = None

    def arm(self, end: bytes, sockets: int) -> None:
        self.end, self.waited_for = end, sockets
        self.frames = self.bytes = 0
        self.first = self.last = 0.0
        self.done.clear()

    def ended(self) -> None:
        self.waited_for -= 1
        if self.waited_for == 0:
            self.last = time.perf_counter()
            self.done.set()

    def lose(self, why: str) -> None:
        self.lost = self.lost or why
        self.done.set()


class Peer(asyncio.Protocol):
    """One socket. It walks from frame to frame by their lengths and looks at their beginnings alone."""

    def __init__(self, counter: Counter, port: int) -> None:
        self._counter = counter
        self._port = port
        self._rest = b""
        self._upgraded = False
        self._transport: asyncio.Transport | None = None
        self._target = 0
        self._reached: asyncio.Future[None] | None = None
        self.texts = 0

    async def until(self, more: int) -> None:
        """Until so many more text frames have come (0: until the upgrade)."""
        self._target = self.texts + more
        if more == 0 and self._upgraded:
            return
        self._reached = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(60):
            await self._reached

    def say(self, text: str) -> None:
        assert self._transport is not None
        self._transport.write(masked(_TEXT, text.encode()))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes, only alike. Both set TCP_NODELAY.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(_HANDSHAKE % self._port)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"a socket was closed: {exc}")

    def _fail(self, why: str) -> None:
        self._counter.lose(why)
        if self._reached is not None and not self._reached.done():
            self._reached.set_exception(Failed(why))

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        if not self._upgraded:
            head, found, after = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = data
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._fail(head.decode("latin-1")[:200])
                return
            self._upgraded, data = True, after
            self._look()
        self._rest = self._walk(data)

    def _walk(self, data: bytes) -> bytes:
        """Take the whole frames; what is left over."""
        at, end = 0, len(data)
        while end - at >= 2:
            size, start = data[at + 1] & 127, at + 2
            if size == 126:
                start += 2
                if end < start:
                    break
                size = int.from_bytes(data[at + 2 : start], "big")
            elif size == 127:
                start += 8
                if end < start:
                    break
                size = int.from_bytes(data[at + 2 : start], "big")
            if end < start + size:
                break
            opcode = data[at] & 15
            if opcode == _TEXT:
                self._take(data, start, size)
            else:
                self._control(opcode, data[start : start + size])
            at = start + size
        return data[at:]

    def _take(self, data: bytes, start: int, size: int) -> None:
        self.texts += 1
        counter = self._counter
        counter.frames += 1
        counter.bytes += size
        if not counter.first:
            counter.first = time.perf_counter()
        if counter.end and data.startswith(counter.end, start):
            counter.ended()
        if self.texts == self._target:
            refused = data.startswith(b'{"type":"res"', start) and b'"ok":false' in data[start : start + 200]
            if refused and self._reached is not None and not self._reached.done():
                self._fail(data[start : start + min(size, 300)].decode())
            self._look()

    def _look(self) -> None:
        if self._reached is not None and self.texts >= self._target and not self._reached.done():
            self._reached.set_result(None)

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == _PING and self._transport is not None:
            self._transport.write(masked(_PONG, payload))
        elif opcode == _CLOSE:
            self._fail(f"closed with {int.from_bytes(payload[:2], 'big')}")


class Subscribers:
    """The commands."""

    def __init__(self) -> None:
        self._counter = Counter()
        self._peers: list[Peer] = []

    async def open(self, port: int, count: int, say: list[str], answers: int) -> dict[str, Any]:
        for start in range(0, count, _AT_ONCE):
            await asyncio.gather(*(self._open_one(port, say, answers) for _ in range(min(_AT_ONCE, count - start))))
        return {"open": len(self._peers)}

    async def _open_one(self, port: int, say: list[str], answers: int) -> None:
        loop = asyncio.get_running_loop()
        _, peer = await loop.create_connection(lambda: Peer(self._counter, port), "127.0.0.1", port)
        await peer.until(0)
        for text in say:
            peer.say(text)
        await peer.until(answers)
        self._peers.append(peer)

    async def say(self, text: str) -> dict[str, Any]:
        for start in range(0, len(self._peers), _AT_ONCE):
            some = self._peers[start : start + _AT_ONCE]
            waits = [asyncio.ensure_future(peer.until(1)) for peer in some]
            await asyncio.sleep(0)
            for peer in some:
                peer.say(text)
            await asyncio.gather(*waits)
        return {"said": len(self._peers)}

    async def arm(self, end: str) -> dict[str, Any]:
        self._counter.arm(end.encode(), len(self._peers))
        return {"armed": len(self._peers)}

    async def wait(self, seconds: float) -> dict[str, Any]:
        counter = self._counter
        try:
            async with asyncio.timeout(seconds):
                await counter.done.wait()
        except TimeoutError:
            raise Failed(f"{counter.waited_for} sockets wait for the last frame after {seconds:g} s") from None
        if counter.lost is not None:
            raise Failed(counter.lost)
        return {"seconds": counter.last - counter.first, "frames": counter.frames, "bytes": counter.bytes}


async def main() -> None:
    subscribers = Subscribers()
    commands: dict[str, Callable[..., Any]] = {
        "open": subscribers.open,
        "say": subscribers.say,
        "arm": subscribers.arm,
        "wait": subscribers.wait,
    }
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        message = json.loads(line)
        try:
            answer = await commands[message.pop("do")](**message)
        except (Failed, OSError, TimeoutError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
