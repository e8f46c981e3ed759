"""A workspace's feed: the durable events of every session that its follower may see."""

from __future__ import annotations

from collections import deque

from corral.bus.api import Delta, Notice
from corral.gateway.eventcache import SessionFacts
from corral.gateway.feeds import ConnectionFeeds, FeedState, FeedSystem
from corral.governance.caller import Caller
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry

_QUEUE_LIMIT = 10_000
_KNOWN_LIMIT = 50_000
_BUFFER_LIMIT = 1_000


class WorkspaceHub:
    """Hears a workspace once for all its followers and knows who may see which session.

    What it does not know yet of a session it looks up; entries wait their turn meanwhile, so
    that every follower gets the workspace's one order.
    """

    def __init__(self, system: FeedSystem, tenant_id: str, workspace_id: str) -> None:
        self._system = system
        self._tenant_id = tenant_id
        self._key = (tenant_id, workspace_id)
        self._feeds: list[WorkspaceFeed] = []
        self._known: dict[str, SessionFacts] = {}
        self._queue: deque[JournalEntry] = deque()
        self._looking_up = False
        self._unsubscribe = system.bus.on_workspace(tenant_id, workspace_id, self._hear)

    @classmethod
    def of(cls, system: FeedSystem, tenant_id: str, workspace_id: str) -> WorkspaceHub:
        """The hub of a workspace, made if there is none."""
        key = (tenant_id, workspace_id)
        hub = system.hubs.get(key)
        if hub is None:
            hub = system.hubs[key] = cls(system, tenant_id, workspace_id)
        return hub

    def join(self, feed: WorkspaceFeed) -> None:
        self._feeds.append(feed)

    def leave(self, feed: WorkspaceFeed) -> None:
        """The last one closes the hub."""
        self._feeds.remove(feed)
        if not self._feeds:
            self._unsubscribe()
            self._queue.clear()
            del self._system.hubs[self._key]

    def _hear(self, notice: Notice) -> None:
        if isinstance(notice, Delta):
            return
        if not self._queue and self._is_known(notice):
            self._fan_out(notice)
            return
        self._queue.append(notice)
        if len(self._queue) > _QUEUE_LIMIT:
            self._queue.clear()
            for feed in list(self._feeds):
                feed.fall_back()
        elif not self._looking_up:
            self._looking_up = True
            self._system.spawn(self._look_up())

    def _is_known(self, entry: JournalEntry) -> bool:
        return entry.session_id in self._known or self._system.cache.facts(entry).session is not None

    async def _look_up(self) -> None:
        try:
            while self._queue:
                unknown = {entry.session_id for entry in self._queue if not self._is_known(entry)}
                self._known.update(await self._system.read(lambda tx, ids=unknown: self._facts_of(tx, ids)))  # type: ignore[misc]
                while self._queue and self._is_known(self._queue[0]):
                    self._fan_out(self._queue.popleft())
        finally:
            self._looking_up = False

    def _facts_of(self, tx: Transaction, session_ids: set[str]) -> dict[str, SessionFacts]:
        facts = {}
        for session_id in session_ids:
            row = tx.sessions.get(self._tenant_id, session_id)
            # One that is gone meanwhile is nobody's.
            owner, visibility = (row.owner_user_id, row.visibility) if row is not None else ("", "private")
            facts[session_id] = SessionFacts(owner_user_id=owner, visibility=visibility)
        return facts

    def _fan_out(self, entry: JournalEntry) -> None:
        told = self._system.cache.facts(entry)
        if told.session is not None:
            if len(self._known) >= _KNOWN_LIMIT:
                self._known.clear()
            self._known[entry.session_id] = told.session
        access = self._known[entry.session_id]
        for feed in list(self._feeds):
            if access.visibility == "workspace" or access.owner_user_id == feed.user_id:
                feed.offer(entry)
        if told.deleted:
            self._known.pop(entry.session_id, None)


class WorkspaceFeed:
    """One workspace on one connection: what lies in (`low`, `position`], by feed id, has been sent.

    An event of a session that the connection follows too is sent by that subscription, in its
    full form and with the cursor; all others come from here, without output texts.
    """

    def __init__(self, feeds: ConnectionFeeds, caller: Caller, hub: WorkspaceHub) -> None:
        self._feeds = feeds
        self._system = feeds.system
        self._caller = caller
        self.user_id = caller.user_id
        self.low = self.position = self._wanted = 0
        self.state = FeedState.NEW
        self._catching_up = False
        self._buffer: list[JournalEntry] = []
        self._missed = False
        self._hub = hub
        hub.join(self)

    @property
    def live(self) -> bool:
        return self.state is FeedState.LIVE

    def begin(self, after: int, *, now: bool) -> None:
        """Set where the feed starts; `now` says that nothing but what it heard since it was made lies behind that."""
        self.low = self.position = self._wanted = after
        if now and not self._missed:
            self._go_live()
        else:
            self._catch_up()

    def extend(self, after: int) -> None:
        """Ask for everything after `after` that this subscription has not sent."""
        self._wanted = min(self._wanted, after)
        if self._wanted < self.low:
            self.fall_back()

    def fall_back(self) -> None:
        """Go to the store: entries were missed or are asked for again."""
        if self.state is FeedState.LIVE:
            self._catch_up()
            self._feeds.recheck(self._caller.workspace_id)

    def stop(self) -> None:
        """Hear and send no more."""
        if self.state is not FeedState.STOPPED:
            self.state = FeedState.STOPPED
            self._hub.leave(self)

    def offer(self, entry: JournalEntry) -> None:
        """An entry that the follower may see, in the workspace's order."""
        if self.state is FeedState.LIVE:
            if entry.feed_id > self.position:
                self._send(entry)
                self.position = entry.feed_id
        elif len(self._buffer) < _BUFFER_LIMIT:
            self._buffer.append(entry)
        else:
            self._missed = True

    def _send(self, entry: JournalEntry) -> None:
        session = self._feeds.sessions.get(entry.session_id)
        if session is not None and entry.version > session.low:
            session.offer(entry, with_cursor=True)
        else:
            self._feeds.peer.outbox.put_event(self._system.cache.trimmed(entry))

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
                elif await self._send_page():
                    self._go_live()
        finally:
            self._catching_up = False

    def _go_live(self) -> None:
        """The last read was made after this buffer was begun: together they are whole."""
        self.state = FeedState.LIVE
        buffer, self._buffer = self._buffer, []
        for entry in buffer:
            self.offer(entry)

    async def _send_older(self) -> None:
        """Send what lies before this subscription's beginning and was asked for later."""
        start, end = self._wanted, self.low
        at = start
        while at < end:
            page = await self._page(at)
            for entry in page:
                if entry.feed_id <= end and not await self._send_as_read(entry):
                    return
            at = page[-1].feed_id if page else end
        self.low = min(self.low, start)

    async def _send_page(self) -> bool:
        """Send the next page; True if it was the last and nothing was missed while it was read."""
        self._buffer.clear()
        self._missed = False
        page = await self._page(self.position)
        for entry in page:
            if not await self._send_as_read(entry):
                return False
            self.position = entry.feed_id
        return len(page) < self._system.options.catch_up_page and not self._missed and self._wanted >= self.low

    async def _send_as_read(self, entry: JournalEntry) -> bool:
        """Send one entry and wait for the client to read; False, and it was not sent, if the feed has stopped."""
        if self.state is not FeedState.CATCHING_UP:
            return False
        self._send(entry)
        if not await self._feeds.wait_for_reader():
            self.stop()
        return True

    async def _page(self, after: int) -> list[JournalEntry]:
        caller, limit = self._caller, self._system.options.catch_up_page

        def query(tx: Transaction) -> list[JournalEntry]:
            return tx.journal.feed_after(
                caller.tenant_id, caller.workspace_id, after, user_id=caller.user_id, limit=limit
            )

        page = await self._system.read(query)
        await self._feeds.settled()
        return page
