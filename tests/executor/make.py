"""What the executor's tests make their calls with."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corral.executor.api import Call, CallContext, ToolOutcome
from corral.executor.local import LocalDriver
from corral.executor.processes import Prepared
from corral.executor.service import Executor


def context(root: Path, **changes: Any) -> CallContext:
    values: dict[str, Any] = {
        "tenant_id": "t_1",
        "workspace_id": "w_1",
        "session_id": "s_1",
        "run_id": "run_1",
        "root": root,
        "runtime_mode": "local",
        "bash_mode": "sandbox",
        "bash_network": "none",
        "timeout_ms": 20_000,
    }
    return CallContext(**(values | changes))


class Bench:
    """Runs calls on an executor in one folder."""

    def __init__(self, executor: Executor, root: Path, **changes: Any) -> None:
        self.executor = executor
        self.root = root
        self.changes = changes

    def on(self, **changes: Any) -> Bench:
        """The same with another context."""
        return Bench(self.executor, self.root, **(self.changes | changes))

    async def call(self, tool_name: str, **args: Any) -> ToolOutcome:
        call = Call(id="tc_1", tool_name=tool_name, args=args)
        return await self.executor.execute(call, context(self.root, **self.changes))

    async def bash(self, command: str, **args: Any) -> ToolOutcome:
        return await self.call("bash.exec", command=command, **args)


class ReadyBench(Bench):
    """Gives each command a session of its own, with a sandbox that was made ready for it and is then used."""

    def on(self, **changes: Any) -> Bench:
        kind = Bench if changes.get("bash_mode") == "host" else ReadyBench
        return kind(self.executor, self.root, **(self.changes | changes))

    async def bash(self, command: str, **args: Any) -> ToolOutcome:
        bench = Bench(self.executor, self.root, **(self.changes | {"session_id": f"s_{uuid.uuid4().hex}"}))
        prepared = await make_ready(bench)
        try:
            return await bench.bash(command, **args)
        finally:
            assert prepared not in local_driver(self.executor)._processes._prepared


def local_driver(executor: Executor) -> LocalDriver:
    driver = executor._drivers["local"]
    assert isinstance(driver, LocalDriver)
    return driver


async def make_ready(bench: Bench) -> Prepared:
    """Have a sandbox made ready for the next command of the session, as the end of one does."""
    ready, about = local_driver(bench.executor)._ready, context(bench.root, **bench.changes)
    ready.prepare(["bash", "--noprofile", "--norc", "-c", "--"], about)  # as `LocalDriver` starts one
    waiting = ready._waiting[about.tenant_id, about.session_id]
    await until(lambda: waiting.prepared is not None, "a sandbox is ready")
    assert waiting.prepared is not None
    return waiting.prepared


def processes_with(marker: str) -> list[int]:
    """Ids of all processes whose command line holds `marker`; zombies have none."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = Path("/proc", entry, "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in line:
                found.append(int(entry))
    return found


async def until(condition: Callable[[], bool], what: str, seconds: float = 15) -> None:
    """Wait until `condition` holds; fail if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        await asyncio.sleep(0.01)
