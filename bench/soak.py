"""`python -m bench.soak`: a gateway under load for as long as it is told, and whether what it takes levels off.

Workers make sessions, run them with tools (one in four with a call that waits for a person), and delete them;
others subscribe and go, over WebSocket and as server-sent events. The report is Markdown with a plot beside it.
Exits with 1 if something grows, or went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from bench.children import Children, Corral, Served, start_corral
from bench.levels import WARM_UP, Quantity, Verdict, judge, plot, table
from bench.machine import describe, resident_kib
from corral.client import Corral as Client
from corral.protocol.errors import CorralError, NotFound
from tests.support.model_server import CallTools, ModelServer, Say, turns_since_user, user_texts

ROWS_OF_SESSIONS = ("sessions", "journal", "runs", "messages", "tool_runs", "outputs", "approvals", "reservations")

THREADS = 1 + 1 + 4 + 8 + min(32, (os.cpu_count() or 1) + 4)
"""The loop's, the writer's, the readers', the file tools', and those of asyncio's own pool: no more, ever."""

QUANTITIES = {
    "memory": Quantity(
        "resident memory",
        "MiB",
        0.05,
        4.0,
        "It rises at first: the writer keeps 16 MiB of the database in memory, which are full when the database has "
        "grown by as much, and the allocator keeps free memory for each thread. Python's own objects stay as many.",
    ),
    "descriptors": Quantity("file descriptors", "", 0.05, 5.0),
    "threads": Quantity(
        "threads",
        "",
        None,
        None,
        "They are in pools that are filled one by one as calls happen to overlap, so they may come late; judged is "
        "that there are never more than the pools have room for.",
        ceiling=THREADS,
    ),
    "tasks": Quantity("asyncio tasks", "", 0.05, 5.0),
    "children": Quantity("child processes", "", 0.05, 2.0),
    "rows": Quantity(
        "rows that go with their session", "", 0.05, 100.0, f"In {', '.join(ROWS_OF_SESSIONS)}, together."
    ),
    "log": Quantity("write-ahead log", "MiB", 0.05, 4.0),
    "per_record": Quantity(
        "database by audit record",
        "bytes",
        0.05,
        20.0,
        "The audit log, the facts of ended runs and the answers to idempotency keys are kept when a session is "
        "deleted, so the database grows with the work done. Judged is that it grows with nothing else: its pages in "
        "use, by the records of the audit log.",
    ),
    "database": Quantity("database, pages in use", "MiB", None, None),
    "runs": Quantity("runs ended", "", None, None),
}

_GAUGE = re.compile(r"^(corral_tasks|corral_runs_active) ([0-9.e+]+)$", re.MULTILINE)


def script(request: dict[str, Any]) -> Say | CallTools:
    """What the model does: the user's text says whether something is written, and whether a command is run."""
    text = user_texts(request)[-1]
    if turns_since_user(request):
        return Say("a few words more " * 8, chunks=16)
    calls: list[tuple[str, dict[str, Any]]] = [("file_list", {})]
    if "write" in text:
        calls.append(("file_write", {"path": f"note-{text.split()[-1]}.txt", "content": text * 20}))
    if "shell" in text:
        calls.append(("bash_exec", {"command": "seq 2000"}))
    return CallTools(calls, text="I look first.")


class Load:
    """Everybody who uses the gateway. `done` counts what was done, `errors` what went wrong."""

    def __init__(self, corral: Corral, *, workers: int, pause: float) -> None:
        self._corral = corral
        self._workers = workers
        self._pause = pause
        self._numbers = itertools.count()
        self._random = random.Random(7)
        self._shell = shutil.which("bwrap") is not None
        self._sessions: list[str] = []
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def run(self) -> None:
        """For ever, until it is cancelled."""
        async with Client(self._corral.url, self._corral.token) as client, asyncio.TaskGroup() as tasks:
            await client.request("policy.update", layer="workspace", patch={"tools": {"bash.exec": "allow"}})
            for _ in range(self._workers):
                tasks.create_task(self._again(self._work, client))
            for _ in range(2):
                tasks.create_task(self._again(self._decide, client))
            for comer in (self._subscribe, self._subscribe, self._stream, self._stream, self._look):
                tasks.create_task(self._again(comer, client))

    async def _again(self, act: Callable[[Client], Awaitable[None]], client: Client) -> None:
        while True:
            try:
                async with asyncio.timeout(60):
                    await act(client)
            except (CorralError, aiohttp.ClientError, OSError, TimeoutError) as error:
                self.errors[f"{act.__name__[1:]}: {type(error).__name__}: {str(error)[:100]}"] += 1
            await asyncio.sleep(self._pause * self._random.uniform(0.5, 1.5))

    async def _work(self, client: Client) -> None:
        number = next(self._numbers)
        session = f"soak-{number}"
        words = ["go", *(["write"] if number % 4 == 0 else []), *(["shell"] if self._shell and number % 3 == 0 else [])]
        self._sessions.append(session)
        try:
            for turn in range(2):
                async for event in client.run(f"{' '.join(words)} {number % 50}", session_id=session):
                    self.done["events"] += 1
                    if event.event == "agent.failed":
                        self.errors["a run failed"] += 1
                self.done["runs"] += 1
                if turn == 0 and number % 5 == 0:
                    break
        finally:
            self._sessions.remove(session)
        await client.request("sessions.delete", sessionId=session)
        self.done["sessions"] += 1

    async def _decide(self, client: Client) -> None:
        for item in (await client.request("approval.queue", limit=20))["items"]:
            verdict = "approve" if self._random.random() < 0.7 else "reject"
            with contextlib.suppress(CorralError):  # the other one was quicker
                await client.request("approval.resolve", approvalId=item["approvalId"], decision=verdict)
                self.done["approvals"] += 1

    async def _subscribe(self, _client: Client) -> None:
        """A client of its own that follows a session for a moment, and goes without a word."""
        async with Client(self._corral.url, self._corral.token) as own:
            if not self._sessions:
                return
            session = self._random.choice(self._sessions)
            # The session may be deleted by now.
            with contextlib.suppress(TimeoutError, NotFound):
                async with asyncio.timeout(self._random.uniform(0.1, 1.0)):
                    async for _ in own.events(session, after=0):
                        self.done["followed"] += 1
        self.done["subscribers"] += 1

    async def _stream(self, _client: Client) -> None:
        if not self._sessions:
            return
        url = f"{self._corral.url}/v1/sessions/{self._random.choice(self._sessions)}/events?after=0"
        headers = {"Authorization": f"Bearer {self._corral.token}"}
        async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as response:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0.1, 1.0)):
                    async for _ in response.content:
                        self.done["streamed"] += 1
        self.done["streams"] += 1

    async def _look(self, client: Client) -> None:
        await client.request("sessions.list", limit=20)
        await client.request("metrics.summary")
        await client.request("audit.query", limit=50)
        self.done["looks"] += 1


def _children(pid: int) -> int:
    found = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            found += len(Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


class Samples:
    """What was seen of the process, at `times` in seconds from the beginning."""

    def __init__(self, corral: Corral, data_dir: Path) -> None:
        self._corral = corral
        self._database = data_dir / "corral.db"
        self._began = time.monotonic()
        self.times: list[float] = []
        self.values: dict[str, list[float]] = {name: [] for name in QUANTITIES}

    async def take(self, http: aiohttp.ClientSession, runs: int) -> None:
        headers = {"Authorization": f"Bearer {self._corral.token}"}
        async with http.get(f"{self._corral.url}/metrics", headers=headers) as response:
            gauges = dict(_GAUGE.findall(await response.text()))
        pid = self._corral.child.pid
        rows, pages, records = await asyncio.to_thread(self._look)
        log = self._database.with_name("corral.db-wal")
        seen = {
            "memory": resident_kib(pid) / 1024,
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task")),
            "tasks": float(gauges["corral_tasks"]),
            "children": _children(pid),
            "rows": rows,
            "log": log.stat().st_size / 2**20 if log.exists() else 0,
            "per_record": pages / max(records, 1),
            "database": pages / 2**20,
            "runs": runs,
        }
        self.times.append(time.monotonic() - self._began)
        for name, value in seen.items():
            self.values[name].append(float(value))

    def _look(self) -> tuple[int, int, int]:
        """(rows of sessions, bytes of pages in use, audit records)"""
        with closing(sqlite3.connect(self._database, timeout=30)) as database:
            rows = sum(database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ROWS_OF_SESSIONS)
            size, count, free = (
                database.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_size", "page_count", "freelist_count")
            )
            records = database.execute("SELECT max(id) FROM audit_log").fetchone()[0]
        return rows, size * (count - free), records or 0

    def verdicts(self) -> list[Verdict]:
        return [judge(quantity, self.times, self.values[name]) for name, quantity in QUANTITIES.items()]


def report(samples: Samples, load: Load, facts: Sequence[tuple[str, str]], command: str, picture: str) -> str:
    """The report in Markdown. `picture` is the name of the plot's file."""
    verdicts = samples.verdicts()
    growing = [each.quantity.name for each in verdicts if each.levels is False]
    minutes = (samples.times[-1] - samples.times[0]) / 60
    done = load.done
    said = f"What grows: {', '.join(growing)}." if growing else "Everything that is judged levels off."
    errors = ", ".join(f"{count} × {what}" for what, count in load.errors.most_common()) or "nothing"
    notes = [f"- **{each.name}**: {each.note}" for each in QUANTITIES.values() if each.note]
    judged = (
        f"After the first {WARM_UP:.0%} of the time, the warm-up, the growth of each quantity is its Theil-Sen slope "
        "(the median of the slopes of all pairs of samples) times the time judged. It may be 5 % of the median or a "
        "small fixed amount, whichever is more. The memory allowed is some hundred bytes for each run."
    )
    facts_table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return "\n".join(
        [
            f"<!-- Written by `{command}`. -->\n",
            "# Soak\n",
            f"A gateway under load for {minutes:.1f} minutes, seen {len(samples.times)} times. {said}\n",
            f"{done['runs']:,} runs in {done['sessions']:,} sessions that were made and deleted, "
            f"{done['approvals']:,} approvals decided, {done['subscribers']:,} clients and {done['streams']:,} streams "
            f"of server-sent events that came and went, {done['looks']:,} looks at lists and sums. "
            f"What went wrong: {errors}.\n",
            f"| | |\n|---|---|\n{facts_table}\n",
            judged + "\n",
            table(verdicts),
            f"![Each quantity over time]({picture})\n",
            *notes,
            "",
        ]
    )


async def soak(options: argparse.Namespace) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="corral-soak-", dir=options.dir) as name:
        folder = Path(name)
        facts = describe(folder).facts()
        async with Children(folder) as children, ModelServer(script) as model, aiohttp.ClientSession() as http:
            served = Served(children, f"http://127.0.0.1:{model.port}")  # type: ignore[arg-type]
            corral = await start_corral(children, folder / "data", served)
            load = Load(corral, workers=options.workers, pause=options.pause)
            samples = Samples(corral, folder / "data")
            work = asyncio.create_task(load.run())
            try:
                await _watch(samples, load, model, work, http, options)
            finally:
                work.cancel()
                await asyncio.wait([work])
            log = (folder / "corral-data.log").read_text(errors="replace")
    return _conclude(samples, load, facts, log, options)


async def _watch(
    samples: Samples,
    load: Load,
    model: ModelServer,
    work: asyncio.Task[None],
    http: aiohttp.ClientSession,
    options: argparse.Namespace,
) -> None:
    end = time.monotonic() + options.seconds
    said = 0.0
    while time.monotonic() < end and load.done["runs"] < options.runs and not work.done():
        await asyncio.sleep(options.every)
        await samples.take(http, load.done["runs"])
        model.requests.clear()  # what the model was asked is of no use here, and would fill this process
        if time.monotonic() - said > 60:
            said = time.monotonic()
            seen = ", ".join(f"{key} {values[-1]:,.4g}" for key, values in samples.values.items())
            print(f"{samples.times[-1] / 60:5.1f} min: {seen}", file=sys.stderr, flush=True)
    if work.done():
        await work


def _conclude(
    samples: Samples, load: Load, facts: Sequence[tuple[str, str]], log: str, options: argparse.Namespace
) -> int:
    command = f"python -m bench.soak --seconds {options.seconds:g} --report FILE"
    picture = options.report.with_suffix(".svg") if options.report is not None else Path("soak.svg")
    text = report(samples, load, facts, command, picture.name)
    print(text)
    if options.report is not None:
        options.report.write_text(text)
        verdicts = samples.verdicts()
        series = [(each, samples.values[name]) for each, name in zip(verdicts, QUANTITIES, strict=True)]
        picture.write_text(plot(samples.times, series))
    if options.json is not None:
        options.json.write_text(json.dumps({"times": samples.times, **samples.values}))
    # An error in the gateway's own log counts, whatever its clients saw.
    bad = [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
    for line in bad[:10]:
        print(f"the gateway's log: {line}", file=sys.stderr)
    growing = any(each.levels is False for each in samples.verdicts())
    return 1 if growing or bad or load.errors else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--runs", type=float, default=float("inf"), help="or until so many runs have ended")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--workers", type=int, default=6, help="sessions at work at once")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds that everybody waits between two acts")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the report there, the plot beside it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples there")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the store lies meanwhile [default: $TMPDIR]")
    options = parser.parse_args()
    try:
        return uvloop.run(soak(options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
