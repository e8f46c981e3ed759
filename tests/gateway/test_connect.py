"""`connect`: the first request, and what a refused one leads to."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from corral.gateway.options import GatewayOptions
from tests.support.house import TOKEN, House, house
from tests.support.wire import Refused, Wire


async def refused(home: House, **params: Any) -> tuple[str, int]:
    """Connect with these params; the error's code and the close code."""
    async with await Wire.open(home.url) as wire:
        response = await wire.call("connect", params)
        assert response["ok"] is False
        return response["error"]["code"], await wire.closed()


async def test_connect_tells_who_where_and_what_there_is(home: House) -> None:
    async with await Wire.open(home.url) as wire:
        hello = await wire.connect(TOKEN, client={"name": "test", "version": "1"})
        assert hello["protocolVersion"] == "1.0.0"
        assert hello["principal"] == {
            "subject": "u_owner",
            "userId": "u_owner",
            "tenantId": "t_default",
            "workspaceIds": ["w_default"],
            "roles": ["owner"],
            "authSource": "token",
            "displayName": "Owner",
        }
        assert hello["workspaceId"] == "w_default"
        assert hello["connectionId"].startswith("conn_")
        assert hello["limits"]["maxFrameBytes"] == 1024 * 1024
        assert hello["limits"]["maxSubscriptions"] == 1000
        assert "agent.delta" in hello["features"]["events"]
        assert hello["pendingApprovals"] == []
        assert hello["serverTime"].endswith("Z")
        assert len(hello["serverTime"]) == len("2026-01-01T00:00:00.000Z")


async def test_before_connect_every_other_request_is_unauthorized_and_the_socket_stays_open(home: House) -> None:
    async with await Wire.open(home.url) as wire:
        for method in ("sessions.list", "agent.run", "no.such.method", "events.subscribe"):
            assert (await wire.call(method))["error"]["code"] == "UNAUTHORIZED"
        await wire.connect(TOKEN)
        assert (await wire.request("sessions.list"))["items"] == []


@pytest.mark.parametrize(
    "auth", [None, {"token": ""}, {"token": "wrong"}, {"token": TOKEN + "x"}, {"token": TOKEN[:-1]}]
)
async def test_a_missing_or_wrong_token_is_answered_and_closed_with_4401(home: House, auth: Any) -> None:
    assert await refused(home, **({} if auth is None else {"auth": auth})) == ("UNAUTHORIZED", 4401)


@pytest.mark.parametrize("change", [{"expires_at": 2}, {"revoked_at": 2}])
async def test_an_expired_or_revoked_token_is_as_good_as_none(home: House, change: Any) -> None:
    token = await home.add_token("ann", **change)
    assert await refused(home, auth={"token": token}) == ("UNAUTHORIZED", 4401)


async def test_the_token_may_come_in_the_header_and_the_frames_own_wins(home: House) -> None:
    async with await Wire.open(home.url, headers={"Authorization": f"Bearer {TOKEN}"}) as wire:
        assert (await wire.connect(None))["principal"]["subject"] == "u_owner"
    async with await Wire.open(home.url, headers={"Authorization": f"Bearer {TOKEN}"}) as wire:
        response = await wire.call("connect", {"auth": {"token": "wrong"}})
        assert response["error"]["code"] == "UNAUTHORIZED"
        assert await wire.closed() == 4401
    async with await Wire.open(home.url, headers={"Authorization": "Bearer wrong"}) as wire:
        assert (await wire.connect(TOKEN))["principal"]["subject"] == "u_owner"


async def test_a_workspace_or_tenant_that_is_not_the_principals_refuses_connect(home: House) -> None:
    auth = {"token": TOKEN}
    assert await refused(home, auth=auth, workspaceId="w_other") == ("FORBIDDEN", 4401)
    assert await refused(home, auth=auth, tenantId="t_other") == ("FORBIDDEN", 4401)


async def test_a_principal_without_a_workspace_or_a_role_gets_in_nowhere(home: House) -> None:
    nowhere = await home.add_token("nowhere", workspaces=[])
    nobody = await home.add_token("nobody", roles=["janitor"])
    assert await refused(home, auth={"token": nowhere}) == ("FORBIDDEN", 4401)
    assert await refused(home, auth={"token": nobody}) == ("FORBIDDEN", 4401)


async def test_the_workspace_is_the_one_asked_for_or_the_first(home: House) -> None:
    token = await home.add_token("ann", workspaces=["w_a", "w_b"])
    async with await home.wire(token) as wire:
        assert wire.hello["workspaceId"] == "w_a"
    async with await home.wire(token, workspaceId="w_b") as wire:
        assert wire.hello["workspaceId"] == "w_b"


@pytest.mark.parametrize(
    "versions", [{"min": "2"}, {"max": "0.9"}, {"min": "1.0.1", "max": "2"}, {"min": 2.0, "max": 3}, {"min": "one"}]
)
async def test_a_range_without_this_version_is_an_invalid_request_and_4409(home: House, versions: Any) -> None:
    assert await refused(home, auth={"token": TOKEN}, protocol=versions) == ("INVALID_REQUEST", 4409)


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"min": "1", "max": "1"},
        {"min": 1, "max": 1},
        {"min": 1.0, "max": 1.0},
        {"min": "0.1"},
        {"max": "1.0"},
        {"max": "1.0.0"},
    ],
)
async def test_a_range_with_this_version_connects(home: House, versions: Any) -> None:
    async with await home.wire(protocol=versions) as wire:
        assert wire.hello["protocolVersion"] == "1.0.0"


async def test_malformed_params_are_a_refused_connect_too(home: House) -> None:
    assert await refused(home, auth={"token": 5}) == ("INVALID_REQUEST", 4401)


async def test_a_second_connect_is_refused_and_changes_nothing(home: House) -> None:
    ann = await home.add_token("ann")
    async with await home.wire() as wire:
        with pytest.raises(Refused) as caught:
            await wire.request("connect", {"auth": {"token": ann}})
        assert caught.value.code == "INVALID_REQUEST"
        session = (await wire.effect("sessions.create", title="mine"))["session"]
        assert session["ownerUserId"] == "u_owner"


async def test_requests_sent_behind_connect_wait_for_it_and_keep_their_order(home: House) -> None:
    async with await Wire.open(home.url) as wire:
        await wire.start("connect", {"auth": {"token": TOKEN}}, frame_id="c")
        for number in range(20):
            await wire.start("sessions.list", {}, frame_id=f"l{number}")
        await wire.until(lambda: len(wire.frames) == 21)
        assert wire.frames[0]["id"] == "c"
        assert all(frame["ok"] for frame in wire.frames)


async def test_requests_behind_a_refused_connect_are_not_carried_out(home: House) -> None:
    async with await Wire.open(home.url) as wire:
        await wire.start("connect", {"auth": {"token": "wrong"}}, frame_id="c")
        await wire.start("sessions.create", {"idempotencyKey": "k"}, frame_id="s")
        assert await wire.closed() == 4401
        assert [frame["id"] for frame in wire.frames] == ["c"]
    async with await home.wire() as wire:
        assert (await wire.request("sessions.list"))["items"] == []


async def test_no_connect_in_time_closes_with_4408_and_other_frames_do_not_buy_time(tmp_path: Path) -> None:
    async with house(tmp_path, options=GatewayOptions(connect_timeout=0.6)) as home, await Wire.open(home.url) as wire:
        began = time.monotonic()
        while wire.close_code is None and time.monotonic() - began < 60:
            await wire.start("sessions.list")
            await asyncio.sleep(0.1)
        assert await wire.closed() == 4408
        assert time.monotonic() - began > 0.4


async def test_a_connected_socket_outlives_the_deadline(tmp_path: Path) -> None:
    options = GatewayOptions(connect_timeout=1.0)
    async with house(tmp_path, options=options) as home, await Wire.open(home.url) as silent, await home.wire() as wire:
        assert await silent.closed() == 4408
        assert (await wire.request("sessions.list"))["items"] == []


async def test_a_token_that_is_revoked_closes_its_open_sockets_with_4401(tmp_path: Path) -> None:
    async with house(tmp_path, options=GatewayOptions(token_recheck=0.1)) as home:
        token = await home.add_token("ann")
        async with await home.wire(token) as ann, await home.wire() as owner:
            await home.add_token("ann", revoked_at=2)
            assert await ann.closed() == 4401
            assert (await owner.request("sessions.list"))["items"] == []
