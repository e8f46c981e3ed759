"""`events.subscribe` with a session: everything after a version, in order, once, then live."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from corral.gateway.options import GatewayOptions
from tests.support.house import House, house
from tests.support.model_server import Say
from tests.support.wire import Refused, Wire, is_response, new_key


async def rename(wire: Wire, session: str, times: int, start: int = 0) -> None:
    for number in range(start, start + times):
        await wire.effect("sessions.update", sessionId=session, title=f"title {number}")


async def new_session(wire: Wire, renamed: int = 0, **params: str) -> str:
    session = str((await wire.effect("sessions.create", **params))["session"]["id"])
    await rename(wire, session, renamed)
    return session


async def test_after_a_version_comes_everything_behind_it_and_then_what_happens(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as wire:
        session = await new_session(actor, renamed=5)
        answer = await wire.request("events.subscribe", {"sessionId": session, "after": 2})
        assert answer == {"sessionId": session, "stateVersion": 6}
        await rename(actor, session, 3, start=5)
        await wire.until(lambda: len(wire.durable) == 7)
        assert wire.versions(session) == [3, 4, 5, 6, 7, 8, 9]


async def test_without_after_it_begins_now(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as wire:
        session = await new_session(actor, renamed=5)
        await wire.request("events.subscribe", {"sessionId": session})
        await rename(actor, session, 2, start=5)
        await wire.until(lambda: len(wire.durable) == 2)
        assert wire.versions(session) == [7, 8]


async def test_the_answer_precedes_the_first_event(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as wire:
        session = await new_session(actor, renamed=20)
        frame_id = await wire.start("events.subscribe", {"sessionId": session, "after": 0})
        await wire.until(lambda: len(wire.durable) == 21)
        assert is_response(wire.frames[1], frame_id)


async def test_after_beyond_the_session_is_an_invalid_request(home: House) -> None:
    async with await home.wire() as wire:
        session = await new_session(wire)
        with pytest.raises(Refused) as caught:
            await wire.request("events.subscribe", {"sessionId": session, "after": 2})
        assert caught.value.code == "INVALID_REQUEST"
        assert "$.params.after" in caught.value.message
        assert (await wire.request("events.subscribe", {"sessionId": session, "after": 1}))["stateVersion"] == 1


async def test_subscribing_again_from_earlier_gives_only_what_was_not_had(home: House) -> None:
    async with await home.wire() as actor, await home.wire(ordered=False) as wire:
        session = await new_session(actor, renamed=9)
        await wire.request("events.subscribe", {"sessionId": session, "after": 7})
        await wire.until(lambda: len(wire.durable) == 3)
        await wire.request("events.subscribe", {"sessionId": session, "after": 4})
        await wire.until(lambda: len(wire.durable) == 6)
        await wire.request("events.subscribe", {"sessionId": session, "after": 9})
        await wire.request("events.subscribe", {"sessionId": session})
        await wire.request("events.subscribe", {"sessionId": session, "after": 0})
        await rename(actor, session, 1, start=9)
        await wire.until(lambda: len(wire.durable) == 11)
        assert wire.versions(session) == [8, 9, 10, 5, 6, 7, 1, 2, 3, 4, 11]


async def test_subscribing_many_times_at_once_is_one_subscription(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as wire:
        session = await new_session(actor, renamed=4)
        for _ in range(10):
            await wire.start("events.subscribe", {"sessionId": session, "after": 0})
        await rename(actor, session, 2, start=4)
        await wire.until(lambda: len(wire.durable) == 7)
        assert wire.versions(session) == [1, 2, 3, 4, 5, 6, 7]


async def test_no_gap_and_no_repeat_while_the_session_goes_on_during_the_catch_up(tmp_path: Path) -> None:
    options = GatewayOptions(catch_up_page=3)
    async with house(tmp_path, options=options) as home, await home.wire() as actor:
        session = await new_session(actor, renamed=30)
        stop = asyncio.Event()

        async def busy() -> None:
            number = 30
            while not stop.is_set():
                await rename(actor, session, 1, start=number)
                number += 1

        writing = asyncio.create_task(busy())
        wires = [await home.wire() for _ in range(8)]
        for place, wire in enumerate(wires):
            await wire.start("events.subscribe", {"sessionId": session, "after": place * 3})
        for wire in wires:
            await wire.until(lambda w=wire: len(w.durable) > 60)  # type: ignore[misc]
        stop.set()
        await writing
        last = (await actor.request("sessions.get", {"sessionId": session}))["session"]["stateVersion"]
        for place, wire in enumerate(wires):
            await wire.until(lambda w=wire: w.versions(session)[-1] == last)  # type: ignore[misc]
            assert wire.versions(session) == list(range(place * 3 + 1, last + 1))
            await wire.close()
            wire.check()


async def test_unsubscribe_stops_and_forgets(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as wire:
        session = await new_session(actor, renamed=2)
        await wire.request("events.subscribe", {"sessionId": session, "after": 0})
        await wire.until(lambda: len(wire.durable) == 3)
        assert await wire.request("events.unsubscribe", {"sessionId": session}) == {}
        await rename(actor, session, 2, start=2)
        assert await wire.request("events.unsubscribe", {"sessionId": session}) == {}
        assert len(wire.durable) == 3
        wire.forget_versions(session)
        await wire.request("events.subscribe", {"sessionId": session, "after": 0})
        await wire.until(lambda: len(wire.durable) == 8)
        assert wire.versions(session)[3:] == [1, 2, 3, 4, 5]


async def test_what_may_not_be_seen_answers_like_what_is_not_there(home: House) -> None:
    stranger = await home.add_token("stranger")
    foreign = await home.add_token("foreign", workspaces=["w_far"])
    async with await home.wire() as owner, await home.wire(stranger) as one, await home.wire(foreign) as two:
        private = await new_session(owner)
        answers = []
        for wire in (one, two):
            for session in (private, "s_not_there"):
                error = (await wire.call("events.subscribe", {"sessionId": session, "after": 0}))["error"]
                answers.append({key: value for key, value in error.items() if key != "traceId"})
        assert answers[0]["code"] == "NOT_FOUND"
        assert all(answer == answers[0] for answer in answers)


async def test_a_session_made_private_goes_silent_for_all_but_its_owner(home: House) -> None:
    ann = await home.add_token("ann")
    async with await home.wire() as owner, await home.wire() as follower, await home.wire(ann) as other:
        session = await new_session(owner, visibility="workspace")
        for wire in (follower, other):
            await wire.request("events.subscribe", {"sessionId": session, "after": 0})
            await wire.until(lambda w=wire: len(w.durable) == 1)  # type: ignore[misc]
        await rename(owner, session, 1)
        await other.until(lambda: len(other.durable) == 2)
        await owner.effect("sessions.update", sessionId=session, visibility="private")
        await rename(owner, session, 1, start=1)
        await follower.until(lambda: len(follower.durable) == 4)
        assert (await other.request("sessions.get", {"sessionId": session}))["session"] is None
        assert other.versions(session) == [1, 2]
        # Shared again, it may be followed again; nothing comes by itself.
        await owner.effect("sessions.update", sessionId=session, visibility="workspace")
        await other.request("events.subscribe", {"sessionId": session, "after": 2})
        await other.until(lambda: len(other.durable) == 5)
        assert other.versions(session) == [1, 2, 3, 4, 5]


async def test_a_deleted_session_says_so_and_a_new_one_under_its_name_is_another(home: House) -> None:
    async with await home.wire() as actor, await home.wire() as wire:
        run = await actor.effect("agent.run", input="x", sessionId="s_again")
        await actor.event("agent.completed", runId=run["runId"])
        await wire.request("events.subscribe", {"sessionId": "s_again", "after": 0})
        await actor.effect("sessions.delete", sessionId="s_again")
        await wire.event("session.updated", reason="deleted")
        had = len(wire.durable)
        actor.forget_versions("s_again")
        wire.forget_versions("s_again")
        run = await actor.effect("agent.run", input="y", sessionId="s_again")
        await actor.event("agent.completed", runId=run["runId"])
        assert len(wire.durable) == had
        await wire.request("events.subscribe", {"sessionId": "s_again", "after": 0})
        await wire.event("agent.completed", runId=run["runId"])
        assert wire.versions("s_again")[had] == 1


async def test_who_comes_in_the_middle_of_a_message_first_gets_all_its_text_so_far(tmp_path: Path) -> None:
    text = "".join(f"word{number} " for number in range(60))
    async with house(tmp_path, script=[Say(text, chunks=60, delay=0.02)]) as home, await home.wire() as actor:
        await actor.effect("agent.run", input="x", sessionId="s_mid")
        await actor.until(lambda: sum(f["event"] == "agent.delta" for f in actor.events) > 10)
        async with await home.wire() as wire:
            await wire.request("events.subscribe", {"sessionId": "s_mid", "after": 0})
            message = await wire.event("agent.message")
            deltas = [frame for frame in wire.events if frame["event"] == "agent.delta"]
            first = wire.index(lambda frame: frame is deltas[0])
            accepted = wire.index(lambda frame: frame.get("event") == "agent.accepted")
            assert accepted < first
            assert deltas[0]["payload"]["offset"] == 0
            assert deltas[0]["payload"]["delta"].startswith("word0 word1 word2 ")
            written = ""
            for frame in deltas:
                assert frame["payload"]["offset"] == len(written)
                assert frame["stateVersion"] == 2
                written += frame["payload"]["delta"]
            assert written == message["payload"]["text"] == text
            assert wire.versions("s_mid") == [1, 2, 3] or wire.versions("s_mid") == [1, 2, 3, 4]


async def test_no_live_text_of_an_ended_message_follows_its_message(tmp_path: Path) -> None:
    script = [Say("one two three four", chunks=4, delay=0.005)]
    async with house(tmp_path, script=script) as home, await home.wire() as actor:
        for number in range(15):
            session = f"s_{number}"
            run = await actor.effect("agent.run", input="x", sessionId=session)
            async with await home.wire() as wire:
                await wire.request("events.subscribe", {"sessionId": session, "after": 0})
                done = await wire.event("agent.completed", runId=run["runId"])
                ended = wire.index(lambda frame: frame.get("event") == "agent.message")
                assert all(frame.get("event") != "agent.delta" for frame in wire.frames[ended:])
                assert done["stateVersion"] == 4


async def test_subscriptions_have_a_limit_and_unsubscribing_makes_room(tmp_path: Path) -> None:
    async with house(tmp_path, options=GatewayOptions(max_subscriptions=3)) as home, await home.wire() as wire:
        sessions = [await new_session(wire) for _ in range(4)]
        for session in sessions[:3]:
            await wire.request("events.subscribe", {"sessionId": session})
        for params in ({"sessionId": sessions[3]}, {}):
            assert (await wire.call("events.subscribe", params))["error"]["code"] == "LIMIT_REACHED"
        assert (await wire.call("events.subscribe", {"sessionId": sessions[0]}))["ok"] is True
        await wire.request("events.unsubscribe", {"sessionId": sessions[1]})
        assert (await wire.call("events.subscribe", {"sessionId": sessions[3]}))["ok"] is True


async def test_a_closed_connection_leaves_no_listener_behind(home: House) -> None:
    bus = home.server.bus
    async with await home.wire() as actor:
        session = await new_session(actor)
        for _ in range(5):
            async with await home.wire() as wire:
                await wire.request("events.subscribe", {"sessionId": session})
                await wire.request("events.subscribe", {})
                await wire.start("agent.run", {"input": "x", "idempotencyKey": new_key()})
    await home.sockets_gone()
    assert not bus._sessions
    assert not bus._workspaces
