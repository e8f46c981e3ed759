"""Access tokens on the wire: told once, never stored, never beyond their maker, and dead when revoked."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from corral.config import ConfigError
from corral.gateway.options import GatewayOptions
from corral.protocol.methods import METHODS
from corral.server import OWNER_TOKEN
from tests.support.house import House, house
from tests.support.wire import Refused, Wire, new_key, rpc

ROLES = ["admin", "auditor", "member", "operator", "owner", "viewer"]
SLOW = GatewayOptions(token_recheck=600)


async def refusal(wire: Wire, method: str, **params: Any) -> str:
    with pytest.raises(Refused) as refused:
        await wire.effect(method, **params)
    return refused.value.code


def everything(data_dir: Path) -> bytes:
    """Every byte of the database, with what is not yet in its main file."""
    return b"".join(path.read_bytes() for path in sorted(data_dir.glob("corral.db*")))


async def test_a_made_token_opens_its_workspace_with_its_roles_and_no_more(home: House) -> None:
    async with await home.wire() as owner:
        made = await owner.effect("tokens.create", roles=["viewer"], userId="u_anna", displayName="Anna")
        assert made["token"].startswith("crl_")
        async with await home.wire(made["token"]) as anna:
            principal = anna.hello["principal"]
            assert (principal["subject"], principal["userId"], principal["displayName"]) == ("u_anna", "u_anna", "Anna")
            assert (principal["roles"], principal["workspaceIds"]) == (["viewer"], ["w_default"])
            assert (await anna.request("sessions.list", {}))["items"] == []
            assert await refusal(anna, "sessions.create") == "FORBIDDEN"


async def test_a_token_whose_row_was_changed_opens_what_the_row_says_now(home: House) -> None:
    token = await home.add_token("anna", roles=["member"])
    async with await home.wire(token) as anna:
        assert anna.hello["principal"]["roles"] == ["member"]
    assert await home.add_token("anna", roles=["viewer"]) == token
    async with await home.wire(token) as anna:
        assert anna.hello["principal"]["roles"] == ["viewer"]
        assert await refusal(anna, "sessions.create") == "FORBIDDEN"


async def test_the_text_is_told_by_the_first_answer_and_its_replays_alone_and_lies_nowhere(tmp_path: Path) -> None:
    data = tmp_path / "data"
    params = {"roles": ["member"], "userId": "u_anna", "idempotencyKey": "same"}
    async with house(data) as home, await home.wire() as owner:
        first = await owner.request("tokens.create", params)
        assert await owner.request("tokens.create", params) == first
        listed = await owner.request("tokens.list", {})
        records = await owner.request("audit.query", {"action": "token.created"})
        assert len(records["items"]) == 1
        assert first["token"] not in str(listed) + str(records)
        assert first["token"].encode() not in everything(data)
        assert hashlib.sha256(first["token"].encode()).hexdigest().encode() in everything(data)
    async with house(data) as home, await home.wire() as owner:
        assert await owner.request("tokens.create", params) == first
        assert len((await owner.request("tokens.list", {}))["items"]) == 2
        async with await home.wire(first["token"]):
            pass


async def test_a_replay_after_the_secret_changed_is_refused_instead_of_telling_a_text_that_is_none(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    params = {"roles": ["member"], "userId": "u_anna", "idempotencyKey": "same"}
    async with house(data) as home, await home.wire() as owner:
        first = await owner.request("tokens.create", params)
    assert (data / "token.key").stat().st_mode & 0o777 == 0o600
    (data / "token.key").unlink()
    async with house(data) as home, await home.wire() as owner:
        with pytest.raises(Refused, match="CONFLICT"):
            await owner.request("tokens.create", params)
        async with await home.wire(first["token"]):
            pass


async def test_a_replay_tells_no_text_to_a_lesser_token_of_the_same_person(home: House) -> None:
    params = {"roles": ["owner"], "idempotencyKey": "same"}
    async with await home.wire() as owner:
        await owner.request("tokens.create", params)
        lesser = await owner.effect("tokens.create", roles=["admin"])
    async with await home.wire(lesser["token"]) as admin:
        with pytest.raises(Refused, match="FORBIDDEN"):
            await admin.request("tokens.create", params)


@pytest.mark.parametrize("role", ROLES)
async def test_nobody_makes_a_token_that_may_call_what_they_may_not(home: House, role: str) -> None:
    """Every role tries to give every role: what comes out never has a method that its maker has not."""
    mine = {name for name, method in METHODS.items() if role in method.roles}
    given = []
    async with await home.wire(await home.add_token("u_maker", roles=[role])) as maker:
        for other in ROLES:
            answer = await maker.call("tokens.create", {"roles": [other], "idempotencyKey": new_key()})
            if answer["ok"]:
                given.append(other)
                assert {name for name, method in METHODS.items() if other in method.roles} <= mine
            else:
                assert answer["error"]["code"] == "FORBIDDEN"
    expected = {"owner": ROLES, "admin": [each for each in ROLES if each != "owner"]}
    assert given == expected.get(role, [])


async def test_no_token_reaches_a_workspace_or_a_tenant_of_which_its_maker_has_none(home: House) -> None:
    await home.add_token("u_other", workspaces=["w_other"], roles=["owner"])
    await home.add_token("u_b", tenant_id="t_b", workspaces=["w_b"], roles=["owner"])
    async with await home.wire() as owner:
        for workspaces in (["w_other"], ["w_b"], ["w_default", "w_other"], ["w_none"]):
            assert await refusal(owner, "tokens.create", roles=["viewer"], workspaceIds=workspaces) == "FORBIDDEN"
        assert await refusal(owner, "tokens.create", roles=["viewer"], tenantId="t_b") == "FORBIDDEN"
        listed = {token["tokenId"] for token in (await owner.request("tokens.list", {}))["items"]}
        assert listed == {OWNER_TOKEN}
        for token_id in ("tok_u_other", "tok_u_b", "tok_none"):
            assert await refusal(owner, "tokens.revoke", tokenId=token_id) == "NOT_FOUND"


async def test_an_admin_cannot_speak_for_people_who_are_here_already_nor_end_an_owners_token(home: House) -> None:
    await home.add_token("u_anna")
    async with await home.wire(await home.add_token("u_admin", roles=["admin"])) as admin:
        for user in ("u_owner", "u_anna"):
            assert await refusal(admin, "tokens.create", roles=["member"], userId=user) == "FORBIDDEN"
            assert await refusal(admin, "tokens.create", roles=["member"], subject=user) == "INVALID_REQUEST"
        assert await refusal(admin, "tokens.revoke", tokenId=OWNER_TOKEN) == "FORBIDDEN"
        assert (await admin.effect("tokens.create", roles=["operator"]))["userId"] == "u_admin"
        assert (await admin.effect("tokens.create", roles=["member"], userId="u_new"))["subject"] == "u_new"
        assert "revokedAt" in (await admin.effect("tokens.revoke", tokenId="tok_u_anna"))["token"]


async def test_revoking_closes_the_tokens_sockets_at_once_with_4401_and_no_others(tmp_path: Path) -> None:
    async with house(tmp_path / "data", options=SLOW) as home, await home.wire() as owner:
        made = await owner.effect("tokens.create", roles=["member"], userId="u_anna")
        kept = await owner.effect("tokens.create", roles=["member"], userId="u_anna")
        anna, other = await home.wire(made["token"]), await home.wire(kept["token"])
        async with anna, other:
            answer = await owner.effect("tokens.revoke", tokenId=made["tokenId"])
            assert answer["token"]["revokedAt"]
            assert await anna.closed() == 4401
            await other.request("sessions.list", {})
        assert (await rpc(home.url, "sessions.list", {}, token=made["token"])).status == 401
        again = await owner.effect("tokens.revoke", tokenId=made["tokenId"])
        assert again == answer
        records = (await owner.request("audit.query", {"action": "token.revoked"}))["items"]
        assert [(each["resourceId"], each["actor"]) for each in records] == [(made["tokenId"], "u_owner")]


async def test_who_revokes_their_own_token_gets_the_answer_and_then_the_end(tmp_path: Path) -> None:
    async with house(tmp_path / "data", options=SLOW) as home, await home.wire() as owner:
        made = await owner.effect("tokens.create", roles=["admin"], userId="u_anna")
        async with await home.wire(made["token"]) as anna:
            answer = await anna.effect("tokens.revoke", tokenId=made["tokenId"])
            assert answer["token"]["tokenId"] == made["tokenId"]
            assert await anna.closed() == 4401


async def test_a_socket_that_connects_while_its_token_is_revoked_does_not_stay(tmp_path: Path) -> None:
    async with house(tmp_path / "data", options=SLOW) as home, await home.wire() as owner:
        for _ in range(10):
            made = await owner.effect("tokens.create", roles=["member"], userId="u_anna")
            wires = [await Wire.open(home.url) for _ in range(4)]
            params = {"auth": {"token": made["token"]}}
            revoked, *_ = await asyncio.gather(
                owner.effect("tokens.revoke", tokenId=made["tokenId"]),
                *(wire.start("connect", params) for wire in wires),
            )
            assert revoked["token"]["revokedAt"]
            assert [await wire.closed() for wire in wires] == [4401] * 4
            for wire in wires:
                await wire.close()


async def test_an_expired_token_opens_nothing_and_its_sockets_close_when_it_expires(tmp_path: Path) -> None:
    async with house(tmp_path / "data", options=SLOW) as home, await home.wire() as owner:
        made = await owner.effect("tokens.create", roles=["member"], userId="u_anna", expiresInMs=1500)
        async with await home.wire(made["token"]) as anna:
            assert await anna.closed() == 4401
        assert (await rpc(home.url, "sessions.list", {}, token=made["token"])).status == 401


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"expiresAt": "tomorrow"}, "expiresAt"),
        ({"expiresAt": "2020-01-01T00:00:00Z"}, "expiresAt"),
        ({"expiresAt": "2090-01-01T00:00:00"}, "expiresAt"),
        ({"expiresAt": "2090-01-01T00:00:00Z", "expiresInMs": 1}, "expiresInMs"),
        ({"expiresInMs": 0}, "expiresInMs"),
        ({"roles": []}, "roles"),
        ({"roles": ["root"]}, "roles"),
        ({"userId": "a b"}, "userId"),
        ({"subject": "u\nowner"}, "subject"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(home: House, params: dict[str, Any], field: str) -> None:
    async with await home.wire() as owner:
        with pytest.raises(Refused, match=field) as refused:
            await owner.effect("tokens.create", **{"roles": ["viewer"], **params})
        assert refused.value.code == "INVALID_REQUEST"


async def test_the_last_owner_that_lasts_cannot_be_revoked(home: House) -> None:
    async with await home.wire() as owner:
        assert await refusal(owner, "tokens.revoke", tokenId=OWNER_TOKEN) == "CONFLICT"
        brief = await owner.effect("tokens.create", roles=["owner"], expiresInMs=60_000)
        assert await refusal(owner, "tokens.revoke", tokenId=OWNER_TOKEN) == "CONFLICT"
        lasting = await owner.effect("tokens.create", roles=["owner"])
        async with await home.wire(lasting["token"]) as second:
            await second.effect("tokens.revoke", tokenId=OWNER_TOKEN)
            assert await owner.closed() == 4401
            await second.effect("tokens.revoke", tokenId=brief["tokenId"])
            assert await refusal(second, "tokens.revoke", tokenId=lasting["tokenId"]) == "CONFLICT"


async def test_a_start_with_the_revoked_access_token_does_not_bring_it_back(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with house(data) as home, await home.wire() as owner:
        lasting = await owner.effect("tokens.create", roles=["owner"])
        async with await home.wire(lasting["token"]) as second:
            await second.effect("tokens.revoke", tokenId=OWNER_TOKEN)
    async with house(data) as home:
        assert (await rpc(home.url, "sessions.list", {}, token=home.token)).status == 401
        assert (await rpc(home.url, "sessions.list", {}, token=lasting["token"])).status == 200


@pytest.mark.parametrize(("text", "mode"), [("zz\n", 0o600), ("00\n", 0o600), ("00" * 32 + "\n", 0o644)])
async def test_a_secret_that_is_none_or_that_others_may_read_stops_the_start(
    tmp_path: Path, text: str, mode: int
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    (data / "token.key").write_text(text)
    (data / "token.key").chmod(mode)
    with pytest.raises(ConfigError, match=r"token\.key"):
        async with house(data):
            pass
