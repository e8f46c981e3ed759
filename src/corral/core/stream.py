"""Following one run: its durable events from the journal and its live text from the bus, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from corral.bus.api import Bus, Delta, Notice
from corral.protocol.events import TERMINAL_EVENTS
from corral.storage.api import Store
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry

_PAGE = 200
# A reader that lags this far behind loses live text, never events: those are read from the store.
_WAITING_MOST = 1000


async def follow(
    store: Store, bus: Bus, tenant_id: str, session_id: str, run_id: str, after: int
) -> AsyncIterator[Notice]:
    """Yield the run's events with a version above `after`, and its deltas, up to its terminal event."""
    queue: asyncio.Queue[Notice] = asyncio.Queue(_WAITING_MOST)

    def hear(notice: Notice) -> None:
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(notice)

    unsubscribe = bus.on_session(tenant_id, session_id, hear)
    try:
        position = after
        while True:
            page = await store.read(partial(_page, tenant_id, session_id, position))
            for entry in page:
                position = entry.version
                if entry.run_id == run_id:
                    yield entry
                    if entry.event in TERMINAL_EVENTS:
                        return
            if len(page) == _PAGE:
                continue
            async for notice in _live(queue, position, run_id):
                yield notice
                if isinstance(notice, JournalEntry):
                    position = notice.version
                    if notice.event in TERMINAL_EVENTS:
                        return
    finally:
        unsubscribe()


async def _live(queue: asyncio.Queue[Notice], position: int, run_id: str) -> AsyncIterator[Notice]:
    """What the bus tells of the run, until it skips a version and the journal must be asked."""
    while True:
        notice = await queue.get()
        if isinstance(notice, Delta):
            if notice.run_id == run_id:
                yield notice
        elif notice.version > position + 1:
            return
        elif notice.version == position + 1:
            position = notice.version
            if notice.run_id == run_id:
                yield notice


def _page(tenant_id: str, session_id: str, version: int, tx: Transaction) -> list[JournalEntry]:
    return tx.journal.after(tenant_id, session_id, version, _PAGE)
