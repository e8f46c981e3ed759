"""What a stranger can use up before he has shown a token (T-preauth, T-bruteforce)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import aiohttp
import pytest

from corral.gateway.options import GatewayOptions
from corral.gateway.strangers import Strangers
from tests.support.house import TOKEN, House, house
from tests.support.wire import Wire, rpc


async def test_sockets_that_do_not_connect_are_capped_and_the_next_gets_429(tmp_path: Path) -> None:
    options = GatewayOptions(preauth_sockets=5, preauth_wait=0.2)
    async with house(tmp_path, options=options) as home:
        silent = [await Wire.open(home.url) for _ in range(5)]
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await Wire.open(home.url)
        assert caught.value.status == 429
        # Those who connect give their place back; so do those who leave.
        await silent[0].connect(TOKEN)
        extra = await Wire.open(home.url)
        await silent[1].close()
        await home.sockets_gone(left=5)
        last = await Wire.open(home.url)
        for wire in (*silent, extra, last):
            await wire.close()
        await home.sockets_gone()
        assert home.server.gateway._gate._taken == {}


async def test_silent_sockets_are_closed_at_the_deadline_and_leave_nothing(tmp_path: Path) -> None:
    options = GatewayOptions(connect_timeout=2.0, preauth_sockets=60)
    async with house(tmp_path, options=options) as home:
        silent = await asyncio.gather(*(Wire.open(home.url) for _ in range(60)))
        for wire in silent:
            assert await wire.closed() == 4408
            await wire.close()
        await home.sockets_gone()
        assert home.server.gateway._gate._taken == {}


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"POST", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
async def test_who_never_finishes_a_request_is_cut_off_at_the_deadline(tmp_path: Path, sent: bytes) -> None:
    async with house(tmp_path, options=GatewayOptions(connect_timeout=0.5)) as home:
        with await opened(home) as slow:
            slow.sendall(sent)
            end = time.monotonic() + 30
            while not await over(slow, 0.1):
                assert time.monotonic() < end
                if sent.endswith(b": "):
                    with contextlib.suppress(ConnectionError):
                        slow.sendall(b"a")  # now and then, as if more were to come
        assert len(strangers(home)) == 0


async def test_who_was_answered_may_ask_again_later_than_the_deadline_of_a_first_request(tmp_path: Path) -> None:
    ask, options = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", GatewayOptions(connect_timeout=0.5)
    async with house(tmp_path, options=options) as home:
        with await opened(home) as probe:
            loop = asyncio.get_running_loop()
            for _ in range(2):
                probe.sendall(ask)
                assert (await loop.sock_recv(probe, 15)) == b"HTTP/1.1 200 OK"
                assert await loop.sock_recv(probe, 1000)  # the rest of it
                # One that came after it is cut off: by then the probe's own first deadline is over too.
                with await opened(home, wanted=2) as silent:
                    while not await over(silent, 0.1):
                        continue


async def test_who_was_answered_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async with house(tmp_path, options=GatewayOptions(connect_timeout=0.1, kept_alive=0.3)) as home:
        with await opened(home) as probe:
            probe.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(30):
                while await loop.sock_recv(probe, 1000):
                    continue
        assert len(strangers(home)) == 0


async def test_of_idle_strangers_the_oldest_goes_when_there_are_too_many_and_nobody_who_is_known(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, options=GatewayOptions(strangers=5)) as home, await home.wire() as wire:
        with contextlib.ExitStack() as stack:
            known = stack.enter_context(await opened(home))
            known.sendall(b"GET /schema/protocol.json HTTP/1.1\r\nHost: localhost\r\n")
            known.sendall(b"Authorization: Bearer %b\r\n\r\n" % TOKEN.encode())
            assert (await asyncio.get_running_loop().sock_recv(known, 15)) == b"HTTP/1.1 200 OK"
            first, *rest = [stack.enter_context(await opened(home)) for _ in range(5)]
            rest.append(stack.enter_context(await opened(home, wanted=5)))
            while not await over(first, 0.1):
                continue
            assert len(strangers(home)) == 5
            assert [await over(each, 0.01) for each in rest] == [False] * 5
            assert (await wire.request("sessions.list"))["items"] == []


async def opened(home: House, wanted: int | None = None) -> socket.socket:
    """A bare connection, once the gateway counts it, or as many as `wanted`."""
    wanted = len(strangers(home)) + 1 if wanted is None else wanted
    host, _, port = home.url.removeprefix("http://").partition(":")
    bare = socket.create_connection((host, int(port)))
    bare.setblocking(False)
    async with asyncio.timeout(30):
        while len(strangers(home)) != wanted:  # noqa: ASYNC110 - accepting tells nobody
            await asyncio.sleep(0.005)
    return bare


async def over(bare: socket.socket, seconds: float) -> bool:
    """Whether the other side ends the connection within so many seconds, without a word."""
    try:
        async with asyncio.timeout(seconds):
            assert await asyncio.get_running_loop().sock_recv(bare, 100) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def strangers(home: House) -> Strangers:
    return home.server.gateway._runner._strangers


async def test_a_burst_of_honest_clients_waits_its_turn_and_all_get_in(tmp_path: Path) -> None:
    async with house(tmp_path, options=GatewayOptions(preauth_sockets=16)) as home:
        wires = await asyncio.gather(*(home.wire() for _ in range(300)))
        for wire in wires:
            assert (await wire.request("sessions.list"))["items"] == []
            await wire.close()


async def test_before_connect_a_frame_over_64_kib_closes_with_1009(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        frame = '{"type":"req","id":"c","method":"connect","params":{"auth":{"token":"' + TOKEN + '"},"x":"'
        for size, closes in ((64 * 1024, False), (64 * 1024 + 1, True)):
            async with await Wire.open(home.url) as wire:
                await wire.send(frame + "x" * (size - len(frame) - 3) + '"}}')
                if closes:
                    assert await wire.closed() == 1009
                    assert wire.frames == []
                else:
                    assert (await wire.response("c"))["ok"] is True


async def limited(home: House) -> None:
    """All doors are shut for this address, also before the right token."""
    answer = await rpc(home.url, "sessions.list", {}, token=TOKEN)
    assert (answer.status, answer.code) == (429, "RATE_LIMITED")
    async with await Wire.open(home.url) as wire:
        response = await wire.call("connect", {"auth": {"token": TOKEN}})
        assert response["error"]["code"] == "RATE_LIMITED"
        assert response["error"]["retryable"] is True
        assert await wire.closed() == 4429


@pytest.mark.parametrize("extra", [{}, {"deviceToken": "x"}, {"client": {"name": "cli"}}])
async def test_failed_attempts_run_out_on_loopback_too_whatever_comes_with_them(
    tmp_path: Path, extra: dict[str, object]
) -> None:
    options = GatewayOptions(failed_auth_burst=10, failed_auth_refill=0.001)
    async with house(tmp_path, options=options) as home:
        for number in range(5):
            async with await Wire.open(home.url, headers={"Origin": home.url}) as wire:
                response = await wire.call("connect", {"auth": {"token": f"guess{number}"}, **extra})
                assert response["error"]["code"] == "UNAUTHORIZED"
            headers = {
                "X-Forwarded-For": f"10.0.0.{number}",
                "X-Device-Token": "x",
                "Forwarded": f"for=10.0.0.{number}",
            }
            answer = await rpc(home.url, "sessions.list", {}, token=f"guess{number}", headers=headers)
            assert answer.status == 401
        await limited(home)


async def test_missing_tokens_and_good_ones_are_no_guesses(tmp_path: Path) -> None:
    options = GatewayOptions(failed_auth_burst=3, failed_auth_refill=0.001)
    async with house(tmp_path, options=options) as home:
        for _ in range(10):
            assert (await rpc(home.url, "sessions.list", {})).status == 401
            assert (await rpc(home.url, "sessions.list", {}, token=TOKEN)).status == 200
        async with await home.wire() as wire:
            assert wire.hello["connectionId"]


async def test_time_opens_the_door_again_and_open_sockets_never_noticed(tmp_path: Path) -> None:
    options = GatewayOptions(failed_auth_burst=3, failed_auth_refill=5)
    async with house(tmp_path, options=options) as home, await home.wire() as wire:
        statuses = set()
        for number in range(12):
            statuses.add((await rpc(home.url, "sessions.list", {}, token=f"guess{number}")).status)
        assert 429 in statuses
        assert (await wire.request("sessions.list"))["items"] == []
        began = time.monotonic()
        while (await rpc(home.url, "sessions.list", {}, token=TOKEN)).status != 200:
            assert time.monotonic() - began < 60
            await asyncio.sleep(0.05)


async def test_the_body_of_a_stranger_is_not_read(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        host, _, port = home.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        # Announced, never sent: the answer does not wait for it.
        writer.write(b"POST /rpc HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        async with asyncio.timeout(30):
            assert b" 401 " in await reader.readline()
        writer.close()
