"""`/metrics`, `/schema/protocol.json` and `/openapi.json`: what they say, to whom, and that no label can be made up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client.parser import text_string_to_metric_families

from corral.gateway.openapi import openapi
from corral.protocol.errors import ErrorCode
from corral.protocol.events import EVENTS
from corral.protocol.methods import METHODS
from corral.protocol.schema import protocol_schema
from tests.support.house import TOKEN, House, house
from tests.support.model_server import CallTools, Say
from tests.support.stream import EventStream
from tests.support.wire import new_key, rpc

PAGES = ["/metrics", "/schema/protocol.json", "/openapi.json"]


async def page(home: House, path: str, token: str | None = TOKEN, verb: str = "GET") -> tuple[int, str, str]:
    """(status, content type, text)"""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        aiohttp.ClientSession(headers=headers) as client,
        client.request(verb, home.url + path, headers={"Origin": home.url}) as response,
    ):
        assert "Access-Control-Allow-Origin" not in response.headers
        return response.status, response.headers["Content-Type"], await response.text()


Sample = tuple[str, tuple[tuple[str, str], ...]]


async def samples(home: House) -> dict[Sample, float]:
    """(name, sorted labels) -> value, of all that `/metrics` says."""
    _, _, text = await page(home, "/metrics")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_needs_a_token_first_and_get_then(home: House, path: str) -> None:
    for token in (None, "wrong", ""):
        for verb in ("GET", "POST"):
            status, _, text = await page(home, f"{path}?token={TOKEN}", token, verb)
            assert (status, json.loads(text)["error"]["code"]) == (401, "UNAUTHORIZED")
    assert (await page(home, path, verb="POST"))[0] == 405
    assert (await page(home, path))[0] == 200
    assert (await page(home, path, verb="HEAD"))[::2] == (200, "")


async def test_the_schema_is_the_one_that_the_code_has(home: House) -> None:
    _, kind, text = await page(home, "/schema/protocol.json")
    assert kind == "application/schema+json"
    assert json.loads(text) == json.loads(json.dumps(protocol_schema()))


async def test_the_openapi_document_is_valid_and_has_every_route_method_and_event(home: House) -> None:
    _, _, text = await page(home, "/openapi.json")
    document = json.loads(text)
    assert document == json.loads(json.dumps(openapi()))
    OpenAPIV31SpecValidator(document).validate()
    routes = {resource.canonical for resource in home.server.gateway._runner.app.router.resources()}
    told = {path.replace("{sessionId}", "{session_id}") for path in document["paths"]}
    assert routes - told == {"/ws", "/rpc/{rest}", "/{rest}"}
    assert told <= routes
    schemas = document["components"]["schemas"]
    assert {f"request.{name}" for name in METHODS} <= set(schemas)
    assert {f"answer.{name}" for name in METHODS} <= set(schemas)
    assert {f"event.{name}" for name in EVENTS} <= set(schemas)
    assert "#/$defs/" not in text
    for ref in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert ref in schemas


def validator(name: str) -> Draft202012Validator:
    document = openapi()
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


async def test_what_the_server_answers_and_sends_is_what_the_openapi_document_says(home: House) -> None:
    for method, params in (("sessions.create", {"idempotencyKey": new_key()}), ("sessions.list", {}), ("none", {})):
        answer = await rpc(home.url, method, params, token=TOKEN)
        body = {"response": answer.response, "events": answer.events}
        name = method if method in METHODS else "agents.list"
        assert list(validator(f"answer.{name}").iter_errors(body)) == []
    run = await rpc(
        home.url, "agent.run", {"input": "hi", "idempotencyKey": new_key(), "sessionId": "s_1"}, token=TOKEN
    )
    assert list(validator("answer.agent.run").iter_errors({"response": run.response, "events": run.events})) == []
    async with EventStream(home.url, "s_1", TOKEN, query="?after=0") as stream:
        await stream.until("agent.completed")
        for event in stream.events:
            assert list(validator(f"event.{event.event}").iter_errors(event.data)) == []
    async with EventStream(home.url, "s_2", TOKEN) as stream:
        assert list(validator("HttpError").iter_errors(json.loads(stream.body))) == []


async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    script = [CallTools([("file_list", {}), ("no_such_tool", {})]), Say("ok")]
    async with house(tmp_path, script=script) as home, await home.wire() as wire:
        before = await samples(home)
        run = await wire.effect("agent.run", input="go")
        await wire.event("agent.completed")
        await wire.call("sessions.get", {"sessionId": 7})
        async with EventStream(home.url, run["sessionId"], TOKEN):
            after = await samples(home)
        kinds = {name for name, _ in after}
        assert {"corral_build_info", "corral_store_waiting", "corral_journal_commits_total"} <= kinds

        def rise(name: str, **labels: str) -> float:
            sample = (name, tuple(sorted(labels.items())))
            return after[sample] - before.get(sample, 0.0)

        assert rise("corral_requests_total", method="agent.run", outcome="ok") == 1
        assert rise("corral_requests_total", method="sessions.get", outcome="INVALID_REQUEST") == 1
        assert rise("corral_request_duration_seconds_count", method="agent.run") == 1
        assert rise("corral_request_duration_seconds_bucket", method="agent.run", le="+Inf") == 1
        assert rise("corral_tool_calls_total", tool="file.list", status="success") == 1
        assert rise("corral_tool_calls_total", tool="other", status="failed") == 1
        assert rise("corral_model_calls_total") == 2
        assert rise("corral_model_tokens_total", direction="input") == 200
        assert rise("corral_runs_ended_total", outcome="ok") == 1
        assert rise("corral_events_sent_total", event="agent.completed") == 1
        assert rise("corral_journal_entries_total", event="agent.tool_result") == 2
        assert after["corral_connections_open", ()] == 1
        assert after["corral_streams_open", ()] == 1
        assert after["corral_runs_active", ()] == 0
        assert rise("corral_http_responses_total", route="/v1/sessions/{session_id}/events", status="200") == 1


async def test_no_client_and_no_model_can_make_a_label_up(tmp_path: Path) -> None:
    script: list[Any] = [CallTools([(f"made_up_{number}", {}) for number in range(5)]), Say("ok")]
    secret = "u_canary"
    async with house(tmp_path, script=script) as home:
        token = await home.add_token(secret, workspaces=["w_default", "w_canary"])
        async with await home.wire(token, client={"name": "u_canary", "version": "1"}) as wire:
            run = await wire.effect("agent.run", input=secret, sessionId="u_canary")
            await wire.event("agent.completed", runId=run["runId"])
            for number in range(20):
                await wire.call(f"made.up.{number}")
                await rpc(home.url, f"made.up.http.{number}", {}, token=token)
                await page(home, f"/u_canary/{number}", token)
                async with EventStream(home.url, f"u_canary_{number}", token):
                    pass
        found = await samples(home)
        _, _, text = await page(home, "/metrics")
    assert "canary" not in text
    assert "made_up" not in text
    assert "made.up" not in text
    assert run["runId"] not in text
    outcomes = {"ok", "cancelled"} | {code.value for code in ErrorCode}
    allowed = {
        "method": set(METHODS) | {"other"},
        "outcome": outcomes,
        "event": set(EVENTS) | {"other"},
        "status": {"success", "failed", "denied", "interrupted"},
        "transport": {"websocket", "sse"},
        "direction": {"input", "output"},
    }
    for name, labels in found:
        for label, value in labels:
            if label in allowed and not (name.startswith("corral_http") and label == "status"):
                assert value in allowed[label], (name, label, value)
    assert len(found) < 400


def test_a_start_does_not_import_the_library_that_writes_metrics() -> None:
    code = "import sys, corral.server; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
