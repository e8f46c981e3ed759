"""The Python client over real sockets: one answer to a request, each event once, whatever is cut."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from corral.client import Corral, Event, GatewayUnreachable
from corral.client import streams as streams_module
from corral.protocol.errors import IdempotencyConflict, InvalidRequest, MethodNotFound, SessionBusy, Unauthorized
from corral.protocol.events import AgentCompleted, AgentFailed, AgentMessage
from tests.support.gateway import Gateway
from tests.support.model_server import CallTools, Hang, ModelServer, Say, conversation
from tests.support.proxy import CuttingProxy
from tests.support.web import at_ws


def _versions(events: list[Event]) -> list[int]:
    return [event.state_version for event in events if event.event != "agent.delta"]


def _without_gap_or_repeat(versions: list[int]) -> bool:
    return versions == list(range(versions[0], versions[0] + len(versions)))


# ---- asking


async def test_a_run_is_its_events_from_accepted_to_the_terminal_one(gateway: Gateway, model: ModelServer) -> None:
    model.set_script(conversation([CallTools([("file_list", {})]), Say("Done.", chunks=3)]))
    async with Corral(*gateway.address()) as corral:
        events = [event async for event in corral.run("go", session_id="one")]
    assert [event.event for event in events if event.event != "agent.delta"] == [
        "agent.accepted",
        "agent.message",
        "agent.tool_call",
        "agent.tool_result",
        "agent.message",
        "agent.completed",
    ]
    assert _without_gap_or_repeat(_versions(events))
    last = events[-1].payload
    assert isinstance(last, AgentCompleted)
    assert last.output == "Done."


async def test_errors_are_the_protocols_classes_and_carry_the_trace(gateway: Gateway) -> None:
    async with Corral(*gateway.address()) as corral:
        with pytest.raises(InvalidRequest, match=r"\$\.params\.runId") as caught:
            await corral.request("runs.get", runId=5)
        assert caught.value.__notes__[0].startswith("traceId ")
        with pytest.raises(MethodNotFound):
            await corral.request("no.such.method")
        await corral.request("sessions.create", title="a", idempotencyKey="k")
        with pytest.raises(IdempotencyConflict):
            await corral.request("sessions.create", title="b", idempotencyKey="k")


async def test_a_side_effect_gets_a_key_of_its_own_each_time(gateway: Gateway) -> None:
    async with Corral(*gateway.address()) as corral:
        first = await corral.request("sessions.create", title="same")
        second = await corral.request("sessions.create", title="same")
    assert first["session"]["id"] != second["session"]["id"]


async def test_a_busy_session_raises_with_the_run_that_is_on(gateway: Gateway, model: ModelServer) -> None:
    model.set_script([Hang()])
    async with Corral(*gateway.address()) as corral:
        run = corral.run("x", session_id="one")
        run_id = (await anext(run)).payload.run_id
        with pytest.raises(SessionBusy) as caught:
            await anext(corral.run("y", session_id="one"))
        assert caught.value.details == {"runId": run_id}
        assert await corral.abort(run_id) == "aborted"
        rest = [event async for event in run]
        assert isinstance(rest[-1].payload, AgentFailed)
        assert rest[-1].payload.code == "ABORTED"


async def test_a_request_over_the_gateways_limit_is_refused_here_and_the_connection_lives(gateway: Gateway) -> None:
    async with Corral(*gateway.address()) as corral:
        with pytest.raises(InvalidRequest, match="larger than the gateway takes"):
            await corral.request("sessions.create", title="x" * corral.hello.limits.max_frame_bytes)
        assert (await corral.request("sessions.list"))["items"] == []


async def test_a_wrong_token_and_an_absent_gateway_are_told_apart(gateway: Gateway) -> None:
    with pytest.raises(Unauthorized):
        async with Corral(gateway.url, "wrong-wrong-wrong-wrong"):
            pass
    await gateway.stop()
    with pytest.raises(GatewayUnreachable, match="no gateway answers"):
        async with Corral(gateway.url, "wrong-wrong-wrong-wrong"):
            pass


async def test_what_is_no_gateway_is_told(unused_tcp_port: int) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="I am a web server")

    async with at_ws(hello, unused_tcp_port) as url:
        with pytest.raises(GatewayUnreachable, match="no gateway"):
            async with Corral(url, "t" * 20):
                pass


# ---- streams


async def test_two_streams_of_one_session_each_get_everything_from_where_they_began(
    gateway: Gateway, model: ModelServer
) -> None:
    model.set_script(conversation([Say("one", chunks=5)]))
    async with Corral(*gateway.address()) as corral:
        ran = [event async for event in corral.run("x", session_id="s")]
        whole = await _take(corral.events("s", after=0), until=ran[-1].state_version)
        part = await _take(corral.events("s", after=2), until=ran[-1].state_version)
    assert _versions(whole) == list(range(1, ran[-1].state_version + 1))
    assert _versions(part) == list(range(3, ran[-1].state_version + 1))


async def test_a_stream_that_begins_earlier_than_one_that_is_on_misses_nothing(
    gateway: Gateway, model: ModelServer
) -> None:
    """The second asks for the past while the first is fed the present over the same socket."""
    model.set_script(conversation([Say("first")]))
    async with Corral(*gateway.address()) as corral:
        async for _ in corral.run("x", session_id="s"):
            pass
        model.set_script(conversation([*[CallTools([("file_list", {})])] * 10, Say("second")]))
        run = corral.run("y", session_id="s")
        await anext(run)
        late = asyncio.create_task(_take(corral.events("s", after=0), until_event="agent.completed", count=2))
        ran = [event async for event in run]
        whole = await asyncio.wait_for(late, 20)
    assert _without_gap_or_repeat(_versions(ran))
    assert _versions(whole) == list(range(1, ran[-1].state_version + 1))


async def test_a_reader_that_is_too_slow_loses_nothing(
    gateway: Gateway, model: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "STREAM_LIMIT", 4)
    model.set_script(conversation([*[CallTools([("file_list", {})])] * 8, Say("done")]))
    async with Corral(*gateway.address()) as corral:
        run = corral.run("x", session_id="s")
        events = [await anext(run)]
        # Another connection sees the run end while this one's reader takes nothing.
        async with Corral(*gateway.address()) as other:
            await _take(other.events("s", after=0), until_event="agent.completed")
        [stream] = corral._link.channels._by_session["s"].streams
        assert len(stream._waiting) <= 4
        async with asyncio.timeout(30):
            events += [event async for event in run]
    assert events[-1].event == "agent.completed"
    assert _without_gap_or_repeat(_versions(events))


async def test_a_session_that_there_is_none_of_ends_the_stream_with_its_error(gateway: Gateway) -> None:
    from corral.protocol.errors import NotFound

    async with Corral(*gateway.address()) as corral:
        with pytest.raises(NotFound):
            await anext(corral.events("nobody"))


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


async def _take(
    events: AsyncIterator[Event], *, until: int | None = None, until_event: str = "", count: int = 1
) -> list[Event]:
    taken = []
    async with asyncio.timeout(30):
        async for event in events:
            taken.append(event)
            count -= event.event == until_event
            if event.state_version == until or count == 0:
                return taken
    return taken


# ---- cuts


async def test_a_client_cut_off_50_times_gets_each_event_once_and_in_order(
    gateway: Gateway, model: ModelServer
) -> None:
    cuts = 0

    def model_says(_request: dict[str, Any]) -> Any:
        """The run goes on until it was cut off often enough, however fast the machine is."""
        if cuts < 50:
            return CallTools([("file_list", {})], text="a step " * 8, delay=0.2)
        return Say("the end of it " * 20, chunks=40)

    model.set_script(model_says)
    dice = random.Random(7)
    async with CuttingProxy(lambda: gateway.url) as proxy, Corral(proxy.url, gateway.token()) as corral:
        events = []

        async def cutting() -> None:
            nonlocal cuts
            while cuts < 50:
                await asyncio.sleep(dice.uniform(0.0, 0.12))
                proxy.cut()
                cuts += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(cutting())
            async for event in corral.run("go", session_id="one", limits={"maxSteps": 1000}):
                events.append(event)
    assert cuts == 50
    assert _without_gap_or_repeat(_versions(events))
    assert events[0].event == "agent.accepted"
    assert events[-1].event == "agent.completed"
    assert sum(event.event == "agent.message" for event in events) == len(model.requests)
    _check_deltas(events)


async def test_streams_that_come_and_go_while_the_connection_is_cut_each_miss_nothing(
    gateway: Gateway, model: ModelServer
) -> None:
    """One session, one run, and readers that begin at different places and leave at different times."""
    model.set_script(conversation([*[CallTools([("file_list", {})], delay=0.03)] * 30, Say("done")]))
    dice = random.Random(11)
    async with CuttingProxy(lambda: gateway.url) as proxy, Corral(proxy.url, gateway.token()) as corral:
        run = corral.run("go", session_id="s")
        ran = [await anext(run)]

        async def read(after: int, leave_at: int | None) -> list[int]:
            versions = []
            async for event in corral.events("s", after=after):
                if event.event != "agent.delta":
                    versions.append(event.state_version)
                if event.event == "agent.completed" or event.state_version == leave_at:
                    break
            return versions

        async def readers() -> list[tuple[int, int | None, list[int]]]:
            found = []
            for after, leave_at in [(0, 10), (5, None), (0, 40), (20, 30), (0, None), (1, 60)]:
                found.append((after, leave_at, await read(after, leave_at)))
            return found

        async def cutting() -> None:
            while True:
                await asyncio.sleep(dice.uniform(0.05, 0.25))
                proxy.cut()

        async with asyncio.timeout(60):
            cutter = asyncio.create_task(cutting())
            two = [asyncio.create_task(readers()) for _ in range(2)]
            ran += [event async for event in run]
            cutter.cancel()
            found = [row for rows in await asyncio.gather(*two) for row in rows]
            await asyncio.gather(cutter, return_exceptions=True)
    last = ran[-1].state_version
    assert _without_gap_or_repeat(_versions(ran))
    for after, leave_at, versions in found:
        assert versions == list(range(after + 1, (leave_at or last) + 1))


def _check_deltas(events: list[Event]) -> None:
    """What the deltas build up is the message; after a cut they begin again at 0 or go on."""
    text: dict[str, str] = {}
    for event in events:
        payload = event.payload
        if event.event == "agent.delta":
            so_far = text.get(payload.message_id, "")
            assert payload.offset <= len(so_far)
            text[payload.message_id] = so_far[: payload.offset] + payload.delta
        elif isinstance(payload, AgentMessage):
            assert payload.text.startswith(text.get(payload.message_id, "")[: len(payload.text)])


async def test_a_lost_answer_is_asked_for_again_and_the_effect_happens_once(gateway: Gateway) -> None:
    """The connection dies between request and answer, again and again; every session is made once."""
    async with CuttingProxy(lambda: gateway.url) as proxy, Corral(proxy.url, gateway.token()) as corral:
        requests = [asyncio.create_task(corral.request("sessions.create", title=f"n{n}")) for n in range(40)]
        for _ in range(10):
            await asyncio.sleep(0.03)
            proxy.cut()
        made = await asyncio.wait_for(asyncio.gather(*requests), 30)
        listed = (await corral.request("sessions.list", limit=200))["items"]
    assert sorted(item["title"] for item in listed) == sorted(f"n{n}" for n in range(40))
    assert {item["session"]["id"] for item in made} == {item["id"] for item in listed}


async def test_a_run_whose_gateway_is_killed_comes_back_on_another_port(gateway: Gateway, model: ModelServer) -> None:
    model.set_script(conversation([CallTools([("file_list", {})]), [Hang(), Say("after")]]))
    states: list[str] = []
    async with Corral(
        *gateway.address(), address=gateway.address, on_state=lambda state, _reason: states.append(state)
    ) as corral:
        events = []
        run = corral.run("x", session_id="one")
        async for event in run:
            events.append(event)
            if event.event == "agent.tool_result":
                await model.wait(lambda: len(model.requests) == 2)
                await gateway.kill()
                await gateway.start()
    assert events[-1].event == "agent.completed"
    assert "agent.resumed" in [event.event for event in events]
    assert _without_gap_or_repeat(_versions(events))
    assert states == ["lost", "restored"]


async def test_a_gateway_that_does_not_come_back_is_given_up_after_the_time_given(
    gateway: Gateway, model: ModelServer
) -> None:
    model.set_script([Hang()])
    async with Corral(*gateway.address(), reconnect_for=0.5) as corral:
        run = corral.run("x")
        await anext(run)
        await gateway.kill()
        async with asyncio.timeout(60):
            with pytest.raises(GatewayUnreachable):
                await anext(run)
            with pytest.raises(GatewayUnreachable):
                await corral.request("sessions.list")


async def test_leaving_a_client_ends_what_waits_and_leaves_no_task(gateway: Gateway, model: ModelServer) -> None:
    model.set_script([Hang()])
    before = asyncio.all_tasks()
    async with Corral(*gateway.address()) as corral:
        run = corral.run("x")
        await anext(run)
        waiting = asyncio.create_task(_next(run))
        await asyncio.sleep(0)
    with pytest.raises(GatewayUnreachable, match="closed"):
        await asyncio.wait_for(waiting, 10)
    assert asyncio.all_tasks() == before


async def test_the_token_travels_in_the_frame_and_never_in_the_url(unused_tcp_port: int) -> None:
    seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    async def endpoint(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        frame = await socket.receive_json()
        seen.append((request.path_qs, dict(request.headers), frame))
        await socket.close(code=4401)
        return socket

    async with at_ws(endpoint, unused_tcp_port) as url:
        with pytest.raises(Unauthorized):
            async with Corral(url, "secret-secret-secret"):
                pass
    [(path, headers, frame)] = seen
    assert path == "/ws"
    assert "secret" not in str(headers)
    assert frame["params"]["auth"] == {"type": "Bearer", "token": "secret-secret-secret"}
