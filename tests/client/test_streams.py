"""What a client does at moments that a real gateway seldom brings about: a scripted peer brings them about."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from corral.client import Corral, Event, GatewayUnreachable
from corral.client.streams import Stream
from tests.support.web import at_ws

HELLO = {
    "protocolVersion": "1.0.0",
    "serverTime": "2026-01-01T00:00:00.000Z",
    "serverVersion": "0",
    "connectionId": "c_1",
    "principal": {
        "subject": "u",
        "userId": "u",
        "tenantId": "t",
        "workspaceIds": ["w"],
        "roles": ["owner"],
        "authSource": "token",
    },
    "workspaceId": "w",
    "features": {"methods": [], "events": []},
    "limits": {"maxFrameBytes": 65536, "heartbeatMs": 30000, "maxSubscriptions": 10, "maxStepsPerRun": 5},
    "pendingApprovals": [],
}


class Peer:
    """One connection, seen from the gateway's side."""

    def __init__(self, socket: web.WebSocketResponse, number: int) -> None:
        self.socket = socket
        self.number = number
        self._seq = 0

    async def asked(self) -> dict[str, Any]:
        """The next request."""
        return dict(json.loads(await asyncio.wait_for(self.socket.receive_str(), 10)))

    async def nothing_asked(self, seconds: float = 0.2) -> bool:
        try:
            await asyncio.wait_for(self.socket.receive_str(), seconds)
        except TimeoutError:
            return True
        return False

    async def answer(self, request: dict[str, Any], payload: Any) -> None:
        await self.socket.send_json({"type": "res", "id": request["id"], "ok": True, "payload": payload})

    async def refuse(self, request: dict[str, Any], code: str, *, retryable: bool) -> None:
        error = {"code": code, "message": "not now", "retryable": retryable, "traceId": "t"}
        await self.socket.send_json({"type": "res", "id": request["id"], "ok": False, "error": error})

    async def event(self, name: str, version: int, **payload: Any) -> None:
        self._seq += 1
        frame = {"event": name, "payload": {"sessionId": "s", **payload}, "seq": self._seq, "stateVersion": version}
        await self.socket.send_json({"type": "event", **frame})


@asynccontextmanager
async def gateway(play: Callable[[Peer], Awaitable[None]], port: int) -> AsyncIterator[str]:
    """A peer that plays `play` on each connection after `connect`, then closes it."""
    failures: list[BaseException] = []
    count = 0

    async def endpoint(request: web.Request) -> web.WebSocketResponse:
        nonlocal count
        count += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        peer = Peer(socket, count)
        try:
            await peer.answer(await peer.asked(), HELLO)
            await play(peer)
        except Exception as error:
            failures.append(error)
        await socket.close()
        return socket

    async with at_ws(endpoint, port) as url:
        yield url
    assert failures == []


async def _until_closed(peer: Peer) -> None:
    async for _ in peer.socket:
        pass


COMPLETED = {"runId": "r", "output": "", "steps": 1, "usage": {"inputTokens": 1, "outputTokens": 1, "costUsd": None}}
ACCEPTED = {"runId": "r", "runtimeMode": "local", "input": "x"}


async def test_a_run_whose_events_never_came_is_asked_for_again_with_the_same_key(unused_tcp_port: int) -> None:
    keys = []

    async def play(peer: Peer) -> None:
        request = await peer.asked()
        assert request["method"] == "agent.run"
        keys.append(request["params"]["idempotencyKey"])
        await peer.answer(request, {"runId": "r", "sessionId": "s", "status": "accepted"})
        if peer.number == 2:
            await peer.event("agent.accepted", 1, **ACCEPTED)
            await peer.event("agent.completed", 2, **COMPLETED)
            await _until_closed(peer)

    async with gateway(play, unused_tcp_port) as url, Corral(url, "t" * 20) as corral:
        async with asyncio.timeout(60):
            events = [event.event async for event in corral.run("x")]
    assert events == ["agent.accepted", "agent.completed"]
    assert len(keys) == 2
    assert keys[0] == keys[1]


async def test_a_subscription_is_not_begun_while_one_of_its_session_is_being_ended(unused_tcp_port: int) -> None:
    async def play(peer: Peer) -> None:
        request = await peer.asked()
        await peer.answer(request, {"sessionId": "s", "stateVersion": 0})
        await peer.event("agent.accepted", 1, **ACCEPTED)
        leaving = await peer.asked()
        assert leaving["method"] == "events.unsubscribe"
        assert await peer.nothing_asked()
        await peer.answer(leaving, {})
        request = await peer.asked()
        assert (request["method"], request["params"]["after"]) == ("events.subscribe", 0)
        await peer.answer(request, {"sessionId": "s", "stateVersion": 1})
        await peer.event("agent.accepted", 1, **ACCEPTED)
        await _until_closed(peer)

    async with gateway(play, unused_tcp_port) as url, Corral(url, "t" * 20) as corral:
        async with asyncio.timeout(60):
            for _ in range(2):
                events = corral.events("s", after=0)
                assert (await anext(events)).state_version == 1
                await events.aclose()  # type: ignore[attr-defined]


async def test_a_subscription_that_cannot_be_had_just_now_is_asked_for_again(unused_tcp_port: int) -> None:
    async def play(peer: Peer) -> None:
        for _ in range(2):
            await peer.refuse(await peer.asked(), "UNAVAILABLE", retryable=True)
        await peer.answer(await peer.asked(), {"sessionId": "s", "stateVersion": 0})
        await peer.event("agent.accepted", 1, **ACCEPTED)
        await _until_closed(peer)

    async with gateway(play, unused_tcp_port) as url, Corral(url, "t" * 20) as corral:
        async with asyncio.timeout(60):
            assert (await anext(corral.events("s", after=0))).state_version == 1


async def test_an_event_of_a_later_protocol_comes_through_as_it_is(unused_tcp_port: int) -> None:
    async def play(peer: Peer) -> None:
        await peer.answer(await peer.asked(), {"sessionId": "s", "stateVersion": 0})
        await peer.event("agent.pondered", 1, depth=3)
        await peer.event("agent.accepted", 2, runId=7)
        await _until_closed(peer)

    async with gateway(play, unused_tcp_port) as url, Corral(url, "t" * 20) as corral:
        async with asyncio.timeout(60):
            events = corral.events("s")
            assert (await anext(events)).payload == {"sessionId": "s", "depth": 3}
            assert (await anext(events)).payload == {"sessionId": "s", "runId": 7}


async def test_a_gateway_that_closes_every_socket_at_once_is_given_up(unused_tcp_port: int) -> None:
    async def play(peer: Peer) -> None:
        return

    async with gateway(play, unused_tcp_port) as url, Corral(url, "t" * 20) as corral:
        async with asyncio.timeout(60):
            with pytest.raises(GatewayUnreachable, match="at once"):
                await corral.request("sessions.list")


def _durable(version: int) -> Event:
    return Event(event="agent.message", payload={}, state_version=version)


def test_a_stream_takes_nothing_twice_and_nothing_past_a_gap() -> None:
    stream = Stream(5)
    for version in (5, 6, 6, 7, 3):
        stream.take_in(_durable(version))
    assert (stream.position, stream.behind) == (7, False)
    stream.take_in(_durable(9))
    stream.take_in(_durable(8))
    assert (stream.position, stream.behind) == (7, True)
