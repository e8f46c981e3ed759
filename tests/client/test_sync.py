"""The blocking face of the client, used from a thread as a script uses it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from corral.client import CorralSync, Done, Event, GatewayUnreachable, RunFailed
from corral.protocol.errors import InvalidRequest, Unauthorized
from tests.support.gateway import Gateway
from tests.support.model_server import CallTools, Hang, ModelServer, Say, conversation
from tests.support.proxy import CuttingProxy


def _no_thread_is_left() -> bool:
    return "corral" not in {thread.name for thread in threading.enumerate()}


async def test_a_run_gives_its_output_and_its_events(gateway: Gateway, model: ModelServer) -> None:
    model.set_script(conversation([CallTools([("file_list", {})]), Say("Done.")]))
    seen: list[Event] = []

    def script() -> Done:
        with CorralSync(*gateway.address()) as corral:
            assert corral.request("sessions.list")["items"] == []
            return corral.run("go", session_id="one", on_event=seen.append)

    done = await asyncio.to_thread(script)
    assert (done.output, done.steps, done.session_id) == ("Done.", 2, "one")
    assert done.events == seen
    assert [seen[0].event, seen[-1].event] == ["agent.accepted", "agent.completed"]
    assert _no_thread_is_left()


async def test_a_run_that_does_not_complete_raises_with_its_code(gateway: Gateway, model: ModelServer) -> None:
    model.set_script([Hang()])

    def script() -> RunFailed:
        with CorralSync(*gateway.address()) as corral:

            def abort(event: Event) -> None:
                if event.event == "agent.accepted":
                    assert corral.abort(event.payload.run_id) == "aborted"

            with pytest.raises(RunFailed) as caught:
                corral.run("go", session_id="one", on_event=abort)
            return caught.value

    error = await asyncio.to_thread(script)
    assert (error.code, error.session_id) == ("ABORTED", "one")


async def test_leaving_a_stream_leaves_the_run_going_and_the_client_well(gateway: Gateway, model: ModelServer) -> None:
    model.set_script(conversation([CallTools([("file_list", {})]), Say("Done.", chunks=5, delay=0.05)]))

    def script() -> list[str]:
        with CorralSync(*gateway.address()) as corral:
            for _ in corral.stream("go", session_id="one"):
                break
            names = []
            for event in corral.events("one", after=0):
                names.append(event.event)
                if event.event == "agent.completed":
                    return names
        raise AssertionError("events came to an end")

    names = await asyncio.to_thread(script)
    assert [name for name in names if name != "agent.delta"][-2:] == ["agent.message", "agent.completed"]


async def test_a_cut_connection_is_not_seen(gateway: Gateway, model: ModelServer) -> None:
    model.set_script([Say("word " * 30, chunks=30, delay=0.03)])
    async with CuttingProxy(lambda: gateway.url) as proxy:
        loop = asyncio.get_running_loop()

        def script() -> Done:
            with CorralSync(proxy.url, gateway.token()) as corral:
                return corral.run("go", on_event=lambda event: cut() if event.event == "agent.accepted" else None)

        def cut() -> None:
            loop.call_soon_threadsafe(proxy.cut)

        done = await asyncio.to_thread(script)
        assert proxy.connections >= 2
    assert done.output == "word " * 30
    versions = [event.state_version for event in done.events if event.event != "agent.delta"]
    assert versions == list(range(versions[0], versions[0] + len(versions)))


async def test_what_cannot_be_connected_raises_and_leaves_no_thread(gateway: Gateway) -> None:
    def enter(url: str, token: str) -> None:
        with CorralSync(url, token):
            raise AssertionError("connected")

    with pytest.raises(Unauthorized):
        await asyncio.to_thread(enter, gateway.url, "wrong-wrong-wrong-wrong")
    url, token = gateway.address()
    await gateway.stop()
    with pytest.raises(GatewayUnreachable):
        await asyncio.to_thread(enter, url, token)
    assert _no_thread_is_left()


async def test_errors_and_use_outside_of_with_are_told(gateway: Gateway) -> None:
    def script() -> None:
        corral = CorralSync(*gateway.address())
        with pytest.raises(RuntimeError, match="not connected"):
            corral.request("sessions.list")
        with corral, pytest.raises(InvalidRequest, match="runId"):
            corral.request("runs.get", runId=5)
        with pytest.raises(RuntimeError, match="not connected"):
            corral.run("go")

    await asyncio.to_thread(script)
