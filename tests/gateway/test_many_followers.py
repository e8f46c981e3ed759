"""Whoever follows sees the journal: many of one, one of many, and all of them over cuts and restarts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from corral.gateway.options import GatewayOptions
from tests.chaos.people import Follower, Listener, Person, Place, Reader
from tests.gateway.test_slow_reader import Lazy
from tests.support.gateway import Gateway
from tests.support.house import TOKEN, house
from tests.support.invariants import Inspection, Seen
from tests.support.model_server import CallTools, ModelServer, Say, conversation
from tests.support.wire import Wire, new_key

MANY = 1000
SLOW = 5


async def test_a_thousand_followers_of_one_session_each_see_all_of_it_and_slow_ones_keep_nobody(tmp_path: Path) -> None:
    async with house(tmp_path / "data", script=[Say("ok", chunks=3)]) as home, await home.wire() as actor:
        session = (await actor.effect("sessions.create", title="one for all"))["session"]["id"]
        async with AsyncExitStack() as stack:
            lazies = []
            for _ in range(SLOW):
                lazies.append(lazy := await Lazy.open(home.url))
                stack.callback(lazy.close)
                await _begin_lazily(lazy, session)
            client = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            gate = asyncio.Semaphore(32)
            sockets = await asyncio.gather(*(_begin(client, home.url, session, gate) for _ in range(MANY)))
            for number in range(3):
                await actor.effect("sessions.update", sessionId=session, title=f"title {number}")
            await actor.effect("agent.run", input="go", sessionId=session)
            await actor.event("agent.completed")
            end = (await actor.request("sessions.get", {"sessionId": session}))["session"]["stateVersion"]
            async with asyncio.timeout(120):
                read = await asyncio.gather(*(_to_version(socket, end) for socket in sockets))
            async with asyncio.timeout(120):
                slowly = [await _lazily_to_version(lazy, end) for lazy in lazies]
            await asyncio.gather(*(socket.close() for socket in sockets))
    look = Inspection(tmp_path / "data" / "corral.db")
    for number, frames in enumerate([*read, *slowly]):
        look.client(f"follower {number}", Seen([frames], after={session: 0}))
    look.report()
    assert len(read) == MANY


async def _begin_lazily(lazy: Lazy, session: str) -> None:
    await lazy.send("connect", {"auth": {"token": TOKEN}})
    await lazy.receive()
    await lazy.send("events.subscribe", {"sessionId": session, "after": 0})
    await lazy.receive()


async def _lazily_to_version(lazy: Lazy, end: int) -> list[Any]:
    frames: list[Any] = []
    while not frames or frames[-1]["event"] == "agent.delta" or frames[-1]["stateVersion"] != end:
        opcode, data = await lazy.receive()
        if opcode == 1:
            frames.append(json.loads(data))
    return frames


async def _begin(
    client: aiohttp.ClientSession, url: str, session: str, gate: asyncio.Semaphore
) -> aiohttp.ClientWebSocketResponse:
    async with gate:
        socket = await client.ws_connect(f"{url}/ws")
        for method, params in (
            ("connect", {"auth": {"token": TOKEN}}),
            ("events.subscribe", {"sessionId": session, "after": 0}),
        ):
            await socket.send_json({"type": "req", "id": method, "method": method, "params": params})
            answer = await socket.receive_json()
            assert answer["ok"], answer
        return socket


async def _to_version(socket: aiohttp.ClientWebSocketResponse, end: int) -> list[Any]:
    frames: list[Any] = []
    while not frames or frames[-1]["event"] == "agent.delta" or frames[-1]["stateVersion"] != end:
        frames.append(await socket.receive_json())
    return frames


async def test_one_who_follows_a_thousand_sessions_sees_all_of_each_though_cut_off_again_and_again(
    tmp_path: Path,
) -> None:
    # Two people who are one principal ask 6,000 times in two or three seconds: a fast machine meets the default limit.
    options = GatewayOptions(request_rate=1_000_000)
    async with house(tmp_path / "data", options=options) as home, await home.wire() as actor:
        ids = [await actor.start("sessions.create", {"title": "t", "idempotencyKey": new_key()}) for _ in range(MANY)]
        sessions = [(await _payload(actor, frame_id))["session"]["id"] for frame_id in ids]
        place = Place("many sessions", tmp_path)
        place.token = TOKEN
        place.opened(home.url)
        reader = Reader(place, "reader", sessions)
        following = asyncio.create_task(reader.follow())
        try:
            for turn in range(2):
                for session in sessions:
                    changed = {"sessionId": session, "title": f"{turn}", "idempotencyKey": new_key()}
                    await actor.start("sessions.update", changed)
                # In the middle of it: some have come and some have not.
                await _until(lambda turn=turn: sum(reader.versions().values()) > MANY * (turn + 1) + MANY // 3)
                reader.cut()
            await _until(lambda: set(reader.versions().values()) == {3})
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await reader.close()
    assert len(reader.connections) == 3
    look = Inspection(tmp_path / "data" / "corral.db")
    look.client("the reader", Seen(reader.connections, after=dict.fromkeys(sessions, 0)))
    look.report()


async def _payload(wire: Wire, frame_id: str) -> Any:
    answer = await wire.response(frame_id)
    assert answer["ok"], answer
    return answer["payload"]


async def _until(holds: Any) -> None:
    async with asyncio.timeout(120):
        while not holds():  # noqa: ASYNC110  (frames come in many places)
            await asyncio.sleep(0.05)


async def test_feeds_streams_and_subscriptions_that_are_cut_at_random_and_killed_see_the_journal(
    tmp_path: Path,
) -> None:
    steps = [*[CallTools([("file_list", {})], text="a step", delay=0.01)] * 6, Say("done " * 20, chunks=20)]
    async with ModelServer(conversation(steps)) as model:
        env = {
            "CORRAL_TOKEN": TOKEN,
            "CORRAL_MODEL": "openai-chat:test",
            "OPENAI_BASE_URL": model.base_url,
            "OPENAI_API_KEY": "k",
        }
        async with Gateway(tmp_path / "data", env) as gateway:
            place = Place("cuts", tmp_path)
            place.token = TOKEN
            place.opened(gateway.url)
            actor = Person(place, "actor")
            sessions = [(await actor.must("sessions.create"))["session"]["id"] for _ in range(3)]
            feeds = [Follower(place, f"feed {number}") for number in range(3)]
            for feed in feeds:
                await feed.begin()
            readers = [Reader(place, f"reader {number}", sessions) for number in range(2)]
            listeners = [Listener(place, f"stream {name}", name, slow=name == sessions[0]) for name in sessions]
            await _storm(place, gateway, actor, [*feeds, *readers, *listeners], sessions)
            look = Inspection(tmp_path / "data" / "corral.db", settled=True)
            for person in (*feeds, *readers):
                await person.close()
                after = dict.fromkeys(sessions, 0) if isinstance(person, Reader) else {}
                look.client(person.name, Seen(person.connections, feed=isinstance(person, Follower), after=after))
            for listener in listeners:
                look.client(listener.name, Seen([listener.frames], after={listener.session: 0}, numbered=False))
            look.report()
            await actor.close()
    # The last kill alone made each of them come back.
    assert min(len(person.connections) for person in feeds) > 1


async def _storm(
    place: Place,
    gateway: Gateway,
    actor: Person,
    followers: Sequence[Follower | Reader | Listener],
    sessions: Sequence[str],
) -> None:
    """Runs in all sessions, while followers are cut and the gateway is killed; then all of it has been seen."""
    chance = place.rng("cuts")
    tasks = [asyncio.create_task(each.follow()) for each in followers]
    try:
        for turn in range(3):
            runs = [(await actor.must("agent.run", input="go", sessionId=name, waitMs=0))["runId"] for name in sessions]
            for _ in range(6):
                for each in followers:
                    if chance.random() < 0.3:
                        each.cut()
                await asyncio.sleep(chance.uniform(0, 0.1))
            if turn < 2:
                place.up.clear()
                await gateway.kill()
                await gateway.start()
                place.opened(gateway.url)
            for run_id in runs:
                while (await actor.ask("runs.get", {"runId": run_id}))["payload"]["run"]["status"] != "completed":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        ends = {}
        for name in sessions:
            await actor.must("sessions.update", sessionId=name, title="the end")
            ends[name] = (await actor.ask("sessions.get", {"sessionId": name}))["payload"]["session"]["stateVersion"]
        last = (sessions[-1], ends[sessions[-1]])
        await _until(lambda: all(_has(each, ends, last) for each in followers))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _has(each: Follower | Reader | Listener, ends: dict[str, int], last: tuple[str, int]) -> bool:
    match each:
        case Follower():
            return each.last() == last
        case Reader():
            return each.versions() == ends
        case Listener():
            return each.version == ends[each.session]
