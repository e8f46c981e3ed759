"""What an address may do before anybody knows who it is."""

from __future__ import annotations

import asyncio

import pytest

from corral.gateway.limits import FailedAuthLimiter, PreauthGate, address_key
from corral.gateway.options import GatewayOptions
from corral.protocol.errors import RateLimited


def test_an_address_is_one_however_it_is_written() -> None:
    assert address_key("::ffff:10.1.2.3") == address_key("10.1.2.3") == "10.1.2.3"
    assert address_key("::ffff:0a01:0203") == "10.1.2.3"
    assert address_key("2001:db8:1:2::7") == address_key("2001:db8:1:2:ffff::1")
    assert address_key("2001:db8:1:2::7") != address_key("2001:db8:1:3::7")
    assert address_key("fe80::1%eth0") == address_key("fe80::2%eth1")
    assert address_key(None) == "unknown"


def test_failures_empty_the_bucket_and_time_fills_it() -> None:
    now = 0.0
    limiter = FailedAuthLimiter(lambda: now, GatewayOptions(failed_auth_burst=3, failed_auth_refill=2))
    for _ in range(3):
        limiter.check("a")
        limiter.failed("a")
    with pytest.raises(RateLimited):
        limiter.check("a")
    limiter.check("b")
    now = 0.5
    limiter.check("a")
    limiter.failed("a")
    with pytest.raises(RateLimited):
        limiter.check("a")
    now = 1000.0
    for _ in range(3):
        limiter.check("a")
        limiter.failed("a")
    with pytest.raises(RateLimited):
        limiter.check("a")


def test_the_table_of_addresses_is_bounded() -> None:
    limiter = FailedAuthLimiter(lambda: 0.0, GatewayOptions(tracked_addresses=50))
    for number in range(1000):
        limiter.failed(f"10.0.{number // 256}.{number % 256}")
    assert len(limiter) == 50


async def test_the_gate_lets_so_many_in_and_the_next_as_places_come_free_in_order() -> None:
    gate = PreauthGate(GatewayOptions(preauth_sockets=2, preauth_wait=5))
    await gate.enter("a")
    await gate.enter("a")
    await gate.enter("b")
    order: list[int] = []

    async def late(number: int) -> None:
        await gate.enter("a")
        order.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(late(number))
        await asyncio.sleep(0)
        assert order == []
        for expected in ([0], [0, 1], [0, 1, 2]):
            gate.leave("a")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert order == expected
    gate.leave("a")
    gate.leave("a")
    gate.leave("b")
    assert (gate.taken("a"), gate.taken("b"), gate._queues, gate._taken) == (0, 0, {}, {})


async def test_who_waits_too_long_or_gives_up_is_refused_and_costs_no_place() -> None:
    gate = PreauthGate(GatewayOptions(preauth_sockets=1, preauth_wait=0.05, preauth_waiting=2))
    await gate.enter("a")
    with pytest.raises(RateLimited):
        await gate.enter("a")
    giving_up = asyncio.create_task(gate.enter("a"))
    await asyncio.sleep(0)
    giving_up.cancel()
    await asyncio.wait({giving_up})
    gate.leave("a")
    await gate.enter("a")
    assert gate.taken("a") == 1
    waiting = [asyncio.create_task(gate.enter("a")) for _ in range(3)]
    await asyncio.sleep(0)
    assert isinstance(waiting[2].exception() if waiting[2].done() else None, RateLimited)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, RateLimited) for result in results)
    gate.leave("a")
    assert gate._taken == {}
    assert gate._queues == {}


async def test_a_place_handed_to_one_who_gives_up_in_the_same_moment_is_passed_on() -> None:
    gate = PreauthGate(GatewayOptions(preauth_sockets=1, preauth_wait=5))
    await gate.enter("a")
    first, second = (asyncio.create_task(gate.enter("a")) for _ in range(2))
    await asyncio.sleep(0)
    gate.leave("a")
    first.cancel()
    await asyncio.wait({first, second}, timeout=20)
    assert first.cancelled()
    assert second.done()
    gate.leave("a")
    assert gate._taken == {}
