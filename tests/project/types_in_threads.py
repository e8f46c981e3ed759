"""A gateway at work, in a process of its own: which types msgspec looks through first in which thread.

Prints a line `THREAD CLASS` for each. Usage: python -m tests.project.types_in_threads FOLDER
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec._utils as utils

_look = utils._get_class_mro_and_typevar_mappings  # type: ignore[attr-defined]


def _looking(obj: Any) -> Any:
    """Called by msgspec once for each class, when it is first decoded, converted to, or made a decoder of."""
    thread = "main" if threading.current_thread() is threading.main_thread() else threading.current_thread().name
    print(thread, getattr(obj, "__qualname__", obj))  # noqa: T201
    return _look(obj)


utils._get_class_mro_and_typevar_mappings = _looking  # type: ignore[attr-defined]

from tests.core.conftest import allow  # noqa: E402 - what is imported before is not seen
from tests.support.house import House, house  # noqa: E402
from tests.support.model_server import CallTools, Hang, Say, conversation, script_for  # noqa: E402
from tests.support.wire import Wire  # noqa: E402

STEPS = [CallTools([("file_write", {"path": "a", "content": "one"}), ("file_list", {})]), Say("done")]
SCRIPT = script_for({"hang": [Hang(after=2)], "fail": [CallTools([("nothing", {})]), Say("")], "": conversation(STEPS)})
RULE = {"id": "r", "tools": ["bash.exec"], "when": "shell.simple", "action": "deny"}


async def main(folder: Path) -> None:
    async with house(folder, script=SCRIPT) as home, await home.wire() as wire:
        await allow(home, {"tools": {"file.write": "approval-required"}, "rules": [RULE]})
        run = await wire.effect("agent.run", input="ask", sessionId="s1", limits={"maxSteps": 20})
        approval = (await wire.event("approval.required", runId=run["runId"]))["payload"]
        args = {"path": "b", "content": "two"}
        await wire.effect(
            "approval.resolve", approvalId=approval["approvalId"], decision="approve", args=args, remember="session"
        )
        await wire.event("agent.completed", runId=run["runId"])
        await _all_else(home, wire, run["runId"])
        await wire.effect("agent.run", input="hang", sessionId="s2")
        await wire.event("agent.delta", sessionId="s2")
    async with house(folder, script=SCRIPT) as home, await home.wire() as wire:
        await wire.request("events.subscribe", {"sessionId": "s2", "after": 0})
        resumed = (await wire.event("agent.resumed"))["payload"]
        await wire.effect("agent.abort", runId=resumed["runId"])
        assert (await wire.request("runs.get", {"runId": resumed["runId"]}))["run"]["error"]["code"] == "ABORTED"


async def _all_else(home: House, wire: Wire, run_id: str) -> None:
    """Whatever else is read or written through types."""
    for method in ("agents.list", "grants.list", "sessions.list", "audit.query", "audit.verify", "metrics.summary"):
        await wire.request(method, {})
    for method in ("policy.get", "approval.queue", "tokens.list"):
        await wire.request(method, {})
    await wire.request("policy.explain", {"toolName": "bash.exec", "args": {"command": "ls"}})
    await wire.request("runs.get", {"runId": run_id})
    await wire.request("sessions.history", {"sessionId": "s1"})
    await wire.effect("sessions.update", sessionId="s1", title="new")
    await wire.effect("runtime.setMode", sessionId="s1", runtimeMode="local")
    await wire.effect("agents.upsert", agent={"id": "a_2", "tools": ["file.read"]})
    await wire.effect("tokens.create", roles=["member"])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
