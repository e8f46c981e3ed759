"""All that is open: WebSockets and streams, and how they are closed together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from corral.gateway.auth import Authenticator
from corral.gateway.handshake import CloseCode
from corral.storage.api import StoreUnavailable

logger = logging.getLogger(__name__)


class OpenPeer(Protocol):
    """Something open that can be told to close."""

    @property
    def token_hash(self) -> str | None:
        """Of the token that it was opened with; None while nobody has shown one."""
        ...

    @property
    def transport(self) -> str:
        """`websocket` or `sse`."""
        ...

    def begin_close(self, code: CloseCode) -> None: ...


class Peers:
    """What is open now."""

    def __init__(self) -> None:
        self._open: set[OpenPeer] = set()
        self._gone = asyncio.Event()
        self._gone.set()
        self._look = asyncio.Event()
        self.revocations = 0
        """How many tokens were revoked. Who finds this changed between its authentication and `holding` calls
        `look_again`: its token may have been found good just before, and looked for while it was not yet here."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenPeer]:
        return iter(list(self._open))

    def count(self, transport: str) -> int:
        return sum(peer.transport == transport for peer in self._open)

    @contextmanager
    def holding(self, peer: OpenPeer) -> Iterator[None]:
        """Count `peer` among what is open."""
        self.add(peer)
        try:
            yield
        finally:
            self.discard(peer)

    def add(self, peer: OpenPeer) -> None:
        """Count `peer` among what is open, until `discard`: `holding` for who has no room for a context manager."""
        self._open.add(peer)
        self._gone.clear()

    def discard(self, peer: OpenPeer) -> None:
        self._open.discard(peer)
        if not self._open:
            self._gone.set()

    def begin_close(self, code: CloseCode) -> None:
        """Close all. Does not wait."""
        for peer in list(self._open):
            peer.begin_close(code)

    async def gone(self) -> None:
        """Until nothing is open."""
        await self._gone.wait()

    def tokens_changed(self) -> None:
        """A token was revoked: look at those of all that is open now, not at the next interval."""
        self.revocations += 1
        self._look.set()

    def look_again(self) -> None:
        self._look.set()

    async def keep_watch(self, authenticator: Authenticator, interval: float) -> None:
        """For ever: close what was opened with a token that was revoked or has expired since."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), interval)
            self._look.clear()
            try:
                await self._close_revoked(authenticator)
            except StoreUnavailable:
                logger.warning("tokens not looked at", extra={"action": "gateway.recheck_failed", "open": len(self)})

    async def _close_revoked(self, authenticator: Authenticator) -> None:
        """Close what was opened with a token that is revoked or has expired since."""
        shown = {peer.token_hash for peer in self._open if peer.token_hash is not None}
        if not shown:
            return
        valid = await authenticator.still_valid(shown)
        for peer in list(self._open):
            if peer.token_hash in shown - valid:
                peer.begin_close(CloseCode.UNAUTHORIZED)
