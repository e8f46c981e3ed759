"""`events.subscribe` without a session: the workspace's feed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from corral.gateway.options import GatewayOptions
from tests.support.house import House, house
from tests.support.wire import Wire, new_key


def places(wire: Wire) -> list[tuple[str, int]]:
    return [(frame["payload"]["sessionId"], frame["stateVersion"]) for frame in wire.durable]


async def test_the_feed_tells_of_every_session_without_output_texts(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as wire:
        assert set(await wire.request("events.subscribe", {})) == {"feedCursor"}
        run = await actor.effect("agent.run", input="hi")
        done = await actor.event("agent.completed")
        await wire.event("agent.completed", runId=run["runId"])
        assert [frame["event"] for frame in wire.events] == [
            "session.updated",
            "agent.accepted",
            "agent.message",
            "agent.tool_call",
            "agent.tool_result",
            "agent.message",
            "agent.completed",
        ]
        assert all(frame["payload"]["feedCursor"] for frame in wire.events)
        assert [f["payload"]["text"] for f in wire.events if f["event"] == "agent.message"] == ["", ""]
        assert wire.events[4]["payload"]["output"] == ""
        assert wire.events[6]["payload"]["output"] == ""
        assert done["payload"]["output"] != ""
        assert wire.events[1]["payload"]["input"] == "hi"
        assert len({frame["payload"]["feedCursor"] for frame in wire.events}) == 7


async def test_a_cursor_resumes_without_gap_or_repeat(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as first:
        start = (await first.request("events.subscribe", {}))["feedCursor"]
        for _ in range(10):
            await actor.effect("sessions.create")
        await first.until(lambda: len(first.durable) == 10)
        async with await home.wire() as whole, await home.wire() as half:
            await whole.request("events.subscribe", {"after": start})
            middle = first.durable[4]["payload"]["feedCursor"]
            await half.request("events.subscribe", {"after": middle})
            await actor.effect("sessions.create")
            await whole.until(lambda: len(whole.durable) == 11)
            await half.until(lambda: len(half.durable) == 6)
            await first.until(lambda: len(first.durable) == 11)
            assert places(whole) == places(first)
            assert places(half) == places(first)[5:]
            assert [f["payload"]["feedCursor"] for f in whole.durable] == [
                f["payload"]["feedCursor"] for f in first.durable
            ]


async def test_a_cursor_of_another_workspace_or_tenant_or_a_garbled_one_is_refused(home: House) -> None:
    both = await home.add_token("both", workspaces=["w_default", "w_two"])
    foreign = await home.add_token("foreign", tenant_id="t_two", workspaces=["w_default"])
    async with await home.wire() as owner, await home.wire(both) as one, await home.wire(foreign) as two:
        cursor = (await owner.request("events.subscribe", {}))["feedCursor"]
        assert (await one.call("events.subscribe", {"after": cursor}))["ok"] is True
        for wire, params in [
            (one, {"after": cursor, "workspaceId": "w_two"}),
            (two, {"after": cursor}),
            (owner, {"after": cursor[:-2] + ("AA" if cursor[-2:] != "AA" else "BB")}),
            (owner, {"after": "0"}),
            (owner, {"after": "not a cursor !"}),
            (owner, {"after": cursor + "ü"}),
            (owner, {"after": cursor * 2}),
        ]:
            error = (await wire.call("events.subscribe", params))["error"]
            assert error["code"] == "INVALID_REQUEST"
            assert "$.params.after" in error["message"]


async def test_only_what_the_follower_may_see_comes_live_and_from_the_store(home: House) -> None:
    ann = await home.add_token("ann")
    async with await home.wire() as owner, await home.wire(ann) as wire:
        start = (await wire.request("events.subscribe", {}))["feedCursor"]
        hidden = (await owner.effect("sessions.create"))["session"]["id"]
        shared = (await owner.effect("sessions.create", visibility="workspace"))["session"]["id"]
        mine = (await wire.effect("sessions.create"))["session"]["id"]
        await owner.effect("sessions.update", sessionId=hidden, title="x")
        await owner.effect("sessions.update", sessionId=shared, title="x")
        await owner.effect("sessions.update", sessionId=shared, visibility="private")
        await owner.effect("sessions.update", sessionId=hidden, visibility="workspace")
        await wire.effect("sessions.update", sessionId=mine, title="x")
        await wire.until(lambda: len(wire.durable) == 5)
        assert places(wire) == [(shared, 1), (mine, 1), (shared, 2), (hidden, 3), (mine, 2)]
        async with await home.wire(ann) as later:
            await later.request("events.subscribe", {"after": start})
            await later.until(lambda: len(later.durable) == 5)
            # What is visible now counts: the one that was opened since, and not the one that was closed.
            assert places(later) == [(hidden, 1), (mine, 1), (hidden, 2), (hidden, 3), (mine, 2)]


async def test_sessions_from_before_the_feed_are_looked_up_and_keep_the_order(home: House) -> None:
    ann = await home.add_token("ann")
    async with await home.wire() as owner, await home.wire(ann) as wire:
        shared = [(await owner.effect("sessions.create", visibility="workspace"))["session"]["id"] for _ in range(10)]
        hidden = (await owner.effect("sessions.create"))["session"]["id"]
        await wire.request("events.subscribe", {})
        for session in (*shared, hidden):
            mode = {"sessionId": session, "runtimeMode": "cloud", "idempotencyKey": new_key()}
            await owner.start("runtime.setMode", mode)
        await wire.until(lambda: len(wire.durable) == 20)
        assert places(wire) == [(session, version) for session in shared for version in (2, 3)]


async def test_an_event_that_matches_session_and_feed_comes_once_in_full_with_its_cursor(home: House) -> None:
    async with await home.wire() as wire:
        await wire.request("events.subscribe", {})
        run = await wire.effect("agent.run", input="hi")
        await wire.event("agent.completed", runId=run["runId"])
        await wire.request("sessions.list")
        assert wire.versions(run["sessionId"]) == list(range(1, 8))
        assert all(frame["payload"]["feedCursor"] for frame in wire.durable)
        message = next(frame for frame in wire.durable if frame["event"] == "agent.message")
        assert message["payload"]["text"] == "I will look first."
        assert any(frame["event"] == "agent.delta" for frame in wire.events)


async def test_a_session_followed_before_the_feed_gives_no_event_twice(home: House) -> None:
    async with await home.wire() as actor, await home.wire(ordered=False) as wire:
        start = (await actor.request("events.subscribe", {}))["feedCursor"]
        await actor.request("events.unsubscribe", {})
        session = (await actor.effect("sessions.create"))["session"]["id"]
        await actor.effect("sessions.update", sessionId=session, title="a")
        await actor.effect("sessions.create")
        await wire.request("events.subscribe", {"sessionId": session, "after": 1})
        await wire.until(lambda: len(wire.durable) == 1)
        await wire.request("events.subscribe", {"after": start})
        await wire.until(lambda: len(wire.durable) == 3)
        await actor.effect("sessions.update", sessionId=session, title="b")
        await wire.until(lambda: len(wire.durable) == 4)
        assert sorted(wire.versions(session)) == [1, 2, 3]


async def test_leaving_the_feed_loses_nothing_of_a_session_that_is_followed(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as wire:
        session = (await actor.effect("sessions.create"))["session"]["id"]
        await wire.request("events.subscribe", {"sessionId": session, "after": 0})
        for number in range(20):
            params = {"sessionId": session, "title": f"t{number}", "idempotencyKey": new_key()}
            await actor.start("sessions.update", params)
            await wire.start("events.subscribe" if number % 2 == 0 else "events.unsubscribe", {})
        await wire.until(lambda: len(wire.durable) == 21)
        assert wire.versions(session) == list(range(1, 22))


async def test_the_feed_has_no_gap_while_the_workspace_goes_on_during_the_catch_up(tmp_path: Path) -> None:
    async with house(tmp_path, options=GatewayOptions(catch_up_page=3)) as home, await home.wire() as actor:
        start = (await actor.request("events.subscribe", {}))["feedCursor"]
        for _ in range(20):
            await actor.start("sessions.create", {"idempotencyKey": new_key()})
        wires = [await home.wire() for _ in range(5)]
        for wire in wires:
            await wire.start("events.subscribe", {"after": start})
            for _ in range(8):
                await actor.start("sessions.create", {"idempotencyKey": new_key()})
        await actor.until(lambda: len(actor.durable) == 60)
        for wire in wires:
            await wire.until(lambda w=wire: len(w.durable) == 60)  # type: ignore[misc]
            assert places(wire) == places(actor)
            await wire.close()
            wire.check()


async def test_the_feed_of_each_workspace_is_its_own(home: House) -> None:
    token = await home.add_token("ann", workspaces=["w_a", "w_b"])
    async with await home.wire(token) as wire, await home.wire(token) as actor:
        await wire.request("events.subscribe", {"workspaceId": "w_b"})
        assert (await wire.call("events.subscribe", {"workspaceId": "w_default"}))["error"]["code"] == "FORBIDDEN"
        agent = {"agent": {"id": "a_default"}}
        admin = await home.add_token("boss", workspaces=["w_a", "w_b"], roles=["admin"])
        async with await home.wire(admin) as boss:
            for space in ("w_a", "w_b"):
                await boss.effect("agents.upsert", workspaceId=space, **agent)
        await actor.effect("sessions.create", workspaceId="w_a")
        there = (await actor.effect("sessions.create", workspaceId="w_b"))["session"]["id"]
        await wire.until(lambda: len(wire.durable) == 1)
        assert places(wire) == [(there, 1)]
        await wire.request("events.unsubscribe", {"workspaceId": "w_b"})
        await actor.effect("sessions.create", workspaceId="w_b")
        await wire.request("sessions.list")
        assert len(wire.durable) == 1


@pytest.mark.parametrize("pause", [0.0, 0.05])
async def test_asking_for_the_feed_again_from_earlier_gives_only_what_was_not_had(home: House, pause: float) -> None:
    async with await home.wire() as actor, await home.wire(ordered=False) as wire:
        start = (await actor.request("events.subscribe", {}))["feedCursor"]
        for _ in range(4):
            await actor.effect("sessions.create")
        await wire.request("events.subscribe", {})
        await actor.effect("sessions.create")
        await wire.until(lambda: len(wire.durable) == 1)
        await asyncio.sleep(pause)
        await wire.request("events.subscribe", {"after": start})
        await wire.until(lambda: len(wire.durable) == 5)
        await actor.effect("sessions.create")
        await wire.until(lambda: len(wire.durable) == 6)
        await wire.request("sessions.list")
        assert len(set(places(wire))) == 6 == len(wire.durable)
