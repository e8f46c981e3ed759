"""A durable turn of 50 chunks against the same request made bare: one at a time, and 16 at a time."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import aiohttp

from bench.children import Children, Served, start_corral, start_model
from bench.numbers import Numbers
from bench.stats import Row, Target
from bench.wire import Client, TurnFailed

CHUNKS = 50
COMMITS = 3


class BareCalls:
    """The very request that the gateway makes, posted by aiohttp and read to its end, nothing else."""

    def __init__(self, http: aiohttp.ClientSession, model: Served, body: bytes) -> None:
        self._http = http
        self._url = f"{model.url}/v1/chat/completions"
        self._body = body

    async def call(self) -> None:
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
        seen = 0
        async with self._http.post(self._url, data=self._body, headers=headers) as response:
            async for piece in response.content.iter_any():
                seen += piece.count(b"data: ")
        if seen < CHUNKS:
            raise TurnFailed(f"the model sent {seen} events")


class BareCommits:
    """`BEGIN; INSERT; COMMIT` on a SQLite file of its own, durable as the gateway's are."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("CREATE TABLE entry (id INTEGER PRIMARY KEY, payload BLOB)")

    def commit(self, times: int) -> None:
        for _ in range(times):
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT INTO entry (payload) VALUES (?)", (b"x" * 300,))
            self._db.execute("COMMIT")

    def close(self) -> None:
        self._db.close()


async def measure(children: Children, folder: Path, numbers: Numbers) -> list[Row]:
    model = await start_model(children)
    corral = await start_corral(children, folder / "turns", model)
    # Neither side waits for a free connection.
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        clients = [await stack.enter_async_context(Client(http, corral)) for _ in range(numbers.crowd)]
        commits = stack.enter_context(closing(BareCommits(folder / "bare.db")))
        for client in clients[:4]:
            await client.turn(await client.new_session(), CHUNKS)
        bare = BareCalls(http, model, await _last_request(http, model))
        await bare.call()
        single, without = await _one_at_a_time(numbers, clients[0], bare, commits)
        crowd = await _crowd(numbers, clients, bare)
    await children.end(corral.child, model.child)
    return [single, without, crowd]


async def _last_request(http: aiohttp.ClientSession, model: Served) -> bytes:
    """The body of the last request that the model server got: the gateway's own."""
    async with http.get(f"{model.url}/_state") as response:
        state: dict[str, Any] = await response.json()
    return json.dumps(state["requests"][-1]["json"]).encode()


async def _one_at_a_time(numbers: Numbers, client: Client, bare: BareCalls, commits: BareCommits) -> tuple[Row, Row]:
    against_both = Row(
        f"a durable turn of {CHUNKS} chunks",
        "ms",
        f"the same request posted by aiohttp to the same model server, plus {COMMITS} bare BEGIN…INSERT…COMMIT",
        target=Target(2.5, at_most=True),
        note="From `agent.run` on a WebSocket to `agent.completed` on it, in a session of its own. "
        "The turn commits twice; where the disk is busy with other things, the ratio says more of the disk than of "
        "Corral, and the next row is the one to read.",
    )
    against_call = Row(
        "the same turn, by the call alone",
        "ms",
        "that request without the commits; the turns are those of the row above",
    )
    for _ in range(numbers.turn_rounds):
        session = await client.new_session()
        begin = time.perf_counter()
        await client.turn(session, CHUNKS)
        turned = time.perf_counter()
        await bare.call()
        called = time.perf_counter()
        commits.commit(COMMITS)
        committed = time.perf_counter()
        turn = (turned - begin) * 1000
        against_both.add(turn, (committed - turned) * 1000)
        against_call.add(turn, (called - turned) * 1000)
    return against_both, against_call


async def _crowd(numbers: Numbers, clients: Sequence[Client], bare: BareCalls) -> Row:
    row = Row(
        f"turns of {CHUNKS} chunks, {len(clients)} sessions at once",
        "/s",
        f"the same request, {len(clients)} at once",
        target=Target(0.3, at_most=False),
        note="The model server and the client take their share of the cores in both.",
    )
    total = len(clients) * numbers.turns_each

    async def turns(client: Client, sessions: Sequence[str]) -> None:
        for session in sessions:
            await client.turn(session, CHUNKS)

    async def calls() -> None:
        for _ in range(numbers.turns_each):
            await bare.call()

    for _ in range(numbers.crowd_rounds):
        sessions = [[await client.new_session() for _ in range(numbers.turns_each)] for client in clients]
        begin = time.perf_counter()
        await asyncio.gather(*(turns(client, own) for client, own in zip(clients, sessions, strict=True)))
        turned = time.perf_counter()
        await asyncio.gather(*(calls() for _ in clients))
        called = time.perf_counter()
        row.add(total / (turned - begin), total / (called - turned))
    return row
