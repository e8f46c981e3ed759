"""`GET /v1/sessions/{id}/events`: the session's events as a stream, to be cut off and taken up again anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from corral.gateway.options import GatewayOptions
from corral.protocol.events import TRANSIENT_EVENTS
from tests.support.gateway import Gateway
from tests.support.house import TOKEN, House, house
from tests.support.model_server import CallTools, Hang, ModelServer, Say
from tests.support.stream import EventStream
from tests.support.wire import Wire, new_key, raw_http, rpc


async def made(wire: Wire, renamed: int = 0, **params: Any) -> str:
    session = str((await wire.effect("sessions.create", **params))["session"]["id"])
    for number in range(renamed):
        await wire.effect("sessions.update", sessionId=session, title=f"title {number}")
    return session


async def test_a_stream_has_the_frames_of_a_websocket_without_seq(home: House) -> None:
    async with await home.wire() as wire:
        session = await made(wire)
        await wire.request("events.subscribe", {"sessionId": session, "after": 0})
        async with EventStream(home.url, session, TOKEN, query="?after=0") as stream:
            assert stream.status == 200
            assert stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert stream.headers["Cache-Control"] == "no-store"
            await wire.effect("agent.run", input="list\nthe files", sessionId=session)
            await stream.until("agent.completed")
            await wire.event("agent.completed")
        durable = [event for event in stream.events if event.id is not None]
        assert [event.data for event in durable] == [
            {key: value for key, value in frame.items() if key != "seq"} for frame in wire.durable
        ]
        assert all(event.event == event.data["event"] for event in stream.events)
        assert all(event.id == event.data["stateVersion"] for event in durable)
        transient = [event for event in stream.events if event.id is None]
        assert {event.event for event in transient} == {"agent.delta"} == TRANSIENT_EVENTS
        assert all(event.data["stateVersion"] > 0 for event in transient)


async def test_without_a_place_to_go_on_from_a_stream_begins_now_and_stays_open_after_a_run(home: House) -> None:
    async with await home.wire() as wire:
        session = await made(wire, renamed=3)
        async with EventStream(home.url, session, TOKEN) as stream:
            for _ in range(2):
                await wire.effect("agent.run", input="hi", sessionId=session)
                await stream.until("agent.completed")
            assert stream.versions == list(range(5, 5 + len(stream.versions)))


async def test_last_event_id_resumes_and_holds_against_after(home: House) -> None:
    async with await home.wire() as wire:
        session = await made(wire, renamed=5)
        for query, headers, first in (
            ("?after=2", {}, 3),
            ("", {"Last-Event-ID": "4"}, 5),
            ("?after=1", {"Last-Event-ID": "4"}, 5),
            ("?after=4", {"Last-Event-ID": "0"}, 1),
        ):
            async with EventStream(home.url, session, TOKEN, query=query, headers=headers) as stream:
                event = await stream.until("session.updated")
                assert event.id == first


@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", "1e3", "+1", "0x1", " 1 2", "9" * 19, "٣", "7"])
async def test_a_place_that_is_none_or_has_not_happened_is_400_and_named(home: House, value: str) -> None:
    async with await home.wire() as wire:
        session = await made(wire, renamed=2)
    for query, headers, name in (
        (f"?after={value.replace('+', '%2B')}", {}, "after"),
        ("", {"Last-Event-ID": value}, "Last-Event-ID"),
        ("?after=" + value.replace("+", "%2B"), {"Last-Event-ID": "1"}, "after"),
    ):
        if value == "7" and len(headers) and query:
            # Beyond the journal, but not what holds.
            continue
        async with EventStream(home.url, session, TOKEN, query=query, headers=headers) as stream:
            assert stream.status == 400, (query, headers)
            assert '"INVALID_REQUEST"' in stream.body
            assert f'"message":"{name} ' in stream.body
    async with EventStream(home.url, session, TOKEN, query="?after=1&after=2") as stream:
        assert stream.status == 400


async def test_who_shows_no_token_is_told_nothing_else_first(home: House) -> None:
    async with await home.wire() as wire:
        session = await made(wire)
    for token, where in (
        (None, session),
        ("wrong", session),
        (None, "s_none"),
        (None, f"{session}/x"),
        (None, "%00"),
    ):
        async with EventStream(home.url, where, token, query=f"?after=x&token={TOKEN}&access_token={TOKEN}") as stream:
            assert stream.status == (404 if "/" in where else 401)
            if stream.status == 401:
                assert stream.headers["WWW-Authenticate"] == "Bearer"


async def test_what_may_not_be_seen_answers_like_what_is_not_there(home: House) -> None:
    stranger = await home.add_token("stranger")
    foreign = await home.add_token("foreign", tenant_id="t_far", workspaces=["w_far"])
    auditor = await home.add_token("auditor", roles=["auditor"])
    async with await home.wire() as wire:
        session = await made(wire)
    bodies = set()
    for token in (stranger, foreign):
        for name in (session, "s_not_there", "s%20", "x" * 200, "..", "%F0%9F%98%80"):
            async with EventStream(home.url, name, token, query="?after=0") as stream:
                if name != "..":
                    assert stream.status == 404, name
                    bodies.add(stream.body.split('"traceId"')[0])
    assert len(bodies) == 1
    async with EventStream(home.url, session, auditor) as stream:
        assert stream.status == 403


async def test_other_verbs_are_405_and_only_with_a_token(home: House) -> None:
    for verb in ("POST", "PUT", "DELETE", "PATCH", "HEAD"):
        for token, status in ((None, 401), (TOKEN, 405)):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with (
                aiohttp.ClientSession() as session,
                session.request(verb, f"{home.url}/v1/sessions/s_1/events", headers=headers) as response,
            ):
                assert (verb, response.status) == (verb, status)
                assert ("Allow" in response.headers) is (status == 405)


async def test_pages_of_allowed_origins_may_read_a_stream_and_no_others(tmp_path: Path) -> None:
    ours = "https://app.corral.example"
    async with house(tmp_path, allowed_origins=[ours]) as home, await home.wire() as wire:
        session = await made(wire)
        path = f"{home.url}/v1/sessions/{session}/events"
        async with aiohttp.ClientSession() as client:
            async with client.options(path, headers={"Origin": ours}) as response:
                assert response.status == 204
                assert response.headers["Access-Control-Allow-Origin"] == ours
                assert response.headers["Access-Control-Allow-Methods"] == "GET, POST"
                assert response.headers["Access-Control-Allow-Headers"] == "content-type, authorization, last-event-id"
                assert response.headers["Vary"] == "Origin"
            for verb in ("OPTIONS", "GET"):
                async with client.request(verb, path, headers={"Origin": "https://evil.example"}) as response:
                    assert response.status == 403
                    assert "Access-Control-Allow-Origin" not in response.headers
        async with EventStream(home.url, session, TOKEN, headers={"Origin": ours}) as stream:
            assert (stream.status, stream.headers["Access-Control-Allow-Origin"]) == (200, ours)
        async with EventStream(home.url, session, None, headers={"Origin": ours}) as stream:
            assert (stream.status, stream.headers["Access-Control-Allow-Origin"]) == (401, ours)


async def test_comments_keep_a_silent_stream_alive(tmp_path: Path) -> None:
    assert GatewayOptions().stream_comment == 15.0
    async with house(tmp_path, options=GatewayOptions(stream_comment=0.05)) as home, await home.wire() as wire:
        session = await made(wire)
        async with EventStream(home.url, session, TOKEN) as stream:
            for number in range(3):
                reading = asyncio.ensure_future(stream.until("session.updated"))
                await asyncio.sleep(0.2)
                await wire.effect("sessions.update", sessionId=session, title=str(number))
                await reading
            assert stream.comments.count("") >= 3


async def test_who_comes_in_the_middle_of_a_message_gets_its_text_from_the_start(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Hang(after=3)]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="hi")
        await wire.until(lambda: sum(frame["event"] == "agent.delta" for frame in wire.events) >= 1)
        async with EventStream(home.url, run["sessionId"], TOKEN) as stream:
            delta = await stream.until("agent.delta")
            assert (delta.id, delta.data["payload"]["offset"]) == (None, 0)
            text = delta.data["payload"]["delta"]
            assert text
        whole = "".join(frame["payload"]["delta"] for frame in wire.events if frame["event"] == "agent.delta")
        assert whole.startswith(text[: len(whole)])


STEPS = [CallTools([("file_list", {})], text=f"look {n}") for n in range(20)]


class Collected:
    """What a client has of a session after any number of cuts: durable versions, and the text of messages."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.texts: dict[str, str] = {}
        self.ended = False

    async def read(self, stream: EventStream, most: int | None) -> None:
        begun: set[str] = set()
        while most is None or most > 0:
            event = await stream.next()
            assert event is not None
            payload = event.data["payload"]
            if event.id is not None:
                self.versions.append(event.id)
                if event.event == "agent.message" and payload["messageId"] in self.texts:
                    assert payload["text"].startswith(self.texts[payload["messageId"]])
            else:
                message, offset = payload["messageId"], payload["offset"]
                assert offset == 0 or message in begun
                begun.add(message)
                self.texts[message] = self.texts.get(message, "")[:offset] + payload["delta"]
            self.ended = self.ended or event.event in ("agent.completed", "agent.failed")
            if self.ended:
                return
            most = None if most is None else most - 1

    def headers(self) -> dict[str, str]:
        return {"Last-Event-ID": str(self.versions[-1])} if self.versions else {"Last-Event-ID": "0"}


async def test_cut_off_fifty_times_a_client_gets_each_event_once_in_order(tmp_path: Path) -> None:
    chance = random.Random(3)
    script = [*STEPS, Say("and so it ends " * 40, chunks=200, delay=0.02)]
    async with house(tmp_path, script=script) as home, await home.wire() as wire:
        session = await made(wire)
        await wire.effect("agent.run", input="go", sessionId=session)
        got = Collected()
        cuts = 0
        while not got.ended:
            async with EventStream(home.url, session, TOKEN, headers=got.headers()) as stream:
                assert stream.status == 200
                if cuts < 50 and chance.random() < 0.2:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(chance.random() * 0.05):
                            await got.read(stream, None)
                else:
                    await got.read(stream, chance.randrange(0, 4) if cuts < 50 else None)
                cuts += 1
        assert cuts > 50
        last = (await wire.request("sessions.get", {"sessionId": session}))["session"]["stateVersion"]
        assert got.versions == list(range(1, last + 1))


async def test_a_stream_goes_on_after_the_gateway_was_killed_and_started_again(tmp_path: Path) -> None:
    script = [*STEPS[:5], Say("and so it ends " * 40, chunks=100, delay=0.02)]
    async with ModelServer(script) as model:
        env = {"CORRAL_MODEL": "openai-chat:test", "OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k"}
        async with Gateway(tmp_path / "data", env) as gateway:
            url, token = gateway.address()
            params = {"input": "go", "sessionId": "s_1", "idempotencyKey": new_key(), "waitMs": 0}
            assert (await rpc(url, "agent.run", params, token=token)).response["ok"] is True
            got = Collected()
            async with EventStream(url, "s_1", token, query="?after=0") as stream:
                await got.read(stream, 6)
                await gateway.kill()
                with pytest.raises(aiohttp.ClientError):
                    await got.read(stream, None)
            await gateway.start()
            url, token = gateway.address()
            while not got.ended:
                async with EventStream(url, "s_1", token, headers=got.headers()) as stream:
                    await got.read(stream, None)
            assert got.versions == list(range(1, len(got.versions) + 1))
            assert (await rpc(url, "sessions.get", {"sessionId": "s_1"}, token=token)).response["payload"]["session"][
                "stateVersion"
            ] == got.versions[-1]


async def test_drain_ends_every_stream_and_says_so(home: House) -> None:
    async with await home.wire() as wire:
        session = await made(wire)
        async with EventStream(home.url, session, TOKEN) as one, EventStream(home.url, session, TOKEN) as two:
            await home.server.gateway.drain()
            assert home.server.gateway.connections == 0
            for stream in (one, two):
                await stream.end()
                assert stream.comments == ["closed 1012"]
        async with EventStream(home.url, session, TOKEN) as late:
            assert late.status == 503
        await wire.closed()


async def test_a_session_deleted_or_made_private_ends_the_streams_of_those_who_may_not_see_it(home: House) -> None:
    ann = await home.add_token("ann")
    async with await home.wire() as wire:
        session = await made(wire, visibility="workspace")
        async with EventStream(home.url, session, TOKEN) as own, EventStream(home.url, session, ann) as other:
            await wire.effect("sessions.update", sessionId=session, visibility="private")
            await own.until("session.updated")
            await other.end()
            assert other.versions == []
            await wire.effect("sessions.delete", sessionId=session)
            await own.end()
            assert own.events[-1].data["payload"]["reason"] == "deleted"


async def test_a_token_revoked_or_expired_ends_its_streams(tmp_path: Path) -> None:
    options = GatewayOptions(token_recheck=600)
    async with house(tmp_path, options=options) as home, await home.wire() as wire:
        session = await made(wire, visibility="workspace")
        token = await wire.effect("tokens.create", roles=["viewer"], userId="u_anna")
        async with EventStream(home.url, session, token["token"]) as stream:
            await wire.effect("tokens.revoke", tokenId=token["tokenId"])
            await stream.end()
            assert stream.comments == ["closed 4401"]
        now = home.server._clock.now_ms()
        brief = await home.add_token("brief", expires_at=now + 400)
        async with EventStream(home.url, session, brief) as stream:
            assert stream.status == 200
            await stream.end()
            assert stream.comments == ["closed 4401"]


async def test_a_reader_too_far_behind_is_cut_off_alone_and_its_memory_given_back(tmp_path: Path) -> None:
    options = GatewayOptions(outbox_bytes=1024 * 1024, outbox_mark_bytes=128 * 1024, close_grace=0.3)
    async with (
        house(tmp_path, script=[Say("ok")], options=options, compaction=False) as home,
        await home.wire() as wire,
    ):
        session = await made(wire)
        host, _, port = home.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1)
        head = f"GET /v1/sessions/{session}/events HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        writer.write(head.encode())
        assert (await reader.readexactly(12)).endswith(b"200")
        async with EventStream(home.url, session, TOKEN) as quick:
            reading = asyncio.ensure_future(_last_run(quick, 50))
            for number in range(50):
                run = await wire.effect("agent.run", input=f"{number} " + "x" * 200_000, sessionId=session)
                await wire.event("agent.completed", runId=run["runId"])
            await reading
            assert quick.versions == list(range(2, 2 + len(quick.versions)))
            await home.sockets_gone(left=2)
            page = await metrics(home)
            assert 'corral_closed_total{code="4410",transport="sse"} 1.0' in page
            # Not ended like a stream that is whole: the connection was dropped.
            came = b""
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(60):
                    while chunk := await reader.read(65536):
                        came = (came + chunk)[-64:]
            assert not came.endswith(b"0\r\n\r\n")
        writer.transport.abort()


async def _last_run(stream: EventStream, runs: int) -> None:
    for _ in range(runs):
        await stream.until("agent.completed")


async def metrics(home: House) -> str:
    request = f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
    status, _ = await raw_http(home.url, request.encode())
    assert status == 200
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as client,
        client.get(f"{home.url}/metrics") as response,
    ):
        return await response.text()
