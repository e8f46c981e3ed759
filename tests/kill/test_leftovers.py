"""Commands that a dead gateway left running are found and ended before the next one takes their runs up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from corral.executor.leftovers import VARIABLE, end_leftovers, mark_for
from tests.executor.make import processes_with, until
from tests.executor.test_processes import marker as marker  # a fixture
from tests.support import needs
from tests.support.gateway import Gateway
from tests.support.model_server import CallTools, ModelServer, Say, conversation
from tests.support.wire import Wire

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

STUBBORN = (
    "trap '' TERM HUP INT; env -i setsid /bin/sh -c '(/bin/sleep {m} &) ; exec /bin/sleep {m}' & "
    "(setsid sleep {m} >&1 2>&1 &) ; sleep {m} & wait; sleep {m}"
)
"""Ignores SIGTERM, forks twice, leaves its session, clears its environment, holds the pipe."""


def below(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


def launchers(gateway: Gateway) -> list[int]:
    """The fork server and its supervisors."""
    servers = [pid for pid in below(gateway.process.pid) if b"launcher.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return servers + [supervisor for server in servers for supervisor in below(server)]


@pytest.mark.parametrize(
    ("mode", "supervisors", "then"),
    [
        ("host", "stopped", "aborts"),
        ("host", "killed", "waits"),
        ("sandbox", "stopped", "waits"),
        ("sandbox", "killed", "waits"),
    ],
)
async def test_no_command_of_a_runs_former_life_goes_on_beside_it(
    tmp_path: Path, marker: str, mode: str, supervisors: str, then: str
) -> None:
    needs.bubblewrap()
    command = (
        STUBBORN if (mode, supervisors) != ("host", "killed") else "trap '' TERM; (setsid sleep {m} &) ; sleep {m}"
    )
    script = conversation([CallTools([("bash_exec", {"command": command.format(m=marker)})]), Say("I see.")])
    async with ModelServer(script) as model:
        env = {"CORRAL_MODEL": "openai-chat:test", "OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k"}
        async with Gateway(tmp_path / "data", env) as gateway:
            async with await Wire.open(gateway.url) as wire:
                await wire.connect(gateway.token())
                await wire.effect("policy.update", patch={"bashMode": mode, "tools": {"bash.exec": "allow"}})
                run = await wire.effect("agent.run", input="go", sessionId="s1")
                await until(lambda: len(processes_with(f"sleep\0{marker}")) >= 2, "the command runs", 60)
                gone = launchers(gateway)
                assert len(gone) >= 2
                for pid in gone:
                    os.kill(pid, signal.SIGSTOP)  # none of them sees the gateway's end
                await gateway.kill()
            if supervisors == "killed":
                for pid in gone:
                    os.kill(pid, signal.SIGKILL)
            if (mode, supervisors) != ("sandbox", "killed"):
                assert processes_with(f"sleep\0{marker}")  # else the kernel has ended it
            await gateway.start()
            async with await Wire.open(gateway.url) as wire:
                await wire.connect(gateway.token())
                if then == "aborts":
                    # As early as anybody can: nothing may have looked for leftovers yet.
                    assert (await wire.effect("agent.abort", runId=run["runId"]))["status"] == "aborted"
                    assert processes_with(marker) == []
                else:
                    await wire.request("events.subscribe", {"sessionId": "s1", "after": 0})
                    await wire.event("agent.resumed", timeout=60)
                    assert processes_with(marker) == []
                    await wire.event("agent.tool_result", status="interrupted", timeout=60)
                    await wire.event("agent.completed", timeout=60)
            if (mode, supervisors) != ("sandbox", "killed"):
                assert "dead gateway" in gateway.log


def sleeper(marker: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", marker], env={**os.environ, **env})


def test_nothing_is_ended_that_does_not_bear_the_mark(marker: str) -> None:
    mark = f"corral-{marker}"
    others = [
        sleeper(marker),
        sleeper(marker, **{VARIABLE: "corral-another"}),
        sleeper(marker, **{VARIABLE: f"{mark}x"}),
        sleeper(marker, OTHER=f"{VARIABLE}={mark}"),
        # Somebody who looks for the mark has it in the command line too.
        subprocess.Popen(["sh", "-c", f"sleep {marker}; :", "launcher.py", "0", mark]),
    ]
    ours = [sleeper(marker, **{VARIABLE: mark})]
    try:
        ended, left = end_leftovers(mark)
        assert [entry.partition(":")[0] for entry in ended] == [str(process.pid) for process in ours]
        assert left == []
        assert ours[0].wait(20) == -signal.SIGKILL
        assert [process.poll() for process in others] == [None] * len(others)
    finally:
        for process in [*others, *ours]:
            subprocess.run(["pkill", "-9", "-P", str(process.pid)], check=False)
            process.kill()
            process.wait()


def test_the_mark_is_the_directorys_own(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    marks = {mark_for(first, b"k" * 32), mark_for(second, b"k" * 32), mark_for(first, b"l" * 32)}
    assert len(marks) == 3
    assert mark_for(first, b"k" * 32) in marks


async def test_a_clean_start_finds_nothing_to_end(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "data")
    async with gateway:
        await gateway.kill()
    async with gateway, await Wire.open(gateway.url) as wire:
        await wire.connect(gateway.token())
        assert "dead gateway" not in gateway.log
