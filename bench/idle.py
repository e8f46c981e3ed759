"""What a connection weighs that does nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench.children import Children, Served, start_bare, start_corral
from bench.machine import resident_kib
from bench.numbers import Numbers
from bench.stats import Row, Target
from bench.wire import connect_frame

_SAME_KIB = 64


async def measure(children: Children, folder: Path, numbers: Numbers) -> list[Row]:
    row = Row(
        "memory of an idle connection",
        "KiB",
        "a WebSocket on bare aiohttp with the same heartbeat",
        target=Target(1.5, at_most=True),
        note=f"What {numbers.idle} connections add to the resident memory of a fresh process, by their number, "
        "once that has come to rest after the start; Corral's are authenticated.",
    )
    for number in range(numbers.idle_rounds):
        corral = await start_corral(children, folder / f"idle-{number}")
        ours = await _weigh(children, corral, [connect_frame(corral.token)], numbers)
        bare = await start_bare(children)
        row.add(ours, await _weigh(children, bare, [], numbers))
        await children.end(corral.child, bare.child)
    return [row]


async def _weigh(children: Children, server: Served, say: list[str], numbers: Numbers) -> float:
    """KiB for each of `numbers.idle` connections."""
    count = numbers.idle
    subscribers = await children.start("subscribers", ["-m", "bench.subscribers"])
    open_some = {"do": "open", "port": server.port, "say": say, "answers": len(say)}
    # The first ones bring in what is loaded once and grow the heap.
    await subscribers.ask(**open_some, count=min(20, count))
    before = await _at_rest(server.child.pid, numbers.idle_rest_s)
    await subscribers.ask(**open_some, count=count)
    after = resident_kib(server.child.pid)
    await children.end(subscribers)
    return max(after - before, 1) / count


async def _at_rest(pid: int, seconds: float) -> float:
    """The resident memory once it has stayed the same for so many seconds.

    A gateway signs what it has recorded a second after its start, and loads what it needs for that, however
    many connections there are.
    """
    resident, since = resident_kib(pid), time.monotonic()
    while time.monotonic() - since < seconds:
        await asyncio.sleep(0.1)
        now = resident_kib(pid)
        if abs(now - resident) > _SAME_KIB:
            resident, since = now, time.monotonic()
    return resident
