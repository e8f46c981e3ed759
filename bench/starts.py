"""How long it takes to be there, and how much memory it takes then."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import aiohttp

from bench.children import ROOT, Children, Served, start_bare, start_corral
from bench.machine import resident_kib
from bench.numbers import Numbers
from bench.stats import Row, Target


async def measure(children: Children, folder: Path, numbers: Numbers) -> list[Row]:
    server = "a bare aiohttp server on uvloop"
    first = Row("start to `listening`, new data directory", "ms", server, note="Makes the database.")
    again = Row("start to `listening`, again", "ms", server, target=Target(1000, at_most=True, absolute=True))
    ready = Row("start to ready, again", "ms", server, note="To the first 200 of /readyz.")
    memory = Row("resident memory when ready", "MiB", server, target=Target(90, at_most=True, absolute=True))
    async with aiohttp.ClientSession() as http:
        for number in range(numbers.start_rounds):
            data_dir = folder / f"start-{number}"
            begin = time.perf_counter()
            corral = await start_corral(children, data_dir)
            made = time.perf_counter() - begin
            await _ready(http, corral)
            await children.end(corral.child)

            begin = time.perf_counter()
            corral = await start_corral(children, data_dir)
            listening = time.perf_counter() - begin
            await _ready(http, corral)
            answered = time.perf_counter() - begin
            resident = resident_kib(corral.child.pid) / 1024

            begin = time.perf_counter()
            bare = await start_bare(children)
            limit = time.perf_counter() - begin
            await _ready(http, bare)
            limit_ready = time.perf_counter() - begin
            first.add(made * 1000, limit * 1000)
            again.add(listening * 1000, limit * 1000)
            ready.add(answered * 1000, limit_ready * 1000)
            memory.add(resident, resident_kib(bare.child.pid) / 1024)
            await children.end(corral.child, bare.child)
    return [first, again, ready, memory, await asyncio.to_thread(_help, numbers.start_rounds)]


async def _ready(http: aiohttp.ClientSession, server: Served) -> None:
    async with asyncio.timeout(30):
        while True:
            async with http.get(f"{server.url}/readyz") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.002)


def _help(rounds: int) -> Row:
    row = Row("`corral --help`", "ms", "`python -c pass`", target=Target(250, at_most=True, absolute=True))
    for _ in range(rounds):
        row.add(_timed(["-m", "corral", "--help"]), _timed(["-c", "pass"]))
    return row


def _timed(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, cwd=ROOT, check=True, timeout=60)
    return (time.perf_counter() - begin) * 1000
