"""`events.subscribe` and `events.unsubscribe`."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import UNSET

from corral.gateway.dispatch import Call, Dispatcher
from corral.gateway.feeds import ConnectionFeeds, FeedSystem
from corral.gateway.workspace_feed import WorkspaceFeed, WorkspaceHub
from corral.governance.access import require_session
from corral.governance.caller import Caller
from corral.protocol.errors import InvalidRequest
from corral.protocol.methods import EmptyResult, SubscribeResult
from corral.storage.repositories import Transaction


class StartingPoint(NamedTuple):
    """Where to begin: after version `after` of a session that stands at `version`."""

    after: int
    version: int
    workspace_id: str


async def starting_point(
    system: FeedSystem, caller: Caller, session_id: str, after: int | None, field: str
) -> StartingPoint:
    """Where a session is followed from; `after` None means from now.

    Raises NotFound, and InvalidRequest that names `field` if `after` has not happened yet.
    """

    def query(tx: Transaction) -> tuple[int, str]:
        row = require_session(tx, caller, session_id)
        return row.state_version, row.workspace_id

    version, workspace_id = await system.store.read(query)
    if after is not None and after > version:
        raise InvalidRequest(f"{field} lies beyond the session's stateVersion, which is {version}")
    return StartingPoint(version if after is None else after, version, workspace_id)


class SubscriptionMethods:
    """Handlers of the two methods. The answer precedes the first event of the subscription."""

    def __init__(self, dispatcher: Dispatcher, system: FeedSystem) -> None:
        self._system = system
        dispatcher.add("events.subscribe", self.subscribe)
        dispatcher.add("events.unsubscribe", self.unsubscribe)

    async def subscribe(self, call: Call) -> None:
        feeds = _feeds_of(call)
        if call.params.session_id is UNSET:
            await self._follow_workspace(call, feeds)
        else:
            await self._follow_session(call, feeds)

    async def unsubscribe(self, call: Call) -> None:
        feeds = _feeds_of(call)
        if call.params.session_id is UNSET:
            feeds.drop_workspace(call.caller.workspace_id)
        else:
            feeds.drop_session(call.params.session_id)
        call.reply(EmptyResult())

    async def _follow_session(self, call: Call, feeds: ConnectionFeeds) -> None:
        caller, session_id, after = call.caller, call.params.session_id, call.params.after
        if isinstance(after, str):
            raise InvalidRequest("$.params.after must be an integer, the stateVersion to go on from")
        wanted = None if after is UNSET else after
        with feeds.room(session_id in feeds.sessions):
            start = await starting_point(self._system, caller, session_id, wanted, "$.params.after")
            feed = feeds.follow(caller, session_id, start.workspace_id, start.after, by_run=False)
            call.reply(SubscribeResult(session_id=session_id, state_version=start.version))
            feed.go()

    async def _follow_workspace(self, call: Call, feeds: ConnectionFeeds) -> None:
        caller, after = call.caller, call.params.after
        if isinstance(after, int):
            raise InvalidRequest("$.params.after must be a string, the feedCursor to go on from")
        tenant_id, workspace_id = caller.tenant_id, caller.workspace_id
        start = None if after is UNSET else self._system.cursors.read(tenant_id, workspace_id, after)
        async with feeds.beginning:
            with feeds.room(workspace_id in feeds.workspaces):
                await self._begin(call, feeds, start)

    async def _begin(self, call: Call, feeds: ConnectionFeeds, start: int | None) -> None:
        tenant_id, workspace_id = call.caller.tenant_id, call.caller.workspace_id
        standing = feeds.workspaces.get(workspace_id)
        # It hears before the head is read, so that nothing falls between the two.
        hub = WorkspaceHub.of(self._system, tenant_id, workspace_id)
        feed = standing or WorkspaceFeed(feeds, call.caller, hub)
        try:
            head = await self._system.store.read(lambda tx: tx.journal.feed_head(tenant_id, workspace_id))
        except BaseException:
            if standing is None:
                feed.stop()
            raise
        at = head if start is None else start
        call.reply(SubscribeResult(feed_cursor=self._system.cursors.write(tenant_id, workspace_id, at)))
        if standing is None:
            feeds.workspaces[workspace_id] = feed
            feed.begin(at, now=start is None)
        elif start is not None:
            feed.extend(start)


def _feeds_of(call: Call) -> ConnectionFeeds:
    if call.feeds is None:
        raise InvalidRequest(f"{call.method.name} needs a WebSocket: this request came without a connection")
    return call.feeds
