"""What waits to be written to one socket: bounded, in order, counted when it leaves."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

from corral.bus.api import Delta
from corral.gateway.frames import EventFrame, delta_frame


class _WaitingText:
    """Deltas of one message that wait together: contiguous text under one stateVersion."""

    __slots__ = ("delta", "end", "frame", "pieces", "size", "version")

    def __init__(self, delta: Delta, version: int, frame: EventFrame) -> None:
        self.delta = delta
        self.version = version
        self.frame: EventFrame | None = frame
        self.pieces = [delta.text]
        self.end = delta.offset + len(delta.text)
        self.size = frame.size

    def takes(self, delta: Delta, version: int) -> bool:
        return (
            version == self.version
            and delta.offset == self.end
            and delta.message_id == self.delta.message_id
            and delta.run_id == self.delta.run_id
        )

    def add(self, delta: Delta) -> int:
        """Append the text; by how many bytes it grew."""
        self.frame = None
        self.pieces.append(delta.text)
        self.end += len(delta.text)
        grown = len(delta.text.encode("utf-8", "replace"))
        self.size += grown
        return grown

    def event(self) -> EventFrame:
        return self.frame or delta_frame(self.delta, "".join(self.pieces), self.version)


_Item = bytes | EventFrame | _WaitingText


class Outbox:
    """The frames that wait for one socket, and the connection's `seq`.

    Everything is called on the event loop and nothing but `wait` and `wait_below` waits. Once more than
    `max_bytes` or `max_frames` wait, what waits is forgotten, later frames too, and
    `on_overflow` is called, once. A single frame beyond `max_bytes` passes if it is alone. `sent` counts
    the events that leave, by name. `on_waiting` is called when a frame waits where none did: for
    who does not stand by in `wait`.

    Most outboxes are empty most of the time, thousands of them: what an empty one does not need it does not have.
    """

    def __init__(
        self,
        max_bytes: int,
        max_frames: int,
        on_overflow: Callable[[], None],
        sent: Counter[str] | None = None,
        on_waiting: Callable[[], None] | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_frames = max_frames
        self._on_overflow = on_overflow
        self._sent: Counter[str] = Counter() if sent is None else sent
        self._on_waiting = on_waiting
        self._items: deque[_Item] | tuple[()] = ()
        # The waiting text of each session that the next delta may be merged into.
        self._text: dict[str, _WaitingText] = {}
        self._bytes = 0
        self._seq = 0
        self.taken = 0
        self._open = True
        self._changed: asyncio.Event | None = None
        self._drained: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def waiting_bytes(self) -> int:
        return self._bytes

    @property
    def waiting_frames(self) -> int:
        return len(self._items)

    def put(self, frame: bytes) -> None:
        """Add a response."""
        self._add(frame, len(frame))

    def put_event(self, frame: EventFrame) -> None:
        """Add an event; its seq is given when it leaves."""
        self._add(frame, frame.size)

    def put_delta(self, delta: Delta, version: int, frame: EventFrame) -> None:
        """Add live text under `version`; `frame` is the two as an event, shared among connections.

        Text that goes on where waiting text of the same message ends is merged into it,
        unless a durable event of the session came in between (its version tells).
        """
        waiting = self._text.get(delta.session_id)
        if waiting is not None and waiting.takes(delta, version):
            self._bytes += waiting.add(delta)
            self._check()
            return
        text = _WaitingText(delta, version, frame)
        if self._add(text, text.size):
            self._text[delta.session_id] = text

    def take(self) -> bytes | None:
        """The next frame, ready to be written with its `seq`, or None if none waits."""
        item = self.take_item()
        if isinstance(item, EventFrame):
            self._seq += 1
            return item.numbered(self._seq)
        return item

    def take_item(self) -> bytes | EventFrame | None:
        """The next response or event, or None if none waits."""
        if not self._items:
            return None
        item = self._items.popleft()
        if not self._items:
            self._items = ()
        self.taken += 1
        if isinstance(item, bytes):
            self._release(len(item))
            return item
        if isinstance(item, _WaitingText):
            if self._text.get(item.delta.session_id) is item:
                del self._text[item.delta.session_id]
            self._release(item.size)
            item = item.event()
        else:
            self._release(item.size)
        self._sent[item.event] += 1
        return item

    async def wait(self) -> bool:
        """Until a frame waits (True) or the outbox was finished and is empty (False)."""
        if self._changed is None:
            self._changed = asyncio.Event()
        while not self._items:
            if not self._open:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    async def wait_below(self, mark: int) -> None:
        """Until at most `mark` bytes wait, or nothing is taken any more."""
        while self._bytes > mark and self._open:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._drained.append((mark, waiter))
            await waiter

    def finish(self) -> None:
        """Take nothing more; what waits may still be written."""
        self._open = False
        if self._changed is not None:
            self._changed.set()
        self._wake(always=True)

    def discard(self) -> None:
        """Take nothing more and forget what waits."""
        self._items = ()
        self._text.clear()
        self._bytes = 0
        self.finish()

    def _add(self, item: _Item, size: int) -> bool:
        if not self._open:
            return False
        if not self._items:
            self._items = deque()
            if self._changed is not None:
                self._changed.set()
            if self._on_waiting is not None:
                self._on_waiting()
        self._items.append(item)
        self._bytes += size
        return self._check()

    def _check(self) -> bool:
        full = self._bytes > self._max_bytes and len(self._items) > 1
        if full or len(self._items) > self._max_frames:
            self.discard()
            self._on_overflow()
            return False
        return True

    def _release(self, size: int) -> None:
        self._bytes -= size
        if self._drained:
            self._wake(always=False)

    def _wake(self, *, always: bool) -> None:
        still: list[tuple[int, asyncio.Future[None]]] = []
        for mark, waiter in self._drained:
            if waiter.done():
                continue
            if always or self._bytes <= mark:
                waiter.set_result(None)
            else:
                still.append((mark, waiter))
        self._drained = still
