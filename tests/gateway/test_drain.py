"""Going down, and being ready."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import aiohttp
import pytest

from corral.gateway.options import GatewayOptions
from tests.support.house import TOKEN, House, house
from tests.support.model_server import Hang
from tests.support.wire import Wire, new_key, rpc


async def status(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_health_and_readiness_need_no_token_and_tell_no_detail(home: House) -> None:
    assert await status(f"{home.url}/healthz") == (200, '{"status": "ok"}')
    assert await status(f"{home.url}/readyz") == (200, '{"status": "ready"}')


async def test_health_and_readiness_are_read_and_nothing_else(home: House) -> None:
    async with aiohttp.ClientSession() as session:
        for path in ("/healthz", "/readyz"):
            async with session.head(home.url + path) as response:
                assert (response.status, await response.read()) == (200, b"")
            for verb in ("POST", "PUT", "DELETE", "OPTIONS"):
                async with session.request(verb, home.url + path) as response:
                    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


async def test_drain_closes_every_socket_with_1012_and_readiness_says_no(home: House) -> None:
    wires = [await home.wire() for _ in range(20)]
    silent = await Wire.open(home.url)
    await home.server.gateway.drain()
    for wire in (*wires, silent):
        assert await wire.closed() == 1012
        await wire.close()
    assert (await status(f"{home.url}/healthz"))[0] == 200
    assert (await status(f"{home.url}/readyz"))[0] == 503
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await Wire.open(home.url)
    assert caught.value.status == 503


async def test_while_draining_a_new_run_is_unavailable_and_reads_go_on(home: House) -> None:
    await home.server.gateway.drain()
    run = await rpc(home.url, "agent.run", {"input": "x", "idempotencyKey": new_key()}, token=TOKEN)
    assert (run.status, run.code) == (503, "UNAVAILABLE")
    assert run.response["error"]["retryable"] is True
    assert (await rpc(home.url, "sessions.list", {}, token=TOKEN)).response["payload"]["items"] == []


async def test_answers_that_are_under_way_still_go_out_before_the_close(home: House) -> None:
    async with await home.wire() as wire:
        for number in range(50):
            await wire.start("sessions.create", {"idempotencyKey": new_key()}, frame_id=f"c{number}")
        await wire.response("c0")
        await home.server.gateway.drain()
        assert await wire.closed() == 1012
        answered = [frame["id"] for frame in wire.frames if frame["type"] == "res" and frame["id"] != "r1"]
        assert len(answered) >= 1
    kept = await home.server.store.read(
        lambda tx: tx.sessions.page("t_default", "w_default", user_id="u_owner", agent_id=None, limit=100, before=None)
    )
    # What was carried out was answered: nothing was done in silence.
    assert len(kept) == len(answered)


async def test_a_server_with_waiting_callers_is_down_in_good_time(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Hang()]) as home:
        wire = await home.wire()
        run = await wire.effect("agent.run", input="x")
        waiting = asyncio.create_task(
            rpc(home.url, "agent.run", {"input": "y", "idempotencyKey": new_key()}, token=TOKEN)
        )
        await home.model.wait(lambda: len(home.model.requests) == 2)
        began = time.monotonic()
        await home.server.drain()
        answer = await waiting
        assert time.monotonic() - began < 10
        assert [event["event"] for event in answer.events] == ["agent.accepted"]
        assert await wire.closed() == 1012
        assert run["status"] == "accepted"
        await wire.close()


async def test_a_client_that_does_not_answer_the_close_holds_nothing_up(tmp_path: Path) -> None:
    async with house(tmp_path, options=GatewayOptions(drain_grace=0.2)) as home:
        host, _, port = home.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b"101" in await reader.readline()
        began = time.monotonic()
        await home.server.gateway.drain()
        assert time.monotonic() - began < home.server.gateway._options.close_grace
        assert home.server.gateway.connections == 0
        writer.close()


async def test_a_store_that_cannot_write_makes_the_server_not_ready(tmp_path: Path) -> None:
    async with house(tmp_path, options=GatewayOptions(readiness_cache=0.0)) as home:
        assert (await status(f"{home.url}/readyz"))[0] == 200
        await home.server.store.close()
        assert (await status(f"{home.url}/readyz"))[0] == 503
        assert (await status(f"{home.url}/healthz"))[0] == 200
        answer = await rpc(home.url, "sessions.list", {}, token=TOKEN)
        assert (answer.status, answer.code) == (503, "UNAVAILABLE")


async def test_a_store_that_does_not_get_its_row_written_in_time_makes_the_server_not_ready(tmp_path: Path) -> None:
    options = GatewayOptions(readiness_cache=0.0, readiness_wait=0.1)
    async with house(tmp_path, options=options) as home:
        with sqlite3.connect(tmp_path / "corral.db", isolation_level=None) as another:
            another.execute("BEGIN IMMEDIATE")
            assert (await status(f"{home.url}/readyz"))[0] == 503
            another.execute("ROLLBACK")
        another.close()
        async with asyncio.timeout(60):
            while (await status(f"{home.url}/readyz"))[0] != 200:  # noqa: ASYNC110  (it is asked over the wire)
                await asyncio.sleep(0.05)
