"""aiohttp's WebSocket with endings that the other side gets to see."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

from aiohttp import WSCloseCode, WSMsgType, web

_VIOLATIONS = frozenset(
    {int(WSCloseCode.PROTOCOL_ERROR), int(WSCloseCode.INVALID_TEXT), int(WSCloseCode.MESSAGE_TOO_BIG)}
)
_POLL = 0.02


class Socket(web.WebSocketResponse):
    """One WebSocket, accepted from `request`.

    aiohttp closes the transport right behind the close frame when the peer breaks the protocol
    (too big a frame, text that is no UTF-8). What the peer has sent and nobody read then makes
    the kernel reset the connection, and the close code can be lost on the way. Here the
    frame is sent, and the rest is read and thrown away for a little while.
    """

    def __init__(self, request: web.Request, *, heartbeat: float, max_frame_bytes: int, close_grace: float) -> None:
        # aiohttp refuses a frame of `max_msg_size` bytes and more.
        super().__init__(
            heartbeat=heartbeat, max_msg_size=max_frame_bytes + 1, compress=False, timeout=close_grace, autoclose=True
        )
        self._request = request
        self.violation: int | None = None

    async def send_texts(self, frames: Sequence[bytes]) -> None:
        """Send text frames in one write, and wait while the peer does not take them.

        A frame that shares a write costs a sixth of one that has its own: aiohttp makes a write,
        and asks the loop about it, for each. Raises ConnectionError once the socket is closing.
        """
        writer = self._writer
        if writer is None or len(frames) == 1:
            for frame in frames:
                await self.send_frame(frame, WSMsgType.TEXT)
            return
        # aiohttp has no public way to write several frames at once: what follows is its own
        # `_write_websocket_frame` for a server without compression, and its flow control.
        if writer._closing or writer.transport.is_closing():
            raise ConnectionResetError("the socket is closing")
        parts: list[bytes] = []
        for frame in frames:
            parts += (_header(len(frame)), frame)
        writer.transport.write(b"".join(parts))
        if writer.protocol._paused:
            await writer.protocol._drain_helper()

    async def close(self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True) -> bool:
        """aiohttp's own code calls this, on the peer's close and on the peer's errors."""
        if int(code) in _VIOLATIONS:
            if self.violation is None:
                self.violation = int(code)
                await self.send_frame(struct.pack("!H", int(code)), WSMsgType.CLOSE)
            return True
        return await super().close(code=code, message=message, drain=drain)

    async def finish(self, code: int, grace: float) -> None:
        """Close with `code` and wait for the peer to have seen it, for `grace` seconds at most; then cut it off."""
        transport = self._request.transport
        try:
            if self.violation is not None:
                await self._linger(grace)
            elif not self.closed:
                async with asyncio.timeout(grace):
                    await super().close(code=code)
        except (TimeoutError, ConnectionError):
            # The peer did not take the close frame in time, or is gone: there is nobody to tell.
            pass
        finally:
            if transport is not None and (self.violation is not None or _unsent(transport)):
                transport.abort()

    async def _linger(self, grace: float) -> None:
        """Until the peer has hung up. aiohttp discards what comes in after a violation."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        # aiohttp tells a handler of the hang-up in no other way than this.
        while self._request.transport is not None and loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)


def _header(length: int) -> bytes:
    """The header of an unmasked, unfragmented text frame (RFC 6455, section 5.2)."""
    if length < 126:
        return bytes((0x81, length))
    if length < 65_536:
        return struct.pack("!BBH", 0x81, 126, length)
    return struct.pack("!BBQ", 0x81, 127, length)


def _unsent(transport: asyncio.Transport) -> bool:
    return not transport.is_closing() or transport.get_write_buffer_size() > 0
