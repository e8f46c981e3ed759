"""A tool call in the sandbox against the same command without one."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from bench.numbers import Numbers
from bench.stats import Row
from corral.executor.api import Call, CallContext
from corral.executor.service import Executor

_COMMAND = "echo done"


class NoSandbox(Exception):
    """The sandbox does not run here."""


async def measure(folder: Path, numbers: Numbers) -> list[Row]:
    """Raises NoSandbox where there is none."""
    root = folder / "workspace"
    root.mkdir()
    bare_name = f"`bash -c '{_COMMAND}'` by subprocess.run"
    sandboxed = Row("a bash.exec call in the sandbox", "ms", bare_name, note="Through the executor, bubblewrap inside.")
    on_host = Row(
        "a bash.exec call on the host", "ms", bare_name, note="What the executor itself costs (bashMode host)."
    )
    executor = Executor()
    try:
        for _ in range(3):
            await _call(executor, root, "sandbox")
            await _call(executor, root, "host")
        for _ in range(numbers.tool_rounds):
            ours = await _call(executor, root, "sandbox")
            sandboxed.add(ours, _bare(root))
            ours = await _call(executor, root, "host")
            on_host.add(ours, _bare(root))
    finally:
        await executor.close()
    return [sandboxed, on_host]


async def _call(executor: Executor, root: Path, mode: str) -> float:
    context = CallContext(
        tenant_id="t_1",
        workspace_id="w_1",
        session_id="s_1",
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
