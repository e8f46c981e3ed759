"""A tool call in the sandbox against the same command without one."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from pathlib import Path

from bench.numbers import Numbers
from bench.stats import Row, Target
from corral.executor.api import Call, CallContext
from corral.executor.service import Executor

_COMMAND = "echo done"
_BETWEEN_S = 0.1


class NoSandbox(Exception):
    """The sandbox does not run here."""


async def measure(folder: Path, numbers: Numbers) -> list[Row]:
    """Raises NoSandbox where there is none."""
    root = folder / "workspace"
    root.mkdir()
    bare_name = f"`bash -c '{_COMMAND}'` by subprocess.run"
    ready = Row(
        "a bash.exec call in a sandbox made ready",
        "ms",
        bare_name,
        target=Target(5, at_most=True),
        note="As all of a session have but its first: the sandbox was set up since the call before.",
    )
    sandboxed = Row(
        "a bash.exec call in a fresh sandbox",
        "ms",
        bare_name,
        note="As the first of a session has: bubblewrap and all.",
    )
    on_host = Row(
        "a bash.exec call on the host", "ms", bare_name, note="What the executor itself costs (bashMode host)."
    )
    executor = Executor()
    try:
        for _ in range(3):
            await _call(executor, root, "sandbox")
            await _call(executor, root, "host")
        for number in range(numbers.tool_rounds):
            # A model thinks longer than this. What is set up meanwhile is not to take part in what is measured next.
            await asyncio.sleep(_BETWEEN_S)
            ours = await _call(executor, root, "sandbox")
            await asyncio.sleep(_BETWEEN_S)
            ready.add(ours, _bare(root))
            ours = await _call(executor, root, "sandbox", f"s_fresh_{number}")
            await asyncio.sleep(_BETWEEN_S)
            sandboxed.add(ours, _bare(root))
            ours = await _call(executor, root, "host")
            on_host.add(ours, _bare(root))
    finally:
        await executor.close()
    return [ready, sandboxed, on_host]


async def _call(executor: Executor, root: Path, mode: str, session_id: str = "s_1") -> float:
    context = CallContext(
        tenant_id="t_1",
        workspace_id="w_1",
        session_id=session_id,
        run_id="run_1",
        root=root,
        runtime_mode="local",
        bash_mode=mode,  # type: ignore[arg-type]
        bash_network="none",
        timeout_ms=20_000,
    )
    call = Call(id="tc_1", tool_name="bash.exec", args={"command": _COMMAND})
    begin = time.perf_counter()
    outcome = await executor.execute(call, context)
    taken = (time.perf_counter() - begin) * 1000
    if outcome.output != "done\n":
        raise NoSandbox(outcome.output.strip() or str(outcome.error))
    return taken


def _bare(root: Path) -> float:
    shell = shutil.which("bash") or "/bin/sh"
    begin = time.perf_counter()
    subprocess.run([shell, "-c", _COMMAND], capture_output=True, cwd=root, check=True, timeout=20)
    return (time.perf_counter() - begin) * 1000
