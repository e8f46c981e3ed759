"""What the executor's tests make their calls with."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corral.executor.api import Call, CallContext, ToolOutcome
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
