"""Events to many subscribers of one session against awaited `send_str` on bare aiohttp."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from bench.bare import END
from bench.children import Child, Children, Corral, Served, start_bare, start_corral, start_model
from bench.numbers import Numbers
from bench.stats import Row, Target
from bench.wire import COMPLETED, Client, connect_frame, frame, rpc, run_frame

_BARE_DELIVERIES = 40_000
"""About so many sends make a measurement of the bare server, whatever the number of subscribers."""
_SECONDS = 120.0
_DELTA_FRAME = 280
"""Bytes of an `agent.delta` with one delta of bench.script and ids of the usual length."""
_SUBSCRIBERS = ("-m", "bench.subscribers")


async def measure(children: Children, folder: Path, numbers: Numbers) -> list[Row]:
    model = await start_model(children)
    corral = await start_corral(children, folder / "fanout", model)
    rows = []
    async with aiohttp.ClientSession() as http, Client(http, corral) as owner:
        for count, steps, chunks in numbers.fanout:
            fan = await _Fan.open(children, http, corral, owner, count)
            rows += await fan.measure(numbers, steps, chunks)
            await children.end(*fan.children)
    await children.end(corral.child, model.child)
    return rows


class _Fan:
    """So many subscribers at the gateway and as many sockets at a bare server, each set in a process of its own.

    A subscriber in a third process follows sessions that nobody else does: what a run takes with it alone is
    what making the events costs.
    """

    def __init__(self, http: aiohttp.ClientSession, corral: Corral, owner: Client, bare: Served, count: int) -> None:
        self._http = http
        self._corral = corral
        self._owner = owner
        self._bare = bare
        self._count = count
        self._ours: Child
        self._alone: Child
        self._theirs: Child
        self._follows: dict[Child, str] = {}

    @classmethod
    async def open(
        cls, children: Children, http: aiohttp.ClientSession, corral: Corral, owner: Client, count: int
    ) -> _Fan:
        fan = cls(http, corral, owner, await start_bare(children), count)
        fan._ours = await children.start("subscribers", _SUBSCRIBERS)
        fan._alone = await children.start("subscriber-alone", _SUBSCRIBERS)
        fan._theirs = await children.start("subscribers-bare", _SUBSCRIBERS)
        hello = [connect_frame(corral.token)]
        await fan._ours.ask(do="open", port=corral.port, count=count, say=hello, answers=1)
        await fan._alone.ask(do="open", port=corral.port, count=1, say=hello, answers=1)
        await fan._theirs.ask(do="open", port=fan._bare.port, count=count, say=[], answers=0)
        return fan

    @property
    def children(self) -> list[Child]:
        return [self._ours, self._alone, self._theirs, self._bare.child]

    async def measure(self, numbers: Numbers, steps: int, chunks: int) -> list[Row]:
        many = f"{self._count} subscriber{'s' if self._count > 1 else ''}"
        # With one subscriber it is the journal that is measured, not the fan-out.
        target = Target(0.8, at_most=False) if self._count > 1 else None
        sends = "awaited `send_str` of frames of the same mean size to as many sockets"
        durable = Row(
            f"durable events to {many}",
            "/s",
            sends,
            target=target,
            note="Deliveries from a run's `agent.accepted` at the first subscriber to its `agent.completed` at the "
            "last; that includes asking the model and committing the events.",
        )
        further = Row(
            f"durable events to {many}, sending alone",
            "/s",
            sends,
            target=target,
            note="The same runs less the time that one takes with a single subscriber, deliveries likewise.",
        )
        deltas = Row(
            f"deltas to {many}",
            "/s",
            "awaited `send_str` for each delta to each socket",
            target=target,
            note="Deltas of the model's that reach a subscriber, measured likewise.",
        )
        calls = numbers.calls_in_a_step
        await self._run(self._ours, steps=1, calls=calls)
        await self._run(self._alone, steps=1, calls=calls)
        merged = 0.0
        for _ in range(numbers.fanout_rounds):
            got = await self._run(self._ours, steps=steps, calls=calls)
            bare = await self._bare_rate(round(got["bytes"] / got["frames"]))
            durable.add(got["frames"] / got["seconds"], bare)
            if self._count > 1:
                alone = await self._run(self._alone, steps=steps, calls=calls)
                # With few subscribers the difference may be lost in the noise.
                seconds = max(got["seconds"] - alone["seconds"], 0.01 * got["seconds"])
                further.add((got["frames"] - alone["frames"]) / seconds, bare)
            got = await self._run(self._ours, chunks=chunks)
            merged = got["frames"] / self._count
            deltas.add(chunks * self._count / got["seconds"], await self._bare_rate(_DELTA_FRAME))
        deltas.note += f" Waiting deltas are merged: {chunks} went out in {merged:.0f} frames a subscriber."
        return [durable, further, deltas] if further.ours else [durable, deltas]

    async def _run(self, followers: Child, **wanted: int) -> dict[str, float]:
        """A run in a new session that these follow, and what they got of it."""
        session = await self._owner.new_session()
        if followers in self._follows:
            await followers.ask(do="say", text=frame("u", "events.unsubscribe", sessionId=self._follows[followers]))
        self._follows[followers] = session
        await followers.ask(do="say", text=frame("e", "events.subscribe", sessionId=session))
        await followers.ask(do="arm", end=COMPLETED)
        # Over /rpc, where nobody is subscribed by running.
        await rpc(self._http, self._corral, run_frame(session, **wanted))
        return await followers.ask(_SECONDS + 10, do="wait", seconds=_SECONDS)

    async def _bare_rate(self, size: int) -> float:
        frames = max(50, _BARE_DELIVERIES // self._count)
        await self._theirs.ask(do="arm", end=END)
        query = {"frames": str(frames), "size": str(size)}
        async with self._http.get(f"{self._bare.url}/burst", params=query) as response:
            await response.read()
        got = await self._theirs.ask(_SECONDS + 10, do="wait", seconds=_SECONDS)
        rate: float = got["frames"] / got["seconds"]
        return rate
