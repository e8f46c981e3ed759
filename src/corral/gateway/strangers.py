"""TCP connections on which nobody has shown a good token: how long they may idle, and how many of them there may be.

The limits on sockets, bodies and guesses begin with a request. Who never finishes one (a header a minute, or nothing
at all) is known to none of them, and every connection takes one of the descriptors that the store and the tools need.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from aiohttp import web


class Strangers:
    """The connections of strangers, oldest first. At most `limit`: for one too many the oldest idle one is cut off."""

    def __init__(self, idle: float, kept: float, limit: int) -> None:
        """`idle` is how many seconds a request may take to come, `kept` how many after an answer the next one may."""
        self.idle = idle
        self.kept = kept
        self._limit = min(limit, _descriptors() // 2)
        self._open: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> None:
        self._open[connection] = None
        if len(self._open) > self._limit:
            oldest = next((each for each in self._open if not each.answering), None)
            if oldest is not None:
                oldest.cut()

    def discard(self, connection: Connection) -> None:
        self._open.pop(connection, None)


class Connection(web.RequestHandler):
    """A connection, which is a stranger's until `admitted`."""

    __slots__ = ("_answered", "_strangers", "_timer", "_until")

    def __init__(self, server: web.Server, strangers: Strangers, options: dict[str, Any]) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._strangers = strangers
        self._timer: asyncio.TimerHandle | None = None
        self._answered = False
        self._until = 0.0

    @property
    def answering(self) -> bool:
        """Whether a request has come whole, as far as its head goes, and is being answered."""
        return self._request_in_progress

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._watch(self._strangers.idle)
        self._until = asyncio.get_running_loop().time() + self._strangers.idle
        self._strangers.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.admitted()
        super().connection_lost(exc)

    def admitted(self) -> None:
        """Somebody known speaks here, or a socket with a deadline of its own was opened."""
        self._strangers.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def answered(self) -> None:
        """A request has its answer: the next may take longer than the first one, as a probe's or a proxy's does."""
        self._answered = True
        self._until = asyncio.get_running_loop().time() + self._strangers.kept

    def cut(self) -> None:
        """End it, without a word."""
        self.admitted()
        if self.transport is not None:
            # In order where nothing is owed: who is about to send the next request learns it was not taken.
            if self._answered:
                self.transport.close()
            else:
                self.transport.abort()

    def _watch(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        left = self._until - asyncio.get_running_loop().time()
        if self.answering:
            self._watch(self._strangers.idle)
        elif left > 0:
            self._watch(left)
        else:
            self.cut()


def admitted(request: web.BaseRequest) -> None:
    """The request's connection is no stranger's any more."""
    connection = request.protocol
    if isinstance(connection, Connection):
        connection.admitted()


def answered(request: web.BaseRequest) -> None:
    """A request of the connection has been answered, whoever sent it."""
    connection = request.protocol
    if isinstance(connection, Connection):
        connection.answered()


def _descriptors() -> int:
    """How many files and sockets this process may have open."""
    try:
        import resource
    except ImportError:
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
