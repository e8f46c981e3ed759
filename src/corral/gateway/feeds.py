"""What one connection follows: sessions, each from its own position, and workspaces' feeds.

A position is a durable version; the store is the truth and the bus only wakes. A live entry
that is the next one is sent as it comes, one further on means that something was missed and
sends the feed to the store, one further back was had. So no order of listeners, reads and
commits makes a gap or a repeat.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from corral.bus.api import Bus, Delta, Notice
from corral.gateway.cursors import FeedCursors
from corral.gateway.eventcache import EventCache
from corral.gateway.options import GatewayOptions
from corral.gateway.outbox import Outbox
from corral.governance.access import visible_session
from corral.governance.caller import Caller
from corral.protocol.errors import LimitReached
from corral.storage.api import Store, StoreUnavailable
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry

if TYPE_CHECKING:
    from corral.gateway.workspace_feed import WorkspaceFeed, WorkspaceHub

logger = logging.getLogger(__name__)

T = TypeVar("T")
_RETRY_FIRST, _RETRY_MOST = 0.2, 2.0


class Peer(Protocol):
    """What a feed needs of its connection."""

    @property
    def id(self) -> str:
        """`conn_…`."""
        ...

    @property
    def outbox(self) -> Outbox: ...

    @property
    def effects_in_flight(self) -> int:
        """How many requests with side effects wait for their answer."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run beside the connection and end with it."""
        ...

    def too_slow(self) -> None:
        """The client does not read what it asked for."""
        ...


class FeedSystem:
    """What all connections' feeds share."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        cursors: FeedCursors,
        options: GatewayOptions,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self.store = store
        self.bus = bus
        self.cursors = cursors
        self.cache = EventCache(cursors)
        self.options = options
        self.spawn = spawn
        self.hubs: dict[tuple[str, str], WorkspaceHub] = {}

    async def read(self, query: Callable[[Transaction], T]) -> T:
        """Read from the store, again and again while it cannot be read."""
        pause = _RETRY_FIRST
        while True:
            try:
                return await self.store.read(query)
            except StoreUnavailable:
                logger.warning("feed waits for the store", extra={"action": "feed.store_unavailable"})
                await asyncio.sleep(pause)
                pause = min(_RETRY_MOST, pause * 2)


class ConnectionFeeds:
    """The subscriptions of one connection.

    `on_end` is told of a session whose subscription ended by itself: it is deleted, or not to be seen any more.
    """

    def __init__(self, system: FeedSystem, peer: Peer, on_end: Callable[[str], None] | None = None) -> None:
        self.system = system
        self.peer = peer
        self.on_end = on_end
        self.sessions: dict[str, SessionFeed] = {}
        self.workspaces: dict[str, WorkspaceFeed] = {}
        self._beginning: asyncio.Lock | None = None
        self._reserved = 0
        self._closed = False

    @property
    def beginning(self) -> asyncio.Lock:
        """Held while a workspace's subscription is made, which takes a read."""
        if self._beginning is None:
            self._beginning = asyncio.Lock()
        return self._beginning

    @property
    def count(self) -> int:
        return len(self.sessions) + len(self.workspaces)

    @contextmanager
    def room(self, known: bool) -> Iterator[None]:
        """Hold a place for one more subscription; `known` says that none is needed.

        At the limit the oldest subscription that a run made by itself gives way if its
        session is idle: a client that runs and runs need not tidy up. Else raises LimitReached.
        """
        if known:
            yield
            return
        if self.count + self._reserved >= self.system.options.max_subscriptions and not self._drop_idle():
            raise LimitReached(
                f"this connection has {self.system.options.max_subscriptions} subscriptions: "
                "end some with events.unsubscribe"
            )
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    def follow(
        self, caller: Caller, session_id: str, workspace_id: str, after: int, *, by_run: bool, fresh: bool = False
    ) -> SessionFeed:
        """Follow a session from version `after`, or extend what is followed of it back to there.

        Returns a feed that hears and keeps still until it is told `go`: the caller answers in
        between. `fresh` says that the session stands at `after` right now.
        """
        if self._closed:
            # What a client asked for is committed though it has gone: nobody follows it here.
            feed = SessionFeed(self, caller, session_id, workspace_id, after, by_run=by_run)
            feed.stop()
            return feed
        standing = self.sessions.get(session_id)
        if standing is not None and fresh and standing.position > after:
            # It followed a session of this id that is deleted and made anew.
            self.drop_session(session_id)
            standing = None
        if standing is not None:
            standing.extend(after, by_run=by_run)
            return standing
        feed = self.sessions[session_id] = SessionFeed(self, caller, session_id, workspace_id, after, by_run=by_run)
        return feed

    def drop_session(self, session_id: str) -> None:
        feed = self.sessions.pop(session_id, None)
        if feed is not None:
            feed.stop()

    def drop_workspace(self, workspace_id: str) -> None:
        feed = self.workspaces.pop(workspace_id, None)
        if feed is not None:
            feed.stop()
            self.recheck(workspace_id)

    def recheck(self, workspace_id: str) -> None:
        """Entries may have been under way to this workspace's sessions through a feed that stopped carrying them."""
        for feed in list(self.sessions.values()):
            if feed.workspace_id == workspace_id:
                feed.recheck()

    def close(self) -> None:
        """End every subscription, for good."""
        self._closed = True
        for session in self.sessions.values():
            session.stop()
        for workspace in self.workspaces.values():
            workspace.stop()
        self.sessions.clear()
        self.workspaces.clear()

    async def settled(self) -> None:
        """Until what this connection's own requests committed so far is answered.

        A read may see a commit whose answer is still on its way to the loop; its events must
        not overtake the answer. An empty unit of work comes back after all earlier ones.
        """
        if self.peer.effects_in_flight:
            try:
                await self.system.store.write(lambda _tx: None)
            except StoreUnavailable:
                # Nothing is committed then, so nothing can be overtaken.
                return

    async def wait_for_reader(self) -> bool:
        """Until the client has read most of what waits; False if it does not read at all."""
        outbox, options = self.peer.outbox, self.system.options
        # Closed, the outbox wakes who waits for it whatever still lies in it: this must not ask it again.
        while not self._closed and outbox.waiting_bytes > options.outbox_mark_bytes:
            before = outbox.taken
            try:
                async with asyncio.timeout(options.stall_timeout):
                    await outbox.wait_below(options.outbox_mark_bytes)
            except TimeoutError:
                if outbox.taken == before:
                    self.peer.too_slow()
                    return False
        return True

    def _drop_idle(self) -> bool:
        for session_id, feed in self.sessions.items():
            if feed.by_run and feed.idle:
                self.drop_session(session_id)
                return True
        return False


class FeedState(Enum):
    NEW = "new"
    CATCHING_UP = "catching_up"
    LIVE = "live"
    STOPPED = "stopped"


class SessionFeed:
    """One session on one connection: versions `low + 1` to `position` have been sent."""

    def __init__(
        self, feeds: ConnectionFeeds, caller: Caller, session_id: str, workspace_id: str, after: int, *, by_run: bool
    ) -> None:
        self._feeds = feeds
        self._system = feeds.system
        self._caller = caller
        self.session_id = session_id
        self.workspace_id = workspace_id
        self.low = self.position = self._wanted = after
        self.by_run = by_run
        self.idle = False
        self.state = FeedState.NEW
        self._catching_up = False
        # The greatest version heard of, sent or not.
        self._heard = after
        # The message being written, and where its next delta must start.
        self._message: str | None = None
        self._offset = 0
        # The last message and the last run that ended: live text of theirs comes too late.
        self._ended_message: str | None = None
        self._ended_run: str | None = None
        self._unsubscribe = self._system.bus.on_session(caller.tenant_id, session_id, self._hear)

    def extend(self, after: int, *, by_run: bool) -> None:
        """Ask for everything after version `after` that this subscription has not sent."""
        self._wanted = min(self._wanted, after)
        self.by_run = self.by_run and by_run

    def go(self, *, fresh: bool = False) -> None:
        """Start sending. `fresh` says that nothing durable can lie between `position` and the next live entry."""
        if self.state is FeedState.NEW and fresh:
            self.state = FeedState.LIVE
        elif self.state is FeedState.NEW or (self.state is FeedState.LIVE and self._wanted < self.low):
            self._catch_up()

    def recheck(self) -> None:
        """Look into the store for anything missed."""
        if self.state is FeedState.LIVE:
            self._catch_up()

    def stop(self) -> None:
        """Hear and send no more."""
        self.state = FeedState.STOPPED
        self._unsubscribe()

    def offer(self, entry: JournalEntry, *, with_cursor: bool) -> None:
        """A live entry: send it if it is the next, catch up if it lies further on."""
        self._heard = max(self._heard, entry.version)
        if self.state is not FeedState.LIVE or entry.version <= self.position:
            return
        if entry.version > self.position + 1:
            self._catch_up()
            return
        facts = self._system.cache.facts(entry)
        if facts.session is not None and not self._may_see(facts.session.owner_user_id, facts.session.visibility):
            self._end()
            return
        self._send(entry, with_cursor=with_cursor)
        if facts.deleted:
            self._end()

    def _hear(self, notice: Notice) -> None:
        if isinstance(notice, Delta):
            self._hear_delta(notice)
            return
        workspace = self._feeds.workspaces.get(self.workspace_id)
        if workspace is not None and workspace.live:
            # It comes through the workspace's feed, in that feed's order, with its cursor.
            self._heard = max(self._heard, notice.version)
            return
        self.offer(notice, with_cursor=False)

    def _send(self, entry: JournalEntry, *, with_cursor: bool) -> None:
        cache = self._system.cache
        facts = cache.facts(entry)
        self._feeds.peer.outbox.put_event(cache.with_cursor(entry) if with_cursor else cache.full(entry))
        if entry.version <= self.position:
            return
        self.position = entry.version
        if facts.ended_message is not None:
            self._ended_message = facts.ended_message
        if facts.run_ended:
            self._ended_run = entry.run_id
        if facts.run_began or facts.run_ended:
            self.idle = facts.run_ended

    # ---- live text

    def _hear_delta(self, delta: Delta) -> None:
        # Text that belongs behind a durable event which has not been sent waits for it: the
        # end of the catch-up, or the next delta, sends the whole text so far.
        if self.state is not FeedState.LIVE or not self._in_time(delta):
            return
        if delta.offset == 0 or (delta.message_id == self._message and delta.offset == self._offset):
            self._send_delta(delta)
        elif delta.message_id != self._message or delta.offset > self._offset:
            self._send_text_so_far()

    def _send_text_so_far(self) -> None:
        live = self._system.bus.live_message(self._caller.tenant_id, self.session_id)
        if live is not None and self._in_time(live):
            self._send_delta(live)

    def _in_time(self, delta: Delta) -> bool:
        ended = delta.message_id == self._ended_message or delta.run_id == self._ended_run
        return not ended and delta.version <= self.position

    def _send_delta(self, delta: Delta) -> None:
        self._message = delta.message_id
        self._offset = delta.offset + len(delta.text)
        frame = self._system.cache.delta(delta, self.position)
        self._feeds.peer.outbox.put_delta(delta, self.position, frame)

    # ---- catching up

    def _catch_up(self) -> None:
        self.state = FeedState.CATCHING_UP
        if not self._catching_up:
            self._catching_up = True
            self._feeds.peer.spawn(self._run())

    async def _run(self) -> None:
        try:
            while self.state is FeedState.CATCHING_UP:
                if self._wanted < self.low:
                    await self._send_older()
                elif await self._send_page() and self._heard <= self.position and self._wanted >= self.low:
                    # No await between the look at `_heard` and here: nothing slips through.
                    self.state = FeedState.LIVE
                    self._send_text_so_far()
        finally:
            self._catching_up = False

    async def _send_older(self) -> None:
        """Send the versions before this subscription's beginning that were asked for later."""
        start, end = self._wanted, self.low
        at = start
        while at < end and self.state is FeedState.CATCHING_UP:
            sent_to = await self._send_range(at, end)
            if sent_to is None:
                return
            at = sent_to
        self.low = min(self.low, start)

    async def _send_range(self, after: int, end: int) -> int | None:
        """Send a page of versions in (`after`, `end`]; the last one's, or None if the feed has stopped."""
        page = await self._page(after, min(self._system.options.catch_up_page, end - after))
        if page is None or not await self._send_all(page):
            return None
        return page[-1].version if page else end

    async def _send_page(self) -> bool:
        """Send the next page; True if it was the last."""
        limit = self._system.options.catch_up_page
        self._heard = self.position
        page = await self._page(self.position, limit)
        return page is not None and await self._send_all(page) and len(page) < limit

    async def _send_all(self, page: list[JournalEntry]) -> bool:
        """Send entries as the client reads them; False if the feed stopped before the last."""
        for entry in page:
            self._send(entry, with_cursor=False)
            if not await self._feeds.wait_for_reader():
                self.stop()
            if self.state is not FeedState.CATCHING_UP:
                return False
        return True

    async def _page(self, after: int, limit: int) -> list[JournalEntry] | None:
        """Entries after a version; None, and the feed has ended, if the session is not to be seen any more."""

        def query(tx: Transaction) -> tuple[int, list[JournalEntry]] | None:
            row = visible_session(tx, self._caller, self.session_id)
            if row is None:
                return None
            return row.state_version, tx.journal.after(row.tenant_id, row.id, after, limit)

        found = await self._system.read(query)
        await self._feeds.settled()
        if self.state is not FeedState.CATCHING_UP:
            return None
        # Deleted, or deleted and made anew under the same id: not what was subscribed to.
        if found is None or found[0] < self.position:
            self._end()
            return None
        return found[1]

    def _may_see(self, owner_user_id: str, visibility: str) -> bool:
        return visibility == "workspace" or owner_user_id == self._caller.user_id

    def _end(self) -> None:
        if self._feeds.sessions.get(self.session_id) is self:
            del self._feeds.sessions[self.session_id]
        self.stop()
        if self._feeds.on_end is not None:
            self._feeds.on_end(self.session_id)
