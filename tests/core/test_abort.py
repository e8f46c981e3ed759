"""Ending a run from outside."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from tests.core.conftest import OPEN_TOOLS, Open
from tests.core.test_run import workspace
from tests.executor.make import until
from tests.executor.test_processes import marker as marker  # a fixture
from tests.support import needs
from tests.support.callers import OWNER
from tests.support.clocks import Later
from tests.support.house import House
from tests.support.model_server import CallTools, Hang, Say, conversation
from tests.support.wire import Wire


def alive(mark: str) -> list[int]:
    """Processes whose command line holds the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(pid)
    return found


async def until_exists(path: Path) -> None:
    async with asyncio.timeout(60):
        while not path.exists():  # noqa: ASYNC110 - a file of another process tells nobody
            await asyncio.sleep(0.01)


async def until_dead(mark: str) -> None:
    async with asyncio.timeout(60):
        while alive(mark):  # noqa: ASYNC110 - processes of others tell nobody when they end
            await asyncio.sleep(0.01)


async def tool_run_on(home: House, wire: Wire, session: str = "s1") -> str:
    run = await wire.effect("agent.run", input="go", sessionId=session)
    await until_exists(workspace(home) / "started")
    return str(run["runId"])


STUBBORN = (
    "trap '' TERM INT HUP; (setsid sleep {m} &) ; sleep {m} & (setsid sleep {m} >&1 2>&1 &) ; "
    "env -i setsid /bin/sh -c '(/bin/sleep {m} &) ; exec /bin/sleep {m}' & "
    "touch started; while :; do sleep {m}; done"
)
"""Ignores SIGTERM, forks twice, leaves its session, clears its environment, holds the pipe."""


@pytest.mark.parametrize("mode", ["sandbox", "host"])
async def test_an_abort_answers_when_the_runs_processes_are_dead(open_house: Open, marker: str, mode: str) -> None:
    needs.bubblewrap()
    script = [CallTools([("bash_exec", {"command": STUBBORN.format(m=marker)})])]
    async with open_house(script, {**OPEN_TOOLS, "bashMode": mode}) as home, await home.wire() as wire:
        run_id = await tool_run_on(home, wire)
        await until(lambda: len(alive(f"sleep\0{marker}")) >= 6, "all of them run", 60)
        answer = await wire.effect("agent.abort", runId=run_id)
        assert alive(marker) == []
        assert answer == {"runId": run_id, "status": "aborted"}


async def test_on_the_host_an_abort_names_what_it_could_not_see_to(open_house: Open) -> None:
    killer = CallTools([("bash_exec", {"command": "kill -9 $PPID; sleep 0.2"})])
    script = conversation([killer, Hang()])
    async with open_house(script, {**OPEN_TOOLS, "bashMode": "host"}) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        result = (await wire.event("agent.tool_result"))["payload"]
        assert (result["status"], result["error"]["code"]) == ("failed", "TOOL_EXEC_FAILED")
        answer = await wire.effect("agent.abort", runId=run["runId"])
        assert answer["status"] == "aborted"
        assert answer["leftover"] == ["?: processes of a command whose supervisor was killed"]


async def test_the_answer_precedes_the_events_that_the_abort_caused(open_house: Open, marker: str) -> None:
    needs.bubblewrap()
    script = [CallTools([("bash_exec", {"command": f"touch started; sleep {marker}"})])]
    clock = Later(0)
    async with open_house(script, clock=clock) as home, await home.wire() as wire:
        run_id = await tool_run_on(home, wire)
        clock.ahead = 5000
        frame_id = await wire.start("agent.abort", {"runId": run_id, "idempotencyKey": "k"})
        failed = await wire.event("agent.failed")
        assert failed["payload"]["code"] == "ABORTED"
        answered = wire.index(lambda frame: frame.get("id") == frame_id)
        result = wire.index(lambda frame: frame.get("event") == "agent.tool_result")
        assert answered < result < wire.index(lambda frame: frame.get("event") == "agent.failed")
        told = wire.frames[result]["payload"]
        assert told["status"] == "interrupted"
        assert 5000 <= told["durationMs"] < 60_000


async def test_aborts_with_one_key_and_with_others_all_get_the_answer(open_house: Open) -> None:
    async with open_house([Hang(after=2)]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        await wire.event("agent.delta")
        keys = ["a", "a", "a", "b", "c"]
        ids = [await wire.start("agent.abort", {"runId": run["runId"], "idempotencyKey": key}) for key in keys]
        answers = [(await wire.response(frame_id))["payload"] for frame_id in ids]
        assert answers == [{"runId": run["runId"], "status": "aborted"}] * 5
        again = await wire.request("agent.abort", {"runId": run["runId"], "idempotencyKey": "a"})
        assert again == answers[0]
        ends = [frame for frame in wire.durable if frame["event"] == "agent.failed"]
        assert len(ends) == 1


async def test_a_cancelled_model_call_closes_its_connection(open_house: Open) -> None:
    async with open_house([Hang(after=2)]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        await wire.event("agent.delta")
        await wire.effect("agent.abort", runId=run["runId"])
        async with asyncio.timeout(30):
            while home.model.disconnects == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert home.model.disconnects == 1


async def test_the_abort_of_a_run_that_has_ended_tells_how_it_ended(open_house: Open) -> None:
    async with open_house([Say("ok")]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        await wire.event("agent.completed")
        answer = await wire.effect("agent.abort", runId=run["runId"])
        assert answer == {"runId": run["runId"], "status": "completed"}


async def test_a_run_that_waits_for_a_place_can_be_aborted(open_house: Open) -> None:
    async with open_house([Hang()], max_active_runs=1) as home, await home.wire() as wire:
        first = await wire.effect("agent.run", input="a")
        second = await wire.effect("agent.run", input="b")
        for run in (second, first):
            assert (await wire.effect("agent.abort", runId=run["runId"]))["status"] == "aborted"


@pytest.mark.parametrize("attempt", range(8))
async def test_an_abort_at_any_moment_leaves_exactly_one_end(open_house: Open, attempt: int) -> None:
    script = conversation([CallTools([("file_list", {}), ("file_write", {"path": "x", "content": "y"})]), Say("ok")])
    async with open_house(script) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go", sessionId="s1")
        for _ in range(attempt * attempt):
            await asyncio.sleep(0)
        answer = await wire.effect("agent.abort", runId=run["runId"])
        ended = await wire.frame(lambda frame: frame.get("event") in ("agent.completed", "agent.failed"))
        row: dict[str, Any] = (await wire.request("runs.get", {"runId": run["runId"]}))["run"]
        assert answer["status"] == row["status"]
        assert (row["status"] == "completed") == (ended["event"] == "agent.completed")
        session = (await wire.request("sessions.get", {"sessionId": "s1"}))["session"]
        assert (session["status"], "activeRunId" in session) == ("idle", False)
        calls = [frame for frame in wire.durable if frame["event"] == "agent.tool_call"]
        results = [frame for frame in wire.durable if frame["event"] == "agent.tool_result"]
        assert len(calls) == len(results)
        assert (await wire.effect("agent.run", input="again", sessionId="s1"))["status"] == "accepted"


ASKING = {"tools": {"bash.exec": "approval-required"}}
ASKED = [CallTools([("bash_exec", {"command": "true"})])]


async def test_an_abort_that_is_committed_with_a_taking_up_finds_who_drives_the_run(open_house: Open) -> None:
    async with open_house(ASKED, ASKING) as home, await home.wire() as wire:
        run_id = (await wire.effect("agent.run", input="go"))["runId"]
        await wire.event("approval.required")
        core, store = home.server.core, home.server.store
        async with asyncio.timeout(60):
            # While the writer is busy the two wait together, and then share a commit.
            _, _, answer = await asyncio.gather(
                store.write(lambda _tx: time.sleep(0.3)),
                core.continue_("t_default", run_id),
                core.abort(OWNER, run_id),
            )
        assert b'"aborted"' in answer


async def test_an_abort_right_after_a_start_waits_until_what_a_dead_gateway_left_is_ended(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(ASKED, ASKING) as home, await home.wire() as wire:
        run_id = (await wire.effect("agent.run", input="go"))["runId"]
        await wire.event("approval.required")
        looking, ended = asyncio.Event(), asyncio.Event()

        async def end_leftovers() -> None:
            looking.set()
            await ended.wait()

        monkeypatch.setattr(home.server.executor, "end_leftovers", end_leftovers)
        frame_id = await wire.start("agent.abort", {"runId": run_id, "idempotencyKey": "k"})
        async with asyncio.timeout(60):
            await looking.wait()
        run = (await wire.request("runs.get", {"runId": run_id}))["run"]
        assert run["status"] == "waiting_approval"
        ended.set()
        assert (await wire.response(frame_id))["payload"]["status"] == "aborted"
