"""`python -m bench.scale`: whether a query costs the same in a large store as in a small one.

Fills two data directories, one with a hundred times the rows of the other (`bench.filling`), starts a gateway
over each, and asks both the same, turn about.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import uvloop

from bench.children import Children, Corral, start_corral
from bench.filling import LONG, MEMBER_TOKEN, OWNER, SPAN_MS, Size, fill, session_name
from bench.machine import Machine, describe
from bench.stats import Row, Target
from bench.table import cells
from bench.wire import TurnFailed, connect_frame, frame
from corral.clock import rfc3339

_NEAR = Target(2.0, at_most=True)
_POLL_S = 0.05


class Asking:
    """One WebSocket of one gateway."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self._ids = itertools.count()

    @classmethod
    async def open(cls, http: aiohttp.ClientSession, corral: Corral, token: str | None = None) -> Asking:
        asking = cls(await http.ws_connect(f"{corral.url}/ws", max_msg_size=0))
        await asking.socket.send_str(connect_frame(token or corral.token))
        await asking.socket.receive_str()
        return asking

    async def ask(self, method: str, **params: Any) -> Any:
        """The payload. Raises TurnFailed if it was refused."""
        name = f"r{next(self._ids)}"
        await self.socket.send_str(frame(name, method, **params))
        while True:
            answer = json.loads(await self.socket.receive_str())
            if answer.get("id") == name:
                if not answer["ok"]:
                    raise TurnFailed(f"{method}: {answer['error']}")
                return answer["payload"]

    async def close(self) -> None:
        await self.socket.close()


def _queries(size: Size) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (method, params). One name asks for as many rows of either store."""
    last, middle = size.sessions - 100, size.events // 2
    now = time.time_ns() // 1_000_000
    hour = {"from": rfc3339(now - 3_600_000), "to": rfc3339(now)}
    # As long a piece of the log in either: 500 records, from the middle of the time.
    piece = SPAN_MS * 500 // size.records
    part = {"from": rfc3339(now - SPAN_MS // 2), "to": rfc3339(now - SPAN_MS // 2 + piece)}
    return {
        "sessions.list": ("sessions.list", {}),
        "sessions.list, agent with old sessions alone": ("sessions.list", {"agentId": "a_rare", "limit": 2}),
        "sessions.get": ("sessions.get", {"sessionId": session_name(last)}),
        "sessions.history, the end": ("sessions.history", {"sessionId": LONG}),
        "sessions.history, afterId in the middle": ("sessions.history", {"sessionId": LONG, "afterId": middle}),
        "sessions.history, beforeId in the middle": ("sessions.history", {"sessionId": LONG, "beforeId": middle}),
        "sessions.history, the beginning": ("sessions.history", {"sessionId": LONG, "afterId": 0}),
        "audit.query": ("audit.query", {"limit": 100}),
        "audit.query, cursor in the middle": ("audit.query", {"limit": 100, "cursor": size.records // 2}),
        "audit.query, frequent action": ("audit.query", {"limit": 100, "action": "tool.call"}),
        "audit.query, rare action": ("audit.query", {"limit": 100, "action": "policy.update"}),
        "audit.query, rare actor": ("audit.query", {"limit": 100, "actor": "u_rare"}),
        "audit.query, frequent actor and rare action": (
            "audit.query",
            {"limit": 100, "actor": OWNER, "action": "policy.update"},
        ),
        "audit.query, frequent action and rare actor": (
            "audit.query",
            {"limit": 100, "actor": "u_rare", "action": "tool.call"},
        ),
        "audit.query, a session": ("audit.query", {"limit": 10, "sessionId": session_name(last)}),
        "audit.query, a run": ("audit.query", {"limit": 10, "runId": f"run-{last:06d}"}),
        "audit.query, a period": ("audit.query", {"limit": 100, **part}),
        "audit.query, a period and an action": ("audit.query", {"limit": 100, "action": "tool.call", **part}),
        "metrics.summary, an hour": ("metrics.summary", hour),
        "metrics.summary, an hour of an agent": ("metrics.summary", {**hour, "agentId": "a_1"}),
        "approval.queue": ("approval.queue", {"limit": 50}),
        "approval.queue, approved": ("approval.queue", {"limit": 50, "status": "approved"}),
        "approval.queue, a session": ("approval.queue", {"sessionId": session_name(size.sessions - 1)}),
    }


_GROWS = {
    "metrics.summary, everything": ("metrics.summary", {"from": "2020-01-01T00:00:00Z"}),
}
"""Reads more where more was asked for: told, not judged."""


async def measure(children: Children, folder: Path, share: float, rounds: int) -> list[Row]:
    """Rows whose first figure is the large store's, the second the small one's."""
    sizes = {"large": Size.of(share), "small": Size.of(max(share / 100, 0.002))}
    for name, size in sizes.items():
        began = time.perf_counter()
        await fill(folder / name, size)
        bytes_ = (folder / name / "corral.db").stat().st_size
        seconds = time.perf_counter() - began
        print(f"{name}: {size}, {bytes_ / 2**20:.0f} MiB in {seconds:.0f} s", file=sys.stderr, flush=True)
    rows = await _starts(children, folder, rounds)
    async with aiohttp.ClientSession() as http:
        corrals = {name: await start_corral(children, folder / name) for name in sizes}
        asking = {name: await Asking.open(http, corral) for name, corral in corrals.items()}
        rows += await _ask_all(asking, sizes, rounds)
        members = {name: await Asking.open(http, corral, MEMBER_TOKEN) for name, corral in corrals.items()}
        rows.append(
            await _pair("sessions.list, of who sees few old ones", members, ("sessions.list", {"limit": 2}), rounds)
        )
        rows += await _subscribe(http, corrals, sizes, rounds)
        rows += await _beside(http, corrals, folder)
    return rows


async def _ask_all(asking: dict[str, Asking], sizes: dict[str, Size], rounds: int) -> list[Row]:
    rows = []
    queries = {name: _queries(size) for name, size in sizes.items()}
    for query in queries["large"]:
        row = _row(query)
        for _ in range(rounds):
            row.add(*[await _timed(asking[name], *queries[name][query]) for name in ("large", "small")])
        rows.append(row)
    for query, what in _GROWS.items():
        row = await _pair(query, asking, what, rounds)
        row.target = None
        row.note = (
            "metrics.summary of everything goes through the decisions of people one by one, here one for each run, for "
            "the median of their waits; what it says of runs comes from sums by the hour."
        )
        rows.append(row)
    return rows


def _row(name: str, unit: str = "ms") -> Row:
    return Row(name, unit, _SMALL, target=_NEAR)


async def _pair(name: str, asking: dict[str, Asking], what: tuple[str, dict[str, Any]], rounds: int) -> Row:
    row = _row(name)
    for _ in range(rounds):
        row.add(*[await _timed(asking[each], *what) for each in ("large", "small")])
    return row


async def _timed(asking: Asking, method: str, params: dict[str, Any]) -> float:
    begin = time.perf_counter()
    await asking.ask(method, **params)
    return (time.perf_counter() - begin) * 1000


async def _subscribe(
    http: aiohttp.ClientSession, corrals: dict[str, Corral], sizes: dict[str, Size], rounds: int
) -> list[Row]:
    """The last 100 events of the long journal, and a page from its middle, over a new subscription."""
    end = _row("events.subscribe, after the last but 100")
    for _ in range(rounds):
        end.add(*[await _followed(http, corrals[name], sizes[name].events) for name in ("large", "small")])
    return [end]


async def _followed(http: aiohttp.ClientSession, corral: Corral, events: int) -> float:
    asking = await Asking.open(http, corral)
    begin = time.perf_counter()
    await asking.socket.send_str(frame("e", "events.subscribe", sessionId=LONG, after=events - 100))
    while json.loads(await asking.socket.receive_str()).get("stateVersion") != events:
        continue
    seconds = time.perf_counter() - begin
    await asking.close()
    return seconds * 1000


async def _starts(children: Children, folder: Path, rounds: int) -> list[Row]:
    """To `listening` and to the first answer, after an orderly stop and after none."""
    orderly, killed = _row("start to the first answer"), _row("start to the first answer, after a kill")
    killed.note = "After a kill the quick check of the database goes on in the background of the start."
    async with aiohttp.ClientSession() as http:
        for _ in range(-(-rounds // 3)):
            orderly.add(*[await _started(http, children, folder / name, kill=True) for name in ("large", "small")])
            killed.add(*[await _started(http, children, folder / name, kill=False) for name in ("large", "small")])
    return [orderly, killed]


async def _started(http: aiohttp.ClientSession, children: Children, data_dir: Path, *, kill: bool) -> float:
    begin = time.perf_counter()
    corral = await start_corral(children, data_dir)
    asking = await Asking.open(http, corral)
    await asking.ask("sessions.list")
    seconds = time.perf_counter() - begin
    await asking.close()
    if kill:
        corral.child.kill()
    await children.end(corral.child)
    return seconds * 1000


async def _beside(http: aiohttp.ClientSession, corrals: dict[str, Corral], folder: Path) -> list[Row]:
    """How long a read and a write take while the whole log is verified, and while a backup is made."""

    async def verify() -> None:
        asking = await Asking.open(http, corrals["large"])
        found = await asking.ask("audit.verify")
        if not found["ok"]:
            raise TurnFailed(f"the log does not verify: {found}")
        await asking.close()

    async def back_up() -> None:
        target = folder / "backup.tar"
        arguments = ["-m", "corral", "backup", str(target), "--data-dir", str(folder / "large")]
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.DEVNULL)
        if await process.wait():
            raise TurnFailed("the backup failed")
        target.unlink()

    rows = []
    for name, work in (("audit.verify", verify), ("corral backup", back_up)):
        rows += await _while(http, corrals["large"], name, work)
    return rows


async def _while(
    http: aiohttp.ClientSession, corral: Corral, name: str, work: Callable[[], Awaitable[None]]
) -> list[Row]:
    asking = await Asking.open(http, corral)
    quiet = await _probe(asking, until=asyncio.create_task(asyncio.sleep(3)))
    began = time.perf_counter()
    task = asyncio.ensure_future(work())
    busy = await _probe(asking, until=task)
    await task
    seconds = time.perf_counter() - began
    await asking.close()
    rows = []
    for what in ("read", "write"):
        for share, word in ((0.5, "median"), (0.99, "99th percentile")):
            row = Row(f"a {what} while `{name}` runs, {word}", "ms", "before it")
            row.add(_quantile(busy[what], share), _quantile(quiet[what], share))
            row.note = f"`{name}` of the large store took {seconds:.1f} s."
            rows.append(row)
    return rows


async def _probe(asking: Asking, until: asyncio.Future[None]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"read": [], "write": []}
    made = await asking.ask("sessions.create", idempotencyKey=f"k-{time.monotonic_ns()}")
    session = made["session"]["id"]
    while not until.done():
        found["read"].append(await _timed(asking, "sessions.get", {"sessionId": session}))
        key = f"k-{time.monotonic_ns()}"
        change = {"sessionId": session, "title": key, "idempotencyKey": key}
        found["write"].append(await _timed(asking, "sessions.update", change))
        await asyncio.sleep(_POLL_S)
    return found


def _quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if share != 0.5 else median(ordered)


_SMALL = "the small store"
_TABLES = {
    _SMALL: (
        "large store",
        "small store",
        "what a client waits for an answer over a WebSocket, asked of either in turn",
    ),
    "before it": ("meanwhile", "before it", "the same of the large store, while something else goes on in it"),
}

_SAID = """Whether a query costs the same in a large store as in a small one. All figures are medians, or quantiles \
where it says so; the ratio is the median of the ratios of neighbouring measurements. Absolute figures hold for this \
machine and this hour; ratios carry over. `make bench-scale` measures anew; it takes some minutes and 3 GB of disk."""


def page(rows: Sequence[Row], machine: Machine, share: float) -> str:
    """The report in Markdown."""
    facts = machine.facts()
    for name, size in (("large store", Size.of(share)), ("small store", Size.of(max(share / 100, 0.002)))):
        many = f"{size.sessions:,} sessions, as many runs and approvals; a journal of {size.events:,} events"
        facts.append((name, f"{many}; {size.records:,} audit records"))
    out = ["<!-- Written by `python -m bench.scale --report FILE`. -->\n", "# Scale\n", f"{_SAID}\n"]
    out += ["| | |\n|---|---|", *(f"| {name} | {value} |" for name, value in facts)]
    for kind, (ours, other, what) in _TABLES.items():
        mine = [row for row in rows if row.bare_name == kind]
        out.append(f"\n{what[0].upper()}{what[1:]}:\n")
        out.append(f"| what | {ours} | {other} | ratio, median (least to most) | target | rounds |")
        out.append("|---|--:|--:|---|---|--:|")
        out += ["| " + " | ".join(cells(row)) + " |" for row in mine]
        notes = dict.fromkeys(row.note for row in mine if row.note)
        out += ["", *(f"{note}\n" for note in notes)]
    return "\n".join(out) + "\n"


async def _run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="corral-scale-", dir=options.dir) as name:
        machine = describe(Path(name))
        async with Children(Path(name)) as children:
            rows = await measure(children, Path(name), options.share, options.rounds)
    text = page(rows, machine, options.share)
    print(text)
    if options.report is not None:
        options.report.write_text(text)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the rows that the large store has [default: 1]")
    parser.add_argument("--rounds", type=int, default=21, help="how often each query is asked [default: 21]")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the report there")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the stores lie meanwhile [default: $TMPDIR]")
    try:
        return uvloop.run(_run(parser.parse_args()))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
