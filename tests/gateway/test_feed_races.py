"""Commits that fall between a feed's read and its going live, each placed there on purpose.

The store, the bus and the server are real; only the moment of a read's return is chosen.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from corral.gateway.cursors import FeedCursors
from corral.gateway.feeds import ConnectionFeeds, FeedSystem
from corral.gateway.options import GatewayOptions
from corral.gateway.outbox import Outbox
from corral.gateway.workspace_feed import WorkspaceFeed, WorkspaceHub
from corral.storage.repositories import Transaction
from tests.support.callers import OWNER
from tests.support.house import House, house
from tests.support.model_server import Hang
from tests.support.wire import Wire

T = TypeVar("T")
OPTIONS = GatewayOptions()


class TimedReads(FeedSystem):
    """Does `before` and `after` around the next read, once each."""

    before: Callable[[], Awaitable[Any]] | None = None
    after: Callable[[], Awaitable[Any]] | None = None

    async def read(self, query: Callable[[Transaction], T]) -> T:
        before, self.before = self.before, None
        if before is not None:
            await before()
        result = await super().read(query)
        after, self.after = self.after, None
        if after is not None:
            await after()
        return result


class Follower:
    """The place of a connection: what its feeds send is read off the outbox."""

    def __init__(self, home: House) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.id = "conn_test"
        self.effects_in_flight = 0
        self.outbox = Outbox(10**7, 10**4, self.too_slow)
        server = home.server
        self.system = TimedReads(server.store, server.bus, FeedCursors(), OPTIONS, self.spawn)
        self.feeds = ConnectionFeeds(self.system, self)
        self.caller = OWNER

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

    def too_slow(self) -> None:
        raise AssertionError("nothing is slow here")

    async def settled(self) -> list[int]:
        """When all tasks are done: the versions that were sent."""
        while pending := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(pending)
        for task in self._tasks:
            task.result()
        versions = []
        while (frame := self.outbox.take()) is not None:
            versions.append(json.loads(frame)["stateVersion"])
        return versions


async def session_of(wire: Wire) -> tuple[str, Callable[[], Awaitable[Any]]]:
    """A session, and what adds one event to it."""
    session = str((await wire.effect("sessions.create"))["session"]["id"])
    count = iter(range(1000))
    return session, lambda: wire.effect("sessions.update", sessionId=session, title=f"t{next(count)}")


async def test_a_commit_right_after_the_last_page_was_read_is_not_lost(home: House) -> None:
    async with await home.wire() as wire:
        session, add = await session_of(wire)
        follower = Follower(home)
        follower.system.after = add
        follower.feeds.follow(follower.caller, session, "w_default", 0, by_run=False).go()
        assert await follower.settled() == [1, 2]
        await add()
        assert await follower.settled() == [3]
        follower.feeds.close()


async def test_a_commit_right_before_the_last_page_was_read_comes_once(home: House) -> None:
    async with await home.wire() as wire:
        session, add = await session_of(wire)
        follower = Follower(home)
        follower.system.before = add
        follower.feeds.follow(follower.caller, session, "w_default", 0, by_run=False).go()
        assert await follower.settled() == [1, 2]
        follower.feeds.close()


async def test_an_entry_that_the_bus_skipped_is_read_from_the_store(home: House) -> None:
    async with await home.wire() as wire:
        session, add = await session_of(wire)
        follower = Follower(home)
        feed = follower.feeds.follow(follower.caller, session, "w_default", 1, by_run=False)
        feed.go(fresh=True)
        listeners = home.server.bus._sessions.pop(("t_default", session))
        await add()
        home.server.bus._sessions[("t_default", session)] = listeners
        await add()
        assert await follower.settled() == [2, 3]
        follower.feeds.close()


def workspace_feed(follower: Follower, after: int) -> WorkspaceFeed:
    hub = WorkspaceHub.of(follower.system, "t_default", "w_default")
    feed = follower.feeds.workspaces["w_default"] = WorkspaceFeed(follower.feeds, follower.caller, hub)
    feed.begin(after, now=False)
    return feed


async def test_the_feed_takes_commits_on_both_sides_of_its_read_once_each(home: House) -> None:
    async with await home.wire() as wire:
        _, add = await session_of(wire)
        for before, after in ((add, None), (None, add), (add, add)):
            follower = Follower(home)
            head = await home.server.store.read(lambda tx: tx.journal.feed_head("t_default", "w_default"))
            follower.system.before, follower.system.after = before, after
            workspace_feed(follower, head)
            sent = await follower.settled()
            await add()
            sent += await follower.settled()
            wanted = 1 + (before is not None) + (after is not None)
            assert len(sent) == wanted
            assert sent == list(range(sent[0], sent[0] + wanted))
            follower.feeds.close()


async def test_what_was_under_way_through_the_feed_reaches_the_session_when_the_feed_is_left(home: House) -> None:
    async with await home.wire() as wire:
        session, _ = await session_of(wire)
        follower = Follower(home)
        feed = workspace_feed(follower, 0)
        await follower.settled()
        assert feed.live
        follower.feeds.follow(follower.caller, session, "w_default", 1, by_run=False).go()
        assert await follower.settled() == []
        # The hub has forgotten whose the session is and looks it up; the feed is left meanwhile.
        hub = follower.system.hubs[("t_default", "w_default")]
        hub._known.clear()
        held = asyncio.Event()
        follower.system.before = held.wait
        wire_told = await wire.effect("runtime.setMode", sessionId=session, runtimeMode="cloud")
        assert wire_told["status"] == "applied"
        assert hub._queue
        follower.feeds.drop_workspace("w_default")
        held.set()
        assert await follower.settled() == [2, 3]
        follower.feeds.close()


async def test_what_the_bus_tells_twice_is_sent_once(home: House) -> None:
    async with await home.wire() as wire:
        session, add = await session_of(wire)
        await add()
        follower = Follower(home)
        follower.feeds.follow(follower.caller, session, "w_default", 0, by_run=False).go()
        assert await follower.settled() == [1, 2]
        entries = await home.server.store.read(lambda tx: tx.journal.after("t_default", session, 0, 10))
        home.server.bus.publish(entries)
        follower.feeds.drop_session(session)
        workspace_feed(follower, 0)
        assert await follower.settled() == [1, 2]
        home.server.bus.publish(entries)
        assert await follower.settled() == []
        follower.feeds.close()


async def test_more_than_the_feed_remembers_during_a_read_sends_it_to_the_store_again(
    home: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.gateway.workspace_feed._BUFFER_LIMIT", 0)
    async with await home.wire() as wire:
        _, add = await session_of(wire)
        follower = Follower(home)
        follower.system.after = add
        workspace_feed(follower, 0)
        assert await follower.settled() == [1, 2]
        follower.feeds.close()


async def test_text_so_far_comes_at_once_and_does_not_wait_for_the_next_piece(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Hang(after=3)]) as home, await home.wire() as actor:
        run = await actor.effect("agent.run", input="x", sessionId="s_still")
        await actor.event("agent.delta")
        # Longer than the model takes for its pieces; sooner, the next piece would bring the text along.
        await asyncio.sleep(0.3)
        live = home.server.bus.live_message("t_default", "s_still")
        assert live is not None
        async with await home.wire() as wire:
            await wire.request("events.subscribe", {"sessionId": "s_still"})
            delta = await wire.event("agent.delta", runId=run["runId"])
            assert (delta["payload"]["offset"], delta["payload"]["delta"]) == (0, live.text)
