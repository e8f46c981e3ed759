"""`agent.run` and `agent.abort` on a socket: the answer first, then every event once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from corral.gateway.options import GatewayOptions
from tests.support.house import House, house
from tests.support.model_server import Hang, Say
from tests.support.wire import Refused, is_response, new_key


async def test_the_answer_precedes_every_event_of_the_run_and_the_first_is_agent_accepted(home: House) -> None:
    async with await home.wire() as wire:
        params = {"input": "hi", "idempotencyKey": new_key()}
        frame_id = await wire.start("agent.run", params)
        await wire.event("agent.completed")
        answer = wire.index(lambda frame: is_response(frame, frame_id))
        first = wire.index(lambda frame: frame["type"] == "event")
        assert answer < first
        assert wire.frames[first]["event"] == "agent.accepted"
        # The session was made in the same commit: version 1 is `session.updated`, not part of the run.
        assert wire.frames[first]["stateVersion"] == 2
        session = wire.frames[answer]["payload"]["sessionId"]
        assert wire.versions(session) == list(range(2, wire.durable[-1]["stateVersion"] + 1))


async def test_deltas_together_are_the_message_and_carry_the_last_durable_version(tmp_path: Path) -> None:
    text = "Grüße, 世界 😀! " * 20
    async with house(tmp_path, script=[Say(text, chunks=17, delay=0.003)]) as home, await home.wire() as wire:
        await wire.effect("agent.run", input="hi")
        message = await wire.event("agent.message")
        written = ""
        for frame in wire.events:
            if frame["event"] == "agent.delta":
                assert frame["payload"]["offset"] == len(written)
                assert frame["payload"]["messageId"] == message["payload"]["messageId"]
                assert frame["stateVersion"] == 2
                written += frame["payload"]["delta"]
        assert written == message["payload"]["text"] == text


async def test_a_second_run_in_the_session_gives_each_event_once(home: House) -> None:
    async with await home.wire() as wire:
        session = (await wire.effect("agent.run", input="one", sessionId="s_two"))["sessionId"]
        await wire.event("agent.completed")
        second = await wire.effect("agent.run", input="two", sessionId=session)
        await wire.event("agent.completed", runId=second["runId"])
        versions = wire.versions(session)
        assert versions == list(range(2, versions[-1] + 1))


async def test_a_run_whose_mode_is_set_first_is_followed_from_its_own_beginning(home: House) -> None:
    async with await home.wire() as wire:
        session = (await wire.effect("sessions.create"))["session"]["id"]
        await wire.effect("agent.run", input="x", sessionId=session, runtimeMode="local")
        assert (await wire.frame(lambda frame: frame["type"] == "event"))["event"] == "agent.accepted"


async def test_a_replay_on_another_connection_gives_the_whole_run(home: House) -> None:
    params = {"input": "hi", "idempotencyKey": new_key()}
    async with await home.wire() as first:
        answer = await first.request("agent.run", params)
        await first.event("agent.completed")
    async with await home.wire() as second:
        frame_id = await second.start("agent.run", params)
        await second.event("agent.completed")
        assert (await second.response(frame_id))["payload"] == answer
        assert second.index(lambda f: is_response(f, frame_id)) < second.index(lambda f: f["type"] == "event")
        assert second.durable[0]["event"] == "agent.accepted"
        assert second.versions(answer["sessionId"]) == first.versions(answer["sessionId"])
        # Followed from there on: a later run of the session is heard of too.
        run = await first_run_again(home, answer["sessionId"])
        await second.event("agent.completed", runId=run)


async def first_run_again(home: House, session: str) -> str:
    async with await home.wire() as wire:
        run = await wire.effect("agent.run", input="again", sessionId=session)
        await wire.event("agent.completed", runId=run["runId"])
        return str(run["runId"])


async def test_a_replay_on_the_same_connection_delivers_nothing_twice(home: House) -> None:
    async with await home.wire() as wire:
        params = {"input": "hi", "idempotencyKey": new_key()}
        answer = await wire.request("agent.run", params)
        await wire.event("agent.completed")
        count = len(wire.durable)
        for _ in range(3):
            assert await wire.request("agent.run", params) == answer
        assert len(wire.durable) == count


async def test_a_replay_after_unsubscribe_gives_the_run_again_from_its_beginning(home: House) -> None:
    async with await home.wire() as wire:
        params = {"input": "hi", "idempotencyKey": new_key()}
        answer = await wire.request("agent.run", params)
        await wire.event("agent.completed")
        versions = wire.versions(answer["sessionId"])
        await wire.request("events.unsubscribe", {"sessionId": answer["sessionId"]})
        wire.forget_versions(answer["sessionId"])
        await wire.request("agent.run", params)
        await wire.until(lambda: len(wire.versions(answer["sessionId"])) == 2 * len(versions))
        assert wire.versions(answer["sessionId"]) == versions * 2


async def test_the_same_key_sent_twice_at_once_is_one_run_and_two_equal_answers(home: House) -> None:
    async with await home.wire() as one, await home.wire() as two:
        params = {"input": "hi", "idempotencyKey": new_key()}
        ids = [await wire.start("agent.run", params) for wire in (one, one, two)]
        answers = [await wire.response(frame_id) for wire, frame_id in zip((one, one, two), ids, strict=True)]
        assert answers[0]["payload"] == answers[1]["payload"] == answers[2]["payload"]
        for wire in (one, two):
            await wire.event("agent.completed")
        sessions = (await one.request("sessions.list"))["items"]
        assert len(sessions) == 1


async def test_a_key_is_asked_for(home: House) -> None:
    async with await home.wire() as wire:
        with pytest.raises(Refused) as caught:
            await wire.request("agent.run", {"input": "hi"})
        assert (caught.value.code, caught.value.message) == ("INVALID_REQUEST", "$.params.idempotencyKey is required")


async def test_abort_answers_before_the_terminal_event_and_once_the_run_is_over(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Hang(after=2)]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="x")
        await wire.event("agent.delta")
        params = {"runId": run["runId"], "idempotencyKey": new_key()}
        frame_id = await wire.start("agent.abort", params)
        failed = await wire.event("agent.failed", runId=run["runId"])
        assert failed["payload"]["code"] == "ABORTED"
        assert wire.index(lambda f: is_response(f, frame_id)) < wire.index(lambda f: f is failed)
        answer = await wire.response(frame_id)
        assert answer["payload"] == {"runId": run["runId"], "status": "aborted"}
        assert await wire.request("agent.abort", params) == answer["payload"]
        assert (await wire.effect("agent.abort", runId=run["runId"]))["status"] == "aborted"


async def test_the_same_abort_sent_twice_at_once_gets_the_same_answer_on_both(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Hang(after=2)]) as home, await home.wire() as one, await home.wire() as two:
        run = await one.effect("agent.run", input="x")
        await one.event("agent.delta")
        params = {"runId": run["runId"], "idempotencyKey": new_key()}
        answers = await asyncio.gather(one.request("agent.abort", params), two.request("agent.abort", params))
        assert answers[0] == answers[1] == {"runId": run["runId"], "status": "aborted"}


async def test_the_run_goes_on_when_its_connection_is_gone(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Say("still here", delay=0.5)]) as home:
        async with await home.wire() as wire:
            run = await wire.effect("agent.run", input="x", sessionId="s_gone")
        async with await home.wire() as wire:
            await wire.request("events.subscribe", {"sessionId": "s_gone", "after": 0})
            done = await wire.event("agent.completed", runId=run["runId"])
            assert done["payload"]["output"] == "still here"
            assert wire.versions("s_gone") == [1, 2, 3, 4]


async def test_a_busy_session_is_refused_and_the_refusal_may_be_tried_again_with_the_same_key(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Hang(after=3), Say("ok")]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="x", sessionId="s_busy")
        await wire.event("agent.delta")
        params = {"input": "y", "sessionId": "s_busy", "idempotencyKey": new_key()}
        with pytest.raises(Refused) as caught:
            await wire.request("agent.run", params)
        assert caught.value.code == "SESSION_BUSY"
        assert caught.value.error["details"] == {"runId": run["runId"]}
        assert caught.value.error["retryable"] is True
        await wire.effect("agent.abort", runId=run["runId"])
        again = await wire.request("agent.run", params)
        await wire.event("agent.completed", runId=again["runId"])


async def test_runs_beyond_the_limit_of_subscriptions_take_the_place_of_idle_ones(tmp_path: Path) -> None:
    options = GatewayOptions(max_subscriptions=3)
    async with house(tmp_path, script=[Say("ok")], options=options) as home, await home.wire() as wire:
        for _ in range(6):
            run = await wire.effect("agent.run", input="x")
            await wire.event("agent.completed", runId=run["runId"])
        await wire.request("events.unsubscribe", {"sessionId": run["sessionId"]})


async def test_runs_that_are_on_do_not_give_way(tmp_path: Path) -> None:
    options = GatewayOptions(max_subscriptions=2)
    async with house(tmp_path, script=[Hang()], options=options) as home, await home.wire() as wire:
        await wire.effect("agent.run", input="x")
        await wire.effect("agent.run", input="x")
        with pytest.raises(Refused) as caught:
            await wire.effect("agent.run", input="x")
        assert caught.value.code == "LIMIT_REACHED"
        assert len((await wire.request("sessions.list"))["items"]) == 2


async def test_side_effects_of_other_methods_are_answered_before_their_events(home: House) -> None:
    async with await home.wire() as wire:
        session = (await wire.effect("sessions.create"))["session"]["id"]
        await wire.request("events.subscribe", {"sessionId": session})
        for number in range(30):
            params = {"sessionId": session, "title": f"t{number}", "idempotencyKey": new_key()}
            await wire.start("sessions.update", params, frame_id=f"u{number}")
        await wire.until(lambda: len(wire.durable) == 30)
        for number in range(30):
            title = f"t{number}"
            told = wire.index(
                lambda f, t=title: f["type"] == "event" and f["payload"]["session"]["title"] == t  # type: ignore[misc]
            )
            assert wire.index(lambda f, n=number: is_response(f, f"u{n}")) < told  # type: ignore[misc]
        # Pipelined effects of one client happen in the order in which they were sent.
        assert [f["payload"]["session"]["title"] for f in wire.durable] == [f"t{number}" for number in range(30)]


async def test_an_answer_is_not_overtaken_by_a_catch_up_that_saw_its_commit(home: House) -> None:
    async with await home.wire() as wire:
        for number in range(60):
            session = (await wire.effect("sessions.create"))["session"]["id"]
            update = {"sessionId": session, "title": "t", "idempotencyKey": new_key()}
            await wire.start("events.subscribe", {"sessionId": session, "after": 0})
            await wire.start("sessions.update", update, frame_id=f"u{number}")
            told = await wire.frame(
                lambda f, s=session: f["type"] == "event" and f["payload"]["sessionId"] == s and f["stateVersion"] == 2  # type: ignore[misc]
            )
            answer = wire.index(lambda f, n=number: is_response(f, f"u{n}"))  # type: ignore[misc]
            assert answer < wire.index(lambda f, t=told: f is t)  # type: ignore[misc]
