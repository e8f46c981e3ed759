"""`python -m bench.recovery`: how long a start takes to take up the runs that a killed gateway left.

All runs are in the middle of a model's answer when their gateway is killed with SIGKILL. The clock starts
with the next gateway's process and stops when the last run's `agent.resumed` is in its journal on the disk. The
processor time that the gateway has used by then is told too: it says more where others use the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import uvloop

from bench.children import ChildFailed, Children, Corral, Served, start_corral, start_model
from bench.machine import describe
from bench.wire import run_frame

PATIENCE_S = 120.0
_AT_ONCE = 32


async def recover(folder: Path, runs: int) -> tuple[float, float, float]:
    """Seconds from the start of the process to `listening`, and to the last run's `agent.resumed`; and of processor."""
    async with Children(folder) as children:
        model = await start_model(children)
        env = {"CORRAL_MAX_ACTIVE_RUNS": str(runs)}
        data_dir = folder / "recovery"
        corral = await start_corral(children, data_dir, model, env)
        await _run_all(corral, runs)
        await _asked(model, runs)
        corral.child.kill()
        await children.end(corral.child)

        begin = time.perf_counter()
        corral = await start_corral(children, data_dir, model, env)
        listening = time.perf_counter() - begin
        while await asyncio.to_thread(_resumed, data_dir / "corral.db") < runs:
            if time.perf_counter() - begin > PATIENCE_S:
                raise ChildFailed(f"not all of {runs} runs were taken up within {PATIENCE_S:g} s")
            await asyncio.sleep(0.02)
        return listening, time.perf_counter() - begin, _processor_s(corral.child.pid)


def _processor_s(pid: int) -> float:
    """Seconds that the process has used, in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _run_all(corral: Corral, runs: int) -> None:
    places = asyncio.Semaphore(_AT_ONCE)
    headers = {"Authorization": f"Bearer {corral.token}", "Content-Type": "application/json"}

    async def run(http: aiohttp.ClientSession, number: int) -> None:
        async with places:
            body = run_frame(f"s{number}", hang=1)
            async with http.post(f"{corral.url}/rpc", data=body, headers=headers) as response:
                answer = await response.json()
                if not answer["response"]["ok"]:
                    raise ChildFailed(f"a run was refused: {answer['response']['error']}")

    async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
        for number in range(runs):
            tasks.create_task(run(http, number))


async def _asked(model: Served, runs: int) -> None:
    """Until the model is in the middle of answering all of them."""
    async with aiohttp.ClientSession() as http, asyncio.timeout(PATIENCE_S):
        while True:
            async with http.get(f"{model.url}/_state") as response:
                if len((await response.json())["requests"]) >= runs:
                    return
            await asyncio.sleep(0.2)


def _resumed(database: Path) -> int:
    """How many runs have their `agent.resumed` on the disk."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)
    try:
        row = connection.execute("SELECT count(*) FROM journal WHERE event = 'agent.resumed'").fetchone()
        return int(row[0])
    finally:
        connection.close()


async def _main(runs: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="corral-recovery-") as name:
        machine = describe(Path(name))
        print(
            f"{machine.cpu}, {machine.cores} cores, stores on {machine.disk}, load before {machine.load:.1f}",
            flush=True,
        )
        for number in range(rounds):
            folder = Path(name, str(number))
            await asyncio.to_thread(folder.mkdir)
            listening, resumed, used = await recover(folder, runs)
            print(
                f"{runs} runs: listening after {listening:.2f} s, all taken up after {resumed:.2f} s; "
                f"{used:.2f} s of processor",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    try:
        uvloop.run(_main(options.runs, options.rounds))
    except ChildFailed as error:
        sys.exit(f"bench.recovery: {error}")
