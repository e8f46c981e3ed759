"""How many requests a principal may make, and an address of nobody known; over WebSocket and HTTP alike."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from corral.gateway.limits import Buckets, RequestLimiter
from corral.gateway.options import GatewayOptions
from corral.protocol.errors import RateLimited
from corral.protocol.types import Principal
from tests.support.house import TOKEN, house
from tests.support.stream import EventStream
from tests.support.wire import Wire, rpc

FEW = GatewayOptions(request_rate=2, request_burst=4)


def principal(subject: str, tenant: str = "t") -> Principal:
    return Principal(
        subject=subject, user_id=subject, tenant_id=tenant, workspace_ids=[], roles=["owner"], auth_source="token"
    )


def test_by_default_nothing_under_a_thousand_a_second_is_ever_limited() -> None:
    now = 0.0
    limiter = RequestLimiter(lambda: now, GatewayOptions(), 1000)
    for _ in range(20_000):
        limiter.known(principal("a"))
        now += 1 / 999
    for _ in range(2000):
        limiter.known(principal("a"))
    with pytest.raises(RateLimited) as caught:
        limiter.known(principal("a"))
    assert caught.value.details == {"retryAfterMs": 1}
    now += 0.0011
    limiter.known(principal("a"))


def test_each_principal_and_each_address_has_a_bucket_of_its_own_and_few_are_kept() -> None:
    options = GatewayOptions(request_rate=1, request_burst=1, tracked_principals=50, tracked_addresses=20)
    limiter = RequestLimiter(lambda: 0.0, options, 1000)
    for tenant in ("t1", "t2"):
        limiter.known(principal("a", tenant))
        with pytest.raises(RateLimited) as caught:
            limiter.known(principal("a", tenant))
        assert caught.value.details == {"retryAfterMs": 1000}
    for number in range(500):
        limiter.known(principal(f"p{number}"))
        limiter.unknown(f"10.0.0.{number}")
    assert len(limiter) == 70


def test_a_bucket_fills_at_its_rate_and_not_beyond_its_burst() -> None:
    now = 0.0
    bucket = Buckets(lambda: now, rate=10, burst=3, capacity=10)
    for _ in range(3):
        assert bucket.wait("k") == 0.0
        bucket.spend("k")
    assert bucket.wait("k") == pytest.approx(0.1)
    now = 0.05
    assert bucket.wait("k") == pytest.approx(0.05)
    now = 1000.0
    for _ in range(3):
        bucket.spend("k")
    assert bucket.wait("k") > 0


async def test_over_http_it_is_429_with_retry_after_and_one_bucket_for_all_paths(tmp_path: Path) -> None:
    async with house(tmp_path, options=FEW) as home:
        for _ in range(4):
            assert (await rpc(home.url, "sessions.list", {}, token=TOKEN)).status == 200
        answer = await rpc(home.url, "sessions.list", {}, token=TOKEN)
        assert (answer.status, answer.code) == (429, "RATE_LIMITED")
        error = answer.response["error"]
        assert error["retryable"] is True
        assert 1 <= error["details"]["retryAfterMs"] <= 500
        assert answer.headers["Retry-After"] == "1"
        async with EventStream(home.url, "s_1", TOKEN) as stream:
            assert (stream.status, stream.headers["Retry-After"]) == (429, "1")
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as client,
            client.get(f"{home.url}/metrics") as response,
        ):
            assert response.status == 429
        # Somebody else at the same address is let in, and so is the same one in a moment.
        other = await home.add_token("other")
        assert (await rpc(home.url, "sessions.list", {}, token=other)).status == 200
        await asyncio.sleep(error["details"]["retryAfterMs"] / 1000)
        assert (await rpc(home.url, "sessions.list", {}, token=TOKEN)).status == 200


async def test_on_a_websocket_it_is_an_answer_and_the_connection_stays(tmp_path: Path) -> None:
    async with house(tmp_path, options=FEW) as home, await home.wire() as wire, await home.wire() as same:
        codes = [(await w.call("sessions.list")).get("error", {}).get("code") for w in (wire, same) * 3]
        assert codes[:4] == [None] * 4
        assert codes[-1] == "RATE_LIMITED"
        error = (await wire.call("agent.run", {"input": "x", "idempotencyKey": "k"}))["error"]
        assert (error["code"], error["retryable"]) == ("RATE_LIMITED", True)
        await asyncio.sleep(error["details"]["retryAfterMs"] / 1000)
        assert (await wire.call("sessions.list"))["ok"] is True


async def test_who_shows_no_good_token_is_limited_by_address(tmp_path: Path) -> None:
    async with house(tmp_path, options=FEW) as home:
        statuses = [(await rpc(home.url, "sessions.list", {})).status for _ in range(6)]
        assert statuses[:4] == [401] * 4
        assert statuses[-1] == 429
        async with await Wire.open(home.url) as wire:
            await wire.send("{")
            assert (await wire.response("invalid_req"))["error"]["code"] == "RATE_LIMITED"
            assert (await wire.call("sessions.list"))["error"]["code"] == "RATE_LIMITED"
            # Those who are known are not held up for it.
            assert (await wire.connect(TOKEN))["principal"]["subject"] == "u_owner"
        assert (await rpc(home.url, "sessions.list", {}, token=TOKEN)).status == 200


async def test_the_setting_says_how_many(tmp_path: Path) -> None:
    async with house(tmp_path, requests_per_second=1) as home:
        statuses = [(await rpc(home.url, "sessions.list", {}, token=TOKEN)).status for _ in range(6)]
        assert statuses[:2] == [200, 200]
        assert 429 in statuses
