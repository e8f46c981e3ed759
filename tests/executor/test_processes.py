"""Whatever a call starts is dead when the call is over."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from corral.executor.launcher import GO_FD, STATUS_FD
from corral.executor.processes import Processes, Program
from corral.executor.service import Executor
from tests.executor.make import Bench, ReadyBench, processes_with, until
from tests.support import needs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WAYS_TO_LIVE_ON = {
    "plain": "sleep {m}",
    "background": "sleep {m} & wait",
    "ignores SIGTERM": "trap '' TERM HUP INT; while :; do sleep {m}; done",
    "new session": "setsid sleep {m} & wait",
    "double fork": "(setsid sh -c 'sleep {m} & exit' &) ; (sleep {m} &) ; sleep {m}",
    "own name and no environment": "env -i setsid /bin/sh -c '(/bin/sleep {m} &) ; exec /bin/sleep {m}'; sleep {m}",
    "holds the pipe": "(setsid sleep {m} >&1 2>&1 &) ; sleep {m}",
    "stopped": "sleep {m} & kill -STOP $!; wait",
}


@pytest.fixture(params=["sandbox", "ready", "host"])
async def place(request: pytest.FixtureRequest, bench: Bench) -> Bench:
    if request.param != "host":
        needs.bubblewrap()
    if request.param == "ready":
        return ReadyBench(bench.executor, bench.root)
    return bench.on(bash_mode=request.param)


@pytest.fixture
def marker() -> str:
    """A number of seconds that no other process sleeps for."""
    return f"{random.randint(10**6, 10**7)}.{uuid.uuid4().int % 10**12}"


@pytest.mark.parametrize("way", WAYS_TO_LIVE_ON)
async def test_nothing_lives_on_after_a_time_out(place: Bench, marker: str, way: str) -> None:
    outcome = await place.bash(WAYS_TO_LIVE_ON[way].format(m=marker), timeoutMs=400)
    assert processes_with(marker) == []
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.code == "LIMIT_REACHED"
    assert "400 ms" in outcome.error.message
    assert place.executor.leftover("run_1") == []


@pytest.mark.parametrize("way", WAYS_TO_LIVE_ON)
async def test_nothing_lives_when_cancellation_leaves(place: Bench, marker: str, way: str) -> None:
    task = asyncio.create_task(place.bash(WAYS_TO_LIVE_ON[way].format(m=marker)))
    await until(lambda: bool(processes_with(marker)), "the command runs")
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # a second one must not let go of the tree
    with pytest.raises(asyncio.CancelledError):
        await task
    assert processes_with(marker) == []


async def test_a_call_cancelled_at_any_moment_of_its_start_leaves_nothing(place: Bench, marker: str) -> None:
    for step in range(40):
        task = asyncio.create_task(place.bash(f"sleep {marker}"))
        await asyncio.sleep(step * 0.0007)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert processes_with(marker) == []


async def test_what_a_command_leaves_running_ends_with_it_and_does_not_hold_the_call(place: Bench, marker: str) -> None:
    outcome = await place.bash(f"(setsid sleep {marker} &); sleep {marker} & echo done")
    assert outcome.output == "done\n"
    assert outcome.status == "success"
    assert processes_with(marker) == []


async def test_a_command_on_the_host_that_kills_its_supervisor_is_a_failure_that_is_remembered(bench: Bench) -> None:
    outcome = await bench.on(bash_mode="host").bash("kill -9 $PPID; sleep 0.5")
    assert outcome.error is not None
    assert outcome.error.code == "TOOL_EXEC_FAILED"
    assert len(bench.executor.leftover("run_1")) == 1
    assert (await bench.on(bash_mode="host").bash("echo next")).output == "next\n"


async def test_parallel_calls_do_not_end_each_other(place: Bench, marker: str) -> None:
    long = asyncio.create_task(place.bash("sleep 1; echo long"))
    await asyncio.gather(*(place.bash(f"sleep {marker}", timeoutMs=100 + 20 * n) for n in range(5)))
    assert (await long).output == "long\n"


def test_a_call_survives_the_end_of_the_thread_that_started_the_fork_server(tmp_path: Path) -> None:
    needs.bubblewrap()

    async def main() -> str:
        loop = asyncio.get_running_loop()
        first = ThreadPoolExecutor()
        loop.set_default_executor(first)
        executor = Executor()
        bench = Bench(executor, tmp_path)
        await bench.bash("true")
        task = asyncio.create_task(bench.bash("sleep 1; echo alive"))
        await asyncio.sleep(0.2)
        loop.set_default_executor(ThreadPoolExecutor())
        first.shutdown()
        output = (await task).output
        await executor.close()
        return output

    assert asyncio.run(main()) == "alive\n"


GATEWAY = """
import asyncio, sys
from pathlib import Path
from corral.executor.service import Executor
from tests.executor.make import Bench

async def main():
    bench = Bench(Executor(), Path(sys.argv[1]), bash_mode=sys.argv[3])
    await bench.bash("true")
    print("ready", flush=True)
    await bench.bash(sys.argv[2])

asyncio.run(main())
"""


def start_gateway(root: Path, command: str, mode: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", GATEWAY, str(root), command, mode]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("mode", ["sandbox", "host"])
async def test_a_gateway_killed_with_9_at_any_moment_takes_its_commands_with_it(
    root: Path, marker: str, mode: str
) -> None:
    if mode == "sandbox":
        needs.bubblewrap()
    command = f"(setsid sleep {marker} &); trap '' TERM; sleep {marker}"
    for delay in (0.0, 0.002, 0.004, 0.006, 0.008, 0.011, 0.015, 0.1):
        gateway = start_gateway(root, command, mode)
        with gateway:
            assert gateway.stdout is not None
            assert await asyncio.to_thread(gateway.stdout.readline) == b"ready\n"
            if delay == 0.1:
                await until(lambda: len(processes_with(f"sleep\0{marker}")) == 2, "the command runs")
            await asyncio.sleep(delay)
            gateway.kill()
        # The line above is the gateway's own command line too; it is gone now.
        await until(lambda: processes_with(marker) == [], "nothing of the command is left", 5)


async def test_the_fork_server_ends_with_its_executor(bench: Bench) -> None:
    await bench.on(bash_mode="host").bash("true")
    server = bench.executor._drivers["local"]._processes._server  # type: ignore[attr-defined]
    await bench.executor.close()
    assert server.returncode == 0


async def test_closing_kills_what_still_runs(bench: Bench, marker: str) -> None:
    task = asyncio.create_task(bench.on(bash_mode="host").bash(f"setsid sleep {marker} & wait"))
    await until(lambda: bool(processes_with(marker)), "the command runs")
    await bench.executor.close()
    assert processes_with(marker) == []
    await task


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    made = Processes()
    yield made
    await made.close()


def program(*argv: str, **changes: object) -> Program:
    values = {"argv": list(argv), "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/"}
    return Program(**(values | changes))  # type: ignore[arg-type]


async def test_a_fork_server_that_was_killed_is_started_again(processes: Processes) -> None:
    await processes.run(program("true"), 5)
    assert processes._server is not None
    os.kill(processes._server.pid, signal.SIGKILL)
    await asyncio.to_thread(processes._server.wait)
    assert (await processes.run(program("true"), 5)).exit_status == 0


async def test_a_program_gets_its_three_descriptors_and_no_other(processes: Processes) -> None:
    spare = os.open("/", os.O_RDONLY)
    try:
        os.set_inheritable(spare, True)
        ended = await processes.run(program("sh", "-c", "ls /proc/$$/fd; readlink /proc/$$/fd/0"), 5)
    finally:
        os.close(spare)
    assert ended.stdout.text().split() == ["0", "1", "2", "/dev/null"]


async def test_a_program_starts_with_default_signals_in_a_session_of_its_own(processes: Processes) -> None:
    ended = await processes.run(
        program("sh", "-c", "grep -E 'Sig(Ign|Blk)' /proc/self/status; ps -o sid= -p $$; echo $$"), 5
    )
    ignored, blocked, session, pid = (line.split()[-1] for line in ended.stdout.text().splitlines())
    # Signals 1 to 31: the two after them belong to the C library and stay as they are.
    assert int(ignored, 16) & 0x7FFF_FFFF == 0
    assert int(blocked, 16) & 0x7FFF_FFFF == 0
    assert session == pid


async def test_the_status_is_as_a_shell_gives_it(processes: Processes) -> None:
    assert (await processes.run(program("sh", "-c", "exit 7"), 5)).exit_status == 7
    assert (await processes.run(program("sh", "-c", "kill -9 $$"), 5)).exit_status == 137


async def test_a_program_that_is_not_there_has_an_errno_and_no_status(processes: Processes) -> None:
    ended = await processes.run(program("no-such-program"), 5)
    assert (ended.exit_status, ended.errno) == (None, 2)


async def test_limits_hold(processes: Processes) -> None:
    ended = await processes.run(program("sh", "-c", "ulimit -c; ulimit -n", limits={"CORE": 0, "NOFILE": 64}), 5)
    assert ended.stdout.text().split() == ["0", "64"]


async def test_a_flood_of_output_neither_blocks_the_program_nor_grows_the_memory(processes: Processes) -> None:
    ended = await processes.run(program("sh", "-c", "yes | head -c 30000000; echo end >&2"), 60)
    assert ended.exit_status == 0
    assert len(ended.stdout.text()) < 9_000_000
    assert "bytes were not kept" in ended.stdout.text()
    assert ended.stdout.text().endswith("y\n")


async def test_the_loop_goes_on_while_programs_start(processes: Processes) -> None:
    await processes.run(program("true"), 5)
    worst = 0.0
    running = asyncio.gather(*(processes.run(program("true"), 20) for _ in range(50)))
    loop = asyncio.get_running_loop()
    while not running.done():
        before = loop.time()
        await asyncio.sleep(0.001)
        worst = max(worst, loop.time() - before)
    await running
    assert worst < 0.5


async def test_no_descriptor_is_lost(processes: Processes) -> None:
    await processes.run(program("true"), 5)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await processes.run(program("true"), 5)
        await processes.run(program("sleep", "60"), 0.01)
        await processes.run(program("no-such-program"), 5)
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_handshakes_descriptors_follow_the_standard_ones() -> None:
    assert (STATUS_FD, GO_FD) == (3, 4)
