"""`POST /rpc`: statuses, the shape of every answer, and runs without a socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from corral.core.service import CoreService
from tests.support.house import TOKEN, House, house
from tests.support.model_server import CallTools, Hang, Say
from tests.support.wire import new_key, rpc


async def test_a_good_frame_is_answered_with_200_whether_it_succeeds_or_not(home: House) -> None:
    good = await rpc(home.url, "sessions.list", {}, token=TOKEN)
    assert (good.status, good.response["ok"], good.events) == (200, True, [])
    for method, params, code in [
        ("no.such", {}, "METHOD_NOT_FOUND"),
        ("sessions.get", {}, "INVALID_REQUEST"),
        ("runs.get", {"runId": "run_no"}, "NOT_FOUND"),
        ("sessions.list", {"tenantId": "t_other"}, "FORBIDDEN"),
        ("events.subscribe", {"sessionId": "s"}, "INVALID_REQUEST"),
    ]:
        answer = await rpc(home.url, method, params, token=TOKEN)
        assert (answer.status, answer.code, answer.response["id"]) == (200, code, "h1")


@pytest.mark.parametrize(
    "request_",
    [{"method": "sessions.list"}, {"body": b"{"}, {"verb": "PUT", "body": b""}, {"path": "/rpc/x", "body": b""}],
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}])
async def test_who_asks_is_decided_before_anything_else(home: House, request_: Any, headers: dict[str, str]) -> None:
    answer = await rpc(home.url, headers={"Content-Type": "text/plain", **headers}, **request_)
    assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.response["id"] == "invalid_req"


@pytest.mark.parametrize(
    ("request_", "status", "frame_id"),
    [
        ({"body": b"{"}, 400, "invalid_req"),
        ({"body": b"[]"}, 400, "invalid_req"),
        ({"body": b""}, 400, "invalid_req"),
        ({"body": b'{"type":"req","id":"\xff","method":"x"}'}, 400, "invalid_req"),
        ({"body": b'{"type":"res","id":"a1"}'}, 400, "a1"),
        ({"body": b'{"type":"req","id":"a2"}'}, 400, "a2"),
        ({"body": b"[" * 200_000}, 400, "invalid_req"),
        ({"body": b"{}", "path": "/rpc/further"}, 404, "invalid_req"),
        ({"body": b"", "verb": "GET"}, 405, "invalid_req"),
        ({"body": b"{}", "verb": "DELETE"}, 405, "invalid_req"),
        ({"body": b"x" * (1024 * 1024 + 1)}, 413, "invalid_req"),
        ({"method": "sessions.list", "headers": {"Content-Type": "text/plain"}}, 415, "invalid_req"),
        ({"method": "sessions.list", "headers": {"Content-Type": ""}}, 415, "invalid_req"),
    ],
)
async def test_what_is_no_request_frame_has_its_own_status_and_the_usual_body(
    home: House, request_: Any, status: int, frame_id: str
) -> None:
    answer = await rpc(home.url, token=TOKEN, **request_)
    assert (answer.status, answer.response["ok"], answer.response["id"]) == (status, False, frame_id)
    assert answer.headers["Content-Type"].startswith("application/json")


async def test_a_chunked_body_is_cut_off_at_the_limit(home: House) -> None:
    async def endless() -> Any:
        for _ in range(40):
            yield b"x" * 65536

    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{home.url}/rpc",
            data=endless(),
            headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
        ) as response,
    ):
        assert response.status == 413


async def test_a_body_that_is_not_coded_as_its_headers_say_is_refused(
    home: House, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await rpc(home.url, body=b"{}", token=TOKEN, headers={"Content-Encoding": "gzip"})
    assert (answer.status, answer.code) == (400, "INVALID_REQUEST")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "rot13"])
async def test_a_coding_that_is_not_known_is_refused_with_415_once_it_is_known_who_asks(
    home: House, coding: str
) -> None:
    for token, status in ((None, 401), (TOKEN, 415)):
        answer = await rpc(home.url, "sessions.list", {}, token=token, headers={"Content-Encoding": coding})
        assert (answer.status, answer.response["ok"], answer.events) == (status, False, [])


_FRAME = json.dumps({"type": "req", "id": "h1", "method": "sessions.list", "params": {}}).encode()
_BOMB = b" " * 50_000_000
_BARE = zlib.compressobj(wbits=-zlib.MAX_WBITS)


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("gzip", gzip.compress(_FRAME), 200),
        ("X-GZIP", gzip.compress(_FRAME), 200),
        ("deflate", zlib.compress(_FRAME), 200),
        ("deflate", _BARE.compress(_FRAME) + _BARE.flush(), 200),
        ("identity", _FRAME, 200),
        ("gzip", gzip.compress(_BOMB), 413),
        ("gzip", gzip.compress(_FRAME + b" " * (1024 * 1024 - len(_FRAME))), 200),
        ("gzip", gzip.compress(_FRAME + b" " * (1024 * 1024 - len(_FRAME) + 1)), 413),
        ("gzip", gzip.compress(_FRAME)[:-9], 400),
        ("gzip", gzip.compress(_FRAME) + b"more", 400),
        ("gzip", b"", 400),
        ("deflate", b"", 400),
        ("deflate", b"no deflate", 400),
    ],
    ids=[
        *("gzip", "another case and name", "deflate", "bare deflate", "none", "a bomb", "at the limit", "over it"),
        *("cut off", "with a tail", "empty gzip", "empty deflate", "no deflate"),
    ],
)
async def test_a_coded_body_is_a_frame_like_another_and_held_to_the_same_limit(
    home: House, coding: str, body: bytes, status: int
) -> None:
    answer = await rpc(home.url, body=body, token=TOKEN, headers={"Content-Encoding": coding})
    assert (answer.status, answer.response["ok"]) == (status, status == 200)


async def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_no_error_of_ours(
    home: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host, _, port = home.url.removeprefix("http://").rpartition(":")
    head = f"POST /rpc HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode())
    await writer.drain()
    assert (await rpc(home.url, "sessions.list", {}, token=TOKEN)).status == 200
    writer.close()
    async with asyncio.timeout(60):
        while not any(vars(record).get("action") == "http.broken_off" for record in caplog.records):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info] == []


async def test_connect_is_answered_where_none_is_needed(home: House) -> None:
    answer = await rpc(home.url, "connect", {}, token=TOKEN)
    assert answer.status == 200
    assert answer.response["payload"]["principal"]["subject"] == "u_owner"
    wrong = await rpc(home.url, "connect", {"auth": {"token": "wrong"}}, token=TOKEN)
    assert (wrong.status, wrong.code) == (200, "UNAUTHORIZED")


async def test_a_connection_id_in_the_query_is_ignored(home: House) -> None:
    answer = await rpc(home.url, "sessions.list", {}, token=TOKEN, path="/rpc?connectionId=conn_x")
    assert answer.status == 200


async def test_a_token_in_the_url_counts_for_nothing(home: House) -> None:
    answer = await rpc(home.url, "sessions.list", {}, path=f"/rpc?token={TOKEN}&access_token={TOKEN}")
    assert answer.status == 401


async def test_agent_run_answers_when_the_run_has_ended_with_its_durable_events(home: House) -> None:
    answer = await rpc(home.url, "agent.run", {"input": "hi", "idempotencyKey": new_key()}, token=TOKEN)
    assert answer.response["payload"]["status"] == "accepted"
    assert [event["event"] for event in answer.events] == [
        "agent.accepted",
        "agent.message",
        "agent.tool_call",
        "agent.tool_result",
        "agent.message",
        "agent.completed",
    ]
    run_id = answer.response["payload"]["runId"]
    assert all(event["payload"]["runId"] == run_id for event in answer.events)
    assert all("seq" not in event for event in answer.events)
    versions = [event["stateVersion"] for event in answer.events]
    assert versions == list(range(versions[0], versions[0] + 6))


async def test_a_replay_answers_the_same_and_runs_nothing(home: House) -> None:
    params = {"input": "hi", "idempotencyKey": new_key()}
    first = await rpc(home.url, "agent.run", params, token=TOKEN)
    second = await rpc(home.url, "agent.run", {**params, "waitMs": 1000}, token=TOKEN)
    assert second.response == first.response
    assert second.events == first.events
    other = await rpc(home.url, "agent.run", {**params, "input": "else"}, token=TOKEN)
    assert other.code == "IDEMPOTENCY_CONFLICT"


async def test_wait_ms_bounds_the_wait_and_zero_does_not_wait(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Hang()]) as home:
        for wait_ms in (0, 100):
            params = {"input": "hi", "idempotencyKey": new_key(), "waitMs": wait_ms}
            async with asyncio.timeout(30):
                answer = await rpc(home.url, "agent.run", params, token=TOKEN)
            assert [event["event"] for event in answer.events] == ["agent.accepted"]


async def test_a_replay_after_a_restart_waits_for_the_run_to_be_taken_up_and_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recover, may_recover = CoreService.recover, asyncio.Event()

    async def held_back(core: CoreService) -> int:
        await may_recover.wait()
        return await recover(core)

    params = {"input": "hi", "idempotencyKey": new_key(), "sessionId": "s_left"}
    async with house(tmp_path, script=[Hang()]) as home:
        await rpc(home.url, "agent.run", {**params, "waitMs": 0}, token=TOKEN)
        await home.model.wait(lambda: len(home.model.requests) == 1)
    monkeypatch.setattr(CoreService, "recover", held_back)
    async with house(tmp_path, script=[Say("at last")]) as home:
        asking = asyncio.create_task(rpc(home.url, "agent.run", params, token=TOKEN))
        while not (home.server.core._ended or asking.done()):  # noqa: ASYNC110  (who waits for a run tells nobody)
            await asyncio.sleep(0.01)
        may_recover.set()
        answer = await asking
        names = ["agent.accepted", "agent.resumed", "agent.message", "agent.completed"]
        assert [event["event"] for event in answer.events] == names


async def test_the_run_goes_on_when_the_client_hangs_up(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Say("at last", delay=0.7)]) as home:
        params = {"input": "hi", "idempotencyKey": new_key(), "sessionId": "s_left"}
        waiting = asyncio.create_task(rpc(home.url, "agent.run", params, token=TOKEN))
        await home.model.wait(lambda: len(home.model.requests) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with await home.wire() as wire:
            await wire.request("events.subscribe", {"sessionId": "s_left", "after": 0})
            assert (await wire.event("agent.completed"))["payload"]["output"] == "at last"


async def test_abort_over_rpc_answers_when_the_run_is_over(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Hang()]) as home:
        run = await rpc(home.url, "agent.run", {"input": "x", "idempotencyKey": new_key(), "waitMs": 0}, token=TOKEN)
        run_id = run.response["payload"]["runId"]
        abort = await rpc(home.url, "agent.abort", {"runId": run_id, "idempotencyKey": new_key()}, token=TOKEN)
        assert abort.response["payload"] == {"runId": run_id, "status": "aborted"}
        found = await rpc(home.url, "runs.get", {"runId": run_id}, token=TOKEN)
        assert found.response["payload"]["run"]["status"] == "aborted"


async def test_preflights_are_answered_for_our_own_pages_alone(home: House) -> None:
    port = home.url.rpartition(":")[2]
    async with aiohttp.ClientSession() as session:
        ours = {"Origin": f"http://localhost:{port}", "Access-Control-Request-Method": "POST"}
        async with session.options(f"{home.url}/rpc", headers=ours) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == ours["Origin"]
            assert response.headers["Access-Control-Allow-Methods"] == "GET, POST"
            assert response.headers["Access-Control-Allow-Headers"] == "content-type, authorization, last-event-id"
        async with session.options(f"{home.url}/rpc", headers={"Origin": "http://evil.example"}) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers
    answer = await rpc(home.url, "sessions.list", {}, token=TOKEN, headers=ours)
    assert answer.headers["Access-Control-Allow-Origin"] == ours["Origin"]


async def test_tool_runs_show_in_the_events(tmp_path: Path) -> None:
    script = [CallTools([("file_list", {}), ("file_list", {"path": "."})]), Say("ok")]
    async with house(tmp_path, script=script) as home:
        answer = await rpc(home.url, "agent.run", {"input": "x", "idempotencyKey": new_key()}, token=TOKEN)
        assert [event["event"] for event in answer.events].count("agent.tool_result") == 2
