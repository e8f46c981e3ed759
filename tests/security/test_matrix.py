"""Who may call what: every method, role and transport, against a table that is written out here.

The table is no copy made by code: a method that is added or a role that is changed fails until a
person has said here what it should be.
"""

from __future__ import annotations

import hashlib
import re
import typing
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from corral.gateway.options import GatewayOptions
from corral.protocol.methods import METHODS
from corral.protocol.types import PolicyDocument
from tests.support.house import TOKEN, House, house
from tests.support.wire import Wire, rpc

ROLES = ("owner", "admin", "operator", "member", "viewer", "auditor")

# A letter for each role that may: owner, admin, operator, member, viewer, aUditor.
LETTERS = dict(zip("oapmvu", ROLES, strict=True))
EXPECTED = {
    "connect": "oapmvu",
    "agent.run": "oapm",
    "agent.abort": "oapm",
    "runs.get": "oapmv",
    "runtime.setMode": "oapm",
    "sessions.create": "oapm",
    "sessions.update": "oapm",
    "sessions.delete": "oapm",
    "sessions.list": "oapmv",
    "sessions.get": "oapmv",
    "sessions.history": "oapmv",
    "tools.output": "oapmv",
    "agents.list": "oapmv",
    "agents.upsert": "oa",
    "events.subscribe": "oapmv",
    "events.unsubscribe": "oapmv",
    "policy.get": "oapmvu",
    "policy.update": "oa",
    "policy.explain": "oapmvu",
    "approval.queue": "oapmv",
    "approval.resolve": "oap",
    "grants.list": "oapmv",
    "grants.revoke": "oap",
    "tokens.create": "oa",
    "tokens.list": "oa",
    "tokens.revoke": "oa",
    "audit.query": "oau",
    "audit.verify": "oau",
    "metrics.summary": "oapmvu",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """One server for all; the many failed guesses of these tests are not to be slowed down."""
    options = GatewayOptions(failed_auth_burst=1e6)
    async with house(tmp_path_factory.mktemp("matrix") / "data", options=options) as running:
        yield running


def test_every_method_of_the_registry_has_a_row_and_every_row_a_method() -> None:
    assert set(EXPECTED) == set(METHODS)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_registry_gives_a_method_to_the_roles_of_the_table(name: str) -> None:
    assert METHODS[name].roles == {LETTERS[letter] for letter in EXPECTED[name]}


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.side_effect))
def test_what_changes_something_is_out_of_reach_for_those_who_only_look(name: str) -> None:
    assert METHODS[name].roles.isdisjoint({"viewer", "auditor"})


def test_the_roles_that_work_each_have_all_that_the_next_lower_has() -> None:
    reach = {role: {name for name, letters in EXPECTED.items() if role in roles(letters)} for role in ROLES}
    assert reach["viewer"] <= reach["member"] <= reach["operator"] <= reach["admin"] <= reach["owner"]


def roles(letters: str) -> set[str]:
    return {LETTERS[letter] for letter in letters}


@pytest.mark.parametrize("transport", ["ws", "rpc"])
@pytest.mark.parametrize("role", [*ROLES, "nobody", "OWNER"])
@pytest.mark.asyncio(loop_scope="module")
async def test_every_method_answers_a_role_as_the_table_says(home: House, role: str, transport: str) -> None:
    """Without params: who may is told what is missing, or answered; who may not is told nothing but that."""
    token = await home.add_token(f"u_{role}", id=f"tok_{role}_{transport}", roles=[role])
    wrong: list[tuple[str, Any]] = []
    if role not in ROLES:
        for name in METHODS:
            answer = await rpc(home.url, name, {}, token=token)
            assert answer.code in ("FORBIDDEN", "METHOD_NOT_FOUND"), name
        wire = await Wire.open(home.url)
        async with wire:
            refused = await wire.call("connect", {"auth": {"token": token}})
            assert refused["error"]["code"] == "FORBIDDEN"
            assert await wire.closed() == 4401
        return
    wire = await home.wire(token)
    async with wire:
        served = set(wire.hello["features"]["methods"])
        for name, letters in EXPECTED.items():
            if transport == "ws" and name == "connect":
                continue
            if transport == "ws":
                code = ((await wire.call(name, {})).get("error") or {}).get("code")
            else:
                code = (await rpc(home.url, name, {}, token=token)).code
            if name not in served:
                fits = code == "METHOD_NOT_FOUND"
            else:
                fits = (code == "FORBIDDEN") is (role not in roles(letters)) and code != "INTERNAL_ERROR"
            if not fits:
                wrong.append((name, code))
    assert wrong == []


@pytest.mark.parametrize("role", [*ROLES, "nobody"])
@pytest.mark.asyncio(loop_scope="module")
async def test_the_stream_of_events_is_for_those_who_may_subscribe(home: House, role: str) -> None:
    token = await home.add_token(f"u_{role}", id=f"tok_{role}_sse", roles=[role])
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{home.url}/v1/sessions/s_none/events", headers=headers) as answer,
    ):
        assert answer.status == (404 if role in roles(EXPECTED["events.subscribe"]) else 403)


def bad_tokens(good: str) -> dict[str, str]:
    return {
        "unknown": "crl_" + "A" * 43,
        "empty": "",
        "blank": " ",
        "cut": good[:-1],
        "longer": good + "x",
        "other case": good.swapcase(),
        "its hash": hashlib.sha256(good.encode()).hexdigest(),
        "id": "tok_owner",
        "user": "u_owner",
        "sql": "' OR 1=1 --",
        "glob": "%",
        "unicode": "täken" * 5,
    }


@pytest.mark.asyncio(loop_scope="module")
async def test_a_credential_that_is_there_but_not_good_opens_no_method_on_any_transport(home: House) -> None:
    bad = bad_tokens(TOKEN)
    bad["revoked"] = await home.add_token("u_gone", roles=["owner"], revoked_at=2)
    bad["expired"] = await home.add_token("u_late", roles=["owner"], expires_at=2)
    bad["of no tenant"] = await home.add_token("u_none", tenant_id="", roles=["owner"])
    for kind, token in bad.items():
        wire = await Wire.open(home.url)
        async with wire:
            refused = await wire.call("connect", {"auth": {"token": token}})
            assert refused["error"]["code"] == "UNAUTHORIZED", kind
            assert await wire.closed() == 4401
        if token.isascii() and token.strip():
            for name in METHODS:
                answer = await rpc(home.url, name, {}, token=token)
                assert (answer.status, answer.code) == (401, "UNAUTHORIZED"), (kind, name)
            headers = {"Authorization": f"Bearer {token}"}
            for path in ("/v1/sessions/s_none/events", "/metrics", "/schema/protocol.json", "/openapi.json"):
                async with aiohttp.ClientSession() as session, session.get(home.url + path, headers=headers) as got:
                    assert got.status == 401, (kind, path)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_bad_token_in_the_frame_is_not_made_good_by_one_in_the_header(home: House) -> None:
    wire = await Wire.open(home.url, headers={"Authorization": f"Bearer {TOKEN}"})
    async with wire:
        refused = await wire.call("connect", {"auth": {"token": "not-the-token-0123456789"}})
        assert refused["error"]["code"] == "UNAUTHORIZED"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}, Bearer x"},
        {"Cookie": f"token={TOKEN}; session={TOKEN}"},
        {"X-Api-Key": TOKEN, "X-Auth-Token": TOKEN, "Proxy-Authorization": f"Bearer {TOKEN}"},
        {"X-Forwarded-User": "u_owner", "X-Corral-Scopes": "owner", "X-Remote-User": "u_owner"},
    ],
    ids=lambda headers: next(iter(headers)),
)
@pytest.mark.asyncio(loop_scope="module")
async def test_nothing_but_the_bearer_header_speaks_for_anybody(home: House, headers: dict[str, str]) -> None:
    for name in METHODS:
        assert (await rpc(home.url, name, {}, headers=headers)).status == 401, name
    async with aiohttp.ClientSession() as session:
        url = f"{home.url}/rpc?token={TOKEN}&access_token={TOKEN}"
        async with session.post(url, json={"type": "req", "id": "1", "method": "sessions.list"}) as answer:
            assert answer.status == 401
    wire = await Wire.open(home.url, headers=headers)
    async with wire:
        assert (await wire.call("connect", {}))["error"]["code"] == "UNAUTHORIZED"


@pytest.mark.asyncio(loop_scope="module")
async def test_roles_and_scopes_that_a_client_claims_change_nothing(home: House) -> None:
    token = await home.add_token("u_claims", roles=["viewer"])
    claims: dict[str, Any] = {"roles": ["owner"], "scopes": ["operator.admin"], "actor": "u_owner", "role": "owner"}
    async with await home.wire(token, **claims) as wire:
        assert wire.hello["principal"]["roles"] == ["viewer"]
        answer = await wire.call("sessions.create", {"idempotencyKey": "k", **claims})
        assert answer["error"]["code"] == "FORBIDDEN"
    claimed = await rpc(home.url, "sessions.create", claims, token=token, headers={"X-Corral-Scopes": "owner"})
    assert claimed.code == "FORBIDDEN"


async def test_an_admin_of_one_workspace_does_not_change_what_holds_in_others(tmp_path: Path) -> None:
    async with house(tmp_path / "data") as home:
        admin = await home.add_token("u_admin", roles=["admin"])
        update = {"layer": "tenant", "patch": {"highRisk": "allow"}}
        async with await home.wire(admin) as wire:
            await wire.effect("policy.update", **update)
        await home.add_token("u_other", workspaces=["w_other"])
        async with await home.wire(admin) as wire:
            answer = await wire.call("policy.update", {**update, "idempotencyKey": "k"})
            assert answer["error"]["code"] == "FORBIDDEN"
            await wire.effect("policy.update", layer="workspace", patch={"highRisk": "deny"})
        async with await home.wire() as owner:
            await owner.effect("policy.update", **update)


# Fields whose names look like a place on the server's disk, and why they are none that is run.
PLACES = {
    "sessions.create.root": "a folder, and only inside the roots that the settings list",
}


def fields_of(kind: Any, seen: set[Any]) -> Iterator[str]:
    """The wire names of a struct's fields and of those of every struct in them."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind in seen:
            return
        seen.add(kind)
        for field in msgspec.structs.fields(kind):
            yield field.encode_name
            yield from fields_of(field.type, seen)
    for part in typing.get_args(kind):
        yield from fields_of(part, seen)


def test_no_method_takes_the_path_of_something_to_run() -> None:
    risky = re.compile(r"path|exec|command|program|binary|argv|shell|hook|root|dir|file|url|env", re.IGNORECASE)
    found = set()
    for name, method in METHODS.items():
        kinds = [method.params, *([PolicyDocument] if name == "policy.update" else [])]
        found |= {f"{name}.{field}" for kind in kinds for field in fields_of(kind, set()) if risky.search(field)}
    assert found == set(PLACES)
