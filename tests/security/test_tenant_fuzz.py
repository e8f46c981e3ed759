"""Another tenant's ids answer exactly like ids that there are none of, byte for byte, on every transport."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from corral.core.agents import ensure_agents
from corral.protocol.methods import METHODS
from corral.server import OWNER_TOKEN
from tests.support.house import TOKEN, House, house
from tests.support.model_server import CallTools, Say, conversation
from tests.support.wire import Wire, new_key, rpc

WRITE = CallTools([("file_write", {"path": "a.txt", "content": "one"})])
SCRIPT = conversation([WRITE, Say("done")])

# What else a method needs before it looks an id up.
REST: dict[str, dict[str, Any]] = {
    "agent.run": {"input": "hi"},
    "runtime.setMode": {"runtimeMode": "cloud"},
    "sessions.update": {"title": "mine"},
    "policy.get": {"layer": "agent"},
    "policy.update": {"layer": "agent", "patch": {"toolDefault": "allow"}},
    "policy.explain": {"toolName": "file.list", "args": {}},
    "approval.resolve": {"decision": "approve", "remember": "workspace"},
    "tokens.create": {"roles": ["viewer"]},
}
# Fields that name what a caller makes or is, or count within a session, not what is looked up.
OWN = {"idempotencyKey", "tenantId", "beforeId", "afterId"}
PERSONS = {("tokens.create", "userId")}


def id_fields() -> list[tuple[str, str]]:
    """Every (method, field) of the registry where a client sends an id."""
    return [
        (name, field.encode_name)
        for name, method in METHODS.items()
        for field in msgspec.structs.fields(method.params)
        if re.search(r"Ids?$", field.encode_name)
        and field.encode_name not in OWN
        and (name, field.encode_name) not in PERSONS
    ]


class Foreign:
    """What there is of another tenant, by the field that would name it."""

    def __init__(self, ids: dict[str, str]) -> None:
        self.ids = ids

    def there(self, field: str) -> Any:
        return [self.ids["workspaceId"]] if field == "workspaceIds" else self.ids[field]

    def not_there(self, field: str) -> Any:
        """An id of the same form and length that nobody has."""
        real = self.ids["workspaceId" if field == "workspaceIds" else field]
        other = real[:-1] + ("0" if real[-1] != "0" else "1")
        return [other] if field == "workspaceIds" else other


async def tenant(home: House, name: str) -> tuple[str, Foreign]:
    """A tenant in which there is one of everything: its owner's token, and the ids."""
    space = f"w_{name}"
    token = await home.add_token(f"u_{name}", tenant_id=f"t_{name}", workspaces=[space], roles=["owner"])

    def unit(tx: Any) -> None:
        ensure_agents(tx, f"t_{name}", space, {}, 1)

    await home.server.store.write(unit)
    async with await home.wire(token) as wire:
        await wire.effect("agents.upsert", agent={"id": f"a_{name}", "name": "theirs"})
        await wire.effect("policy.update", layer="agent", agentId=f"a_{name}", patch={"highRisk": "deny"})
        first = await wire.effect("agent.run", input="go", sessionId=f"s_{name}_1", agentId=f"a_{name}")
        granted = (await wire.event("approval.required", runId=first["runId"]))["payload"]
        second = await wire.effect("agent.run", input="go", sessionId=f"s_{name}_2", agentId=f"a_{name}")
        waiting = (await wire.event("approval.required", runId=second["runId"]))["payload"]
        await wire.effect("approval.resolve", approvalId=granted["approvalId"], decision="approve", remember="session")
        await wire.event("agent.completed", runId=first["runId"])
        grants = (await wire.request("grants.list", {}))["items"]
        made = await wire.effect("tokens.create", roles=["member"], userId=f"u_{name}2")
        return token, Foreign(
            {
                "workspaceId": space,
                "sessionId": second["sessionId"],
                "runId": second["runId"],
                "toolCallId": waiting["toolCallId"],
                "approvalId": waiting["approvalId"],
                "grantId": grants[0]["grantId"],
                "agentId": f"a_{name}",
                "tokenId": made["tokenId"],
                "subject": f"u_{name}",
            }
        )


@asynccontextmanager
async def two_tenants(data_dir: Path) -> AsyncIterator[tuple[House, Foreign, str]]:
    async with house(data_dir, script=SCRIPT) as home:
        token, foreign = await tenant(home, "bbbb")
        yield home, foreign, token


def params_of(method: str, field: str, value: Any) -> dict[str, Any]:
    params = {**REST.get(method, {}), field: value}
    if METHODS[method].side_effect:
        params["idempotencyKey"] = new_key()
    for needed in msgspec.structs.fields(METHODS[method].params):
        name = needed.encode_name
        if needed.required and name not in params:
            params[name] = "none_such" if name.endswith("Id") else {"id": "a_mine"} if name == "agent" else "x"
    return params


def bare(text: str, sent: Any) -> str:
    """An answer without the trace id, and with a placeholder where it repeats the id that was sent."""
    text = re.sub(r'"traceId": ?"tr_[0-9a-f]+"', '"traceId":"-"', text)
    text = re.sub(r'"(id)": ?"[rh]\d+"', r'"\1":"-"', text)
    for each in sent if isinstance(sent, list) else [sent]:
        text = text.replace(each, "ID")
    # What the server makes anew for each call that succeeds: ids, times, cursors.
    text = re.sub(r"\b(run|tok|ap|s)_[0-9a-f]{32}\b", r"\1_-", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    return re.sub(r'crl_[\w-]{43}|"feedCursor": ?"[^"]*"', "-", text)


async def on_socket(home: House, method: str, params: dict[str, Any]) -> str:
    async with await home.wire() as wire:
        if method == "connect":
            fresh = await Wire.open(home.url)
            async with fresh:
                return json.dumps(await fresh.call("connect", {"auth": {"token": TOKEN}, **params}), sort_keys=True)
        return json.dumps(await wire.call(method, params), sort_keys=True)


async def on_rpc(home: House, method: str, params: dict[str, Any]) -> str:
    answer = await rpc(home.url, method, {**params, **({"waitMs": 0} if method == "agent.run" else {})}, token=TOKEN)
    return json.dumps([answer.status, answer.response], sort_keys=True)


async def state_of(home: House, token: str, foreign: Foreign) -> Any:
    """All that the other tenant sees of what is theirs."""
    async with await home.wire(token) as wire:
        return [
            await wire.request("sessions.list", {}),
            await wire.request("sessions.history", {"sessionId": foreign.ids["sessionId"]}),
            await wire.request("runs.get", {"runId": foreign.ids["runId"]}),
            await wire.request("approval.queue", {}),
            await wire.request("grants.list", {}),
            await wire.request("tokens.list", {}),
            await wire.request("agents.list", {}),
            await wire.request("policy.get", {"agentId": foreign.ids["agentId"]}),
        ]


def test_the_fuzz_knows_an_id_for_every_field_that_takes_one() -> None:
    known = {
        "workspaceId",
        "workspaceIds",
        "sessionId",
        "runId",
        "toolCallId",
        "approvalId",
        "grantId",
        "agentId",
        "tokenId",
    }
    assert {field for _, field in id_fields()} == known
    assert len(id_fields()) > 50


@pytest.mark.parametrize("transport", [on_socket, on_rpc])
async def test_an_id_of_another_tenant_answers_like_one_that_there_is_none_of(tmp_path: Path, transport: Any) -> None:
    async with two_tenants(tmp_path / "data") as (home, foreign, token):
        before = await state_of(home, token, foreign)
        wrong = []
        # `agent.run` comes last: it makes a session of that id here, which the others would then see.
        for method, field in sorted(id_fields(), key=lambda each: each[0] == "agent.run"):
            answers = []
            for value in (foreign.there(field), foreign.not_there(field)):
                answers.append(bare(await transport(home, method, params_of(method, field, value)), value))
            if answers[0] != answers[1] or "INTERNAL_ERROR" in answers[0]:
                wrong.append((method, field, *answers))
        assert wrong == []
        assert await state_of(home, token, foreign) == before


async def test_the_stream_of_another_tenants_session_answers_like_that_of_none(tmp_path: Path) -> None:
    async with two_tenants(tmp_path / "data") as (home, foreign, _):
        answers = []
        for value in (foreign.there("sessionId"), foreign.not_there("sessionId")):
            url = f"{home.url}/v1/sessions/{value}/events?after=0"
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
                kept = {name: text for name, text in answer.headers.items() if name != "Date"}
                answers.append((answer.status, kept, bare(await answer.text(), value)))
        assert answers[0] == answers[1]
        assert answers[0][0] == 404


async def test_the_fuzz_would_see_a_difference(tmp_path: Path) -> None:
    """The same questions asked by the tenant itself are answered differently for what is there."""
    async with two_tenants(tmp_path / "data") as (home, foreign, token):
        alike = []
        for method, field in id_fields():
            if METHODS[method].side_effect or field == "workspaceId" or method in ("events.unsubscribe", "connect"):
                continue
            answers = []
            for value in (foreign.there(field), foreign.not_there(field)):
                async with await home.wire(token) as wire:
                    text = json.dumps(await wire.call(method, params_of(method, field, value)), sort_keys=True)
                    answers.append(bare(text, value))
            if answers[0] == answers[1]:
                alike.append((method, field))
        # A list filtered by what nobody has is empty, and so it is for an agent of whose sessions there are none.
        assert [each for each in alike if each[0] != "metrics.summary"] == []


async def test_the_feed_and_the_lists_of_one_tenant_have_nothing_of_anothers(tmp_path: Path) -> None:
    async with house(tmp_path / "data", script=SCRIPT) as home, await home.wire() as wire:
        await wire.request("events.subscribe", {})
        token, foreign = await tenant(home, "bbbb")
        mine = await wire.effect("sessions.create", title="mine")
        await wire.event("session.updated", sessionId=mine["session"]["id"])
        texts = [json.dumps(wire.frames)]
        for method in ("sessions.list", "agents.list", "approval.queue", "grants.list", "tokens.list", "audit.query"):
            texts.append(json.dumps(await wire.request(method, {})))
        assert [name for name in foreign.ids.values() for text in texts if f'"{name}"' in text] == []
        listed = (await wire.request("tokens.list", {}))["items"]
        assert [each["tokenId"] for each in listed] == [OWNER_TOKEN]
        assert token not in "".join(texts)


async def test_a_session_id_that_another_tenant_uses_is_free_here(tmp_path: Path) -> None:
    async with two_tenants(tmp_path / "data") as (home, foreign, token):
        theirs = foreign.ids["sessionId"]
        async with await home.wire() as wire:
            run = await wire.effect("agent.run", input="mine", sessionId=theirs)
            async with asyncio.timeout(60):
                await wire.event("approval.required", runId=run["runId"])
            history = await wire.request("sessions.history", {"sessionId": theirs})
            assert {item["runId"] for item in history["items"]} <= {run["runId"], None}
        async with await home.wire(token) as wire:
            history = await wire.request("sessions.history", {"sessionId": theirs})
            assert run["runId"] not in {item["runId"] for item in history["items"]}
