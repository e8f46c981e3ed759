"""A sandbox that was made ready is used once, for the call that it was made for, or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from corral.executor import sandbox
from corral.executor.launcher import HELD_FD
from corral.executor.processes import HELD_BYTES, Prepared, Processes
from corral.executor.ready import ReadySandboxes
from corral.executor.service import Executor
from tests.executor.make import Bench, context, local_driver, make_ready, processes_with, until
from tests.support import needs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs bubblewrap")


@pytest.fixture(autouse=True)
def _bubblewrap() -> None:
    needs.bubblewrap()


def waits(bench: Bench, prepared: Prepared) -> bool:
    """Whether it still waits for a command."""
    return prepared in local_driver(bench.executor)._processes._prepared


def supervisor_of(prepared: Prepared) -> int:
    """The process at the other end of its control socket: the parent of its bubblewrap."""
    inode = os.fstat(prepared.supervised.stdout).st_ino
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path("/proc", entry, "exe").readlink().name != "bwrap":
                continue
            if os.stat(f"/proc/{entry}/fd/1").st_ino == inode:
                parent = int(Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()[1])
                if Path("/proc", str(parent), "exe").readlink().name != "bwrap":
                    return parent
        except OSError:
            continue
    raise AssertionError("there is no bubblewrap that writes to it")


def readers(root: Path) -> list[int]:
    """The shells that wait for a command to become, in sandboxes for this folder."""
    return [pid for pid in processes_with("read -r -d") if _comm(pid) == "bash" and _works_in(pid, root)]


def _works_in(pid: int, root: Path) -> bool:
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/cwd"), root.stat())
    except OSError:
        return False


async def test_the_end_of_a_command_makes_the_next_ones_sandbox_ready(bench: Bench) -> None:
    assert (await bench.bash("echo one")).output == "one\n"
    ready = local_driver(bench.executor)._ready
    [waiting] = ready._waiting.values()
    await until(lambda: waiting.prepared is not None, "a sandbox is ready")
    assert waiting.prepared is not None
    assert (await bench.bash("echo two")).output == "two\n"
    assert not waits(bench, waiting.prepared)


async def test_every_character_of_the_command_arrives(bench: Bench) -> None:
    odd = "".join(chr(code) for code in range(1, 0x180) if chr(code) != "'") + "\u2028\U0001f600 \\ $HOME \r\n\n"
    prepared = await make_ready(bench)
    assert (await bench.bash(f"printf %s '{odd}'\n\n")).output == odd
    assert not waits(bench, prepared)


async def test_a_command_that_is_too_long_runs_in_a_sandbox_of_its_own(bench: Bench) -> None:
    prepared = await make_ready(bench)
    assert (await bench.bash(f"echo {'x' * HELD_BYTES}")).output == "x" * HELD_BYTES + "\n"
    assert waits(bench, prepared)
    assert (await bench.bash(f"echo {'y' * (HELD_BYTES - 6)}")).output == "y" * (HELD_BYTES - 6) + "\n"
    assert not waits(bench, prepared)


def test_half_a_command_is_not_run() -> None:
    script = sandbox._HELD.replace(str(HELD_FD), "0")
    argv = ["bash", "-c", script, "bash", "bash", "-c", "--"]
    assert subprocess.run(argv, input=b"echo ran", capture_output=True).stdout == b""
    assert subprocess.run(argv, input=b"echo ran\0", capture_output=True).stdout == b"ran\n"


async def test_only_the_session_it_was_made_for_uses_it(bench: Bench) -> None:
    prepared = await make_ready(bench)
    for other in (bench.on(session_id="s_2"), bench.on(tenant_id="t_2")):
        assert (await other.bash("echo fine")).output == "fine\n"
        assert waits(bench, prepared)


async def test_another_network_ends_it(bench: Bench) -> None:
    prepared = await make_ready(bench.on(bash_network="host"))
    # With the host's network there would be more than the loopback device.
    assert (await bench.bash("ls /sys/class/net 2>&1; wc -l < /proc/net/dev")).output.split()[-1] == "3"
    assert not waits(bench, prepared)
    assert local_driver(bench.executor)._ready._waiting["t_1", "s_1"].prepared is not prepared


async def test_another_folder_ends_it_also_at_the_same_path(bench: Bench) -> None:
    prepared = await make_ready(bench)
    await until(lambda: bool(readers(bench.root)), "it shows the folder that is there now")
    bench.root.rename(bench.root.with_name("before"))
    bench.root.mkdir()
    assert (await bench.bash("touch here")).status == "success"
    assert (bench.root / "here").exists()
    assert not waits(bench, prepared)
    other = bench.root.with_name("other")
    other.mkdir()
    prepared = await make_ready(bench)
    moved = Bench(bench.executor, other)
    assert (await moved.bash("pwd")).output == f"{other}\n"
    assert not waits(bench, prepared)


async def test_a_file_of_the_system_that_was_replaced_ends_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, new = tmp_path / "shown", tmp_path / "new"
    shown.write_text("1")
    monkeypatch.setattr(sandbox, "_ETC", (str(shown),))
    processes = local_driver(bench.executor)._processes
    ended: list[Prepared] = []

    async def discard(prepared: Prepared) -> None:
        ended.append(prepared)
        await Processes.discard(processes, prepared)

    monkeypatch.setattr(processes, "discard", discard)
    await make_ready(bench)
    assert (await bench.bash("true")).status == "success"
    assert ended == []
    prepared = await make_ready(bench)
    new.write_text("2")
    new.replace(shown)
    assert (await bench.bash("true")).status == "success"
    assert ended == [prepared]


async def test_one_that_died_while_it_waited_costs_nothing_but_time(bench: Bench) -> None:
    prepared = await make_ready(bench)
    await until(lambda: _supervised(prepared), "bubblewrap is there")
    os.kill(supervisor_of(prepared), signal.SIGKILL)
    await until(lambda: not prepared.waiting, "the supervisor is gone")
    outcome = await bench.bash("echo ran >> effects; echo fine")
    assert outcome.output == "fine\n"
    assert (bench.root / "effects").read_text() == "ran\n"


def _supervised(prepared: Prepared) -> bool:
    try:
        supervisor_of(prepared)
    except AssertionError:
        return False
    return True


async def test_one_whose_sandbox_ended_before_it_had_the_command_has_not_run_it(bench: Bench) -> None:
    prepared = await make_ready(bench)
    await until(lambda: bool(readers(bench.root)), "it is set up")
    supervisor = supervisor_of(prepared)
    # Stopped, it cannot notice that its sandbox dies, nor hand the command over before it has died.
    os.kill(supervisor, signal.SIGSTOP)
    try:
        [bwrap] = _children(supervisor)
        inner = _children(bwrap)
        os.kill(bwrap, signal.SIGKILL)
        await until(lambda: all(_state(pid) == b"Z" for pid in inner), "the sandbox is dead")
        call = asyncio.create_task(bench.bash("echo ran >> effects; echo fine"))
        await until(lambda: not waits(bench, prepared), "the call has taken it")
    finally:
        os.kill(supervisor, signal.SIGCONT)
    assert (await call).output == "fine\n"
    assert (bench.root / "effects").read_text() == "ran\n"


async def test_a_command_whose_supervisor_dies_is_a_failure_and_is_not_run_again(bench: Bench) -> None:
    prepared = await make_ready(bench)
    await until(lambda: _supervised(prepared), "bubblewrap is there")
    supervisor = supervisor_of(prepared)
    call = asyncio.create_task(bench.bash("echo ran >> effects; sleep 30.125"))
    effects = bench.root / "effects"
    await until(lambda: effects.exists() and effects.read_text() == "ran\n", "the command has had its effect")
    os.kill(supervisor, signal.SIGKILL)
    outcome = await call
    assert outcome.error is not None
    assert outcome.error.code == "TOOL_EXEC_FAILED"
    assert effects.read_text() == "ran\n"
    await until(lambda: not processes_with("sleep\x0030.125"), "the command is dead")


@pytest.mark.parametrize("ready", [False, True], ids=["fresh", "made ready"])
async def test_nobody_says_that_nothing_ran_when_bubblewrap_was_killed(bench: Bench, ready: bool) -> None:
    if ready:
        await make_ready(bench)
    call = asyncio.create_task(bench.bash("echo ran > effects; sleep 30.25"))
    await until(lambda: (bench.root / "effects").exists(), "the command runs")
    await until(lambda: bool(processes_with("sleep\x0030.25")), "the command is about to end in that")
    [sleep] = processes_with("sleep\x0030.25")
    inner = _parent(sleep)
    os.kill(_parent(inner), signal.SIGKILL)
    outcome = await call
    assert outcome.error is not None
    assert outcome.error.code == "TOOL_EXEC_FAILED"


async def test_what_bash_says_before_the_command_is_not_said_twice(root: Path) -> None:
    executor = Executor(environ={"PATH": os.environ["PATH"], "LC_ALL": "xx_YY.UTF-8"})
    try:
        bench = Bench(executor, root)
        fresh = await bench.on(session_id="s_fresh").bash("echo fine")
        assert "xx_YY" in fresh.output
        await make_ready(bench)
        # One for each of the two sessions.
        await until(lambda: [_state(pid) for pid in readers(root)] == [b"S", b"S"], "bash waits")
        assert (await bench.bash("echo fine")).output == fresh.output
    finally:
        await executor.close()


async def test_at_most_so_many_wait_and_the_oldest_ends_first(bench: Bench) -> None:
    driver = local_driver(bench.executor)
    ready = ReadySandboxes(driver._processes, driver._sandbox, limit=2)
    shell = ["bash", "-c", "--"]
    for number in range(4):
        ready.prepare(shell, context(bench.root, session_id=f"s_{number}"))
    assert [session for _, session in ready._waiting] == ["s_2", "s_3"]
    await until(lambda: not ready._work, "those too many have ended")
    assert len(driver._processes._prepared) == 2
    await ready.close()
    assert not driver._processes._prepared


async def test_one_that_nobody_uses_ends_after_a_while(bench: Bench) -> None:
    driver = local_driver(bench.executor)
    ready = ReadySandboxes(driver._processes, driver._sandbox, idle_s=0.01)
    ready.prepare(["bash", "-c", "--"], context(bench.root))
    [waiting] = ready._waiting.values()
    await until(lambda: waiting.prepared is not None and not len(ready) and not ready._work, "it has ended")
    assert not driver._processes._prepared
    await ready.close()


async def test_the_end_of_the_executor_ends_those_that_wait(bench: Bench) -> None:
    await make_ready(bench)
    await until(lambda: bool(processes_with(str(bench.root))), "bubblewrap is there")
    await bench.executor.close()
    assert processes_with(str(bench.root)) == []


GATEWAY = """
import asyncio, sys
from pathlib import Path
from corral.executor.service import Executor
from tests.executor.make import Bench, make_ready

async def main():
    bench = Bench(Executor(), Path(sys.argv[1]))
    await make_ready(bench)
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def start_gateway(root: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", GATEWAY, str(root)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])


async def test_a_gateway_killed_with_9_leaves_none_waiting(root: Path) -> None:
    for delay in (0.0, 0.004, 0.1):
        with start_gateway(root) as gateway:
            assert gateway.stdout is not None
            assert await asyncio.to_thread(gateway.stdout.readline) == b"ready\n"
            await asyncio.sleep(delay)
            gateway.kill()
        await until(lambda: processes_with(str(root)) == [], "nothing waits any more")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path("/proc", str(pid), "task", str(pid), "children").read_text().split()]


def _parent(pid: int) -> int:
    return int(Path("/proc", str(pid), "stat").read_bytes().rpartition(b")")[2].split()[1])


def _state(pid: int) -> bytes:
    """`S` for one that sleeps; `Z` also for one that is gone."""
    try:
        return Path("/proc", str(pid), "stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return b"Z"


def _comm(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "comm").read_text().strip()
    except OSError:
        return ""
