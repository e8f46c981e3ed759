"""A gateway killed at every named point of every kind of step, and started again: nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from corral import faults
from tests.core.test_compaction_killed import POINTS as COMPACTION
from tests.kill.victim import Acts, Client, Taken, Victim, walk
from tests.support import needs
from tests.support.model_server import CallTools, Hang, ModelServer, Say, conversation
from tests.support.wire import Json

pytestmark = pytest.mark.timeout(900)
"""A walk starts a dozen gateways, one after the other."""

OPEN = {"bash.exec": "allow", "file.write": "allow"}
ON_HOST = {"bashMode": "host", "tools": OPEN}
SANDBOXED = {"bashMode": "sandbox", "tools": OPEN}
ASKING = {"bashMode": "host", "tools": {"bash.exec": "approval-required"}}

HELLO = Say("Hello, you.", chunks=6, delay=0.005)


def command(session: str) -> tuple[str, Json]:
    """One that leaves a mark, once for each time that it is run, and says so."""
    return "bash_exec", {"command": f"printf x >> marks-{session}; echo up"}


def commits(event: str) -> list[str]:
    """Every moment of the commit that has such an event in it. The first two differ in what is on the disk,
    the others in what has been told of it."""
    points = ("commit.before", "commit.after", "publish.before", "publish.between")
    return [f"{point}@{event}/{{s}}" for point in points]


def just_run(patch: Json | None = None) -> Acts:
    async def acts(client: Client) -> None:
        if patch is not None:
            await client.ask("policy", "policy.update", patch=patch)
        await client.run()

    return acts


# ---- a turn of text

TEXT = [*commits("agent.accepted"), "model.delta@{s}:3", "model.end@{s}", *commits("agent.completed")]


async def test_a_turn_of_text_is_told_once_and_whole(tmp_path: Path) -> None:
    def check(it: Taken) -> None:
        assert it.names.count("agent.message") == 1
        assert it.items[-1]["payload"]["output"] == "Hello, you."

    await walk(tmp_path, TEXT, just_run(), lambda _session: [HELLO], check)


# ---- tools

READ = [*commits("agent.tool_call"), "tool.recorded@{s}", "tool.end@{s}", *commits("agent.tool_result")]


async def test_a_tool_that_only_reads_is_run_again(tmp_path: Path) -> None:
    def check(it: Taken) -> None:
        assert it.statuses == ["success"]

    await walk(tmp_path, READ, just_run(), lambda _session: [CallTools([("file_list", {})]), HELLO], check)


STARTED = ["tool.recorded@{s}", "tool.during@command", "tool.end@{s}", "commit.before@agent.tool_result/{s}"]
"""Where the start of a call is on the disk and its result is not."""
COMMAND = [*STARTED, "tool.decided@{s}", *commits("agent.tool_result")[1:]]


def at_most_once(it: Taken) -> None:
    if it.fault in STARTED:
        assert it.statuses == ["interrupted"]
        assert "may have taken effect" in it.results[0]["output"]
        # The model has it in the same words, as the result of its call.
        (told,) = [message for message in it.requests[-1]["messages"] if message["role"] == "tool"]
        assert told["content"] == it.results[0]["output"]
        assert it.marks == ("" if it.fault.startswith("tool.recorded") else "x")
    else:
        assert (it.statuses, it.marks) == (["success"], "x")


async def test_a_command_that_leaves_a_mark_leaves_it_at_most_once(tmp_path: Path) -> None:
    def steps(session: str) -> list[Any]:
        return [CallTools([command(session)]), HELLO]

    await walk(tmp_path, COMMAND, just_run(ON_HOST), steps, at_most_once)


async def test_so_does_one_in_the_sandbox(tmp_path: Path) -> None:
    needs.bubblewrap()

    def steps(session: str) -> list[Any]:
        return [CallTools([command(session)]), HELLO]

    await walk(tmp_path, STARTED[1:3], just_run(SANDBOXED), steps, at_most_once)


FILE = ["tool.during@file", "tool.end@{s}", "tool.decided@{s}"]


async def test_a_file_is_written_whole_or_not_at_all_and_never_again(tmp_path: Path) -> None:
    def steps(session: str) -> list[Any]:
        return [CallTools([("file_write", {"path": f"marks-{session}", "content": "x"})]), HELLO]

    def check(it: Taken) -> None:
        status = "success" if it.fault.startswith("tool.decided") else "interrupted"
        assert it.statuses == [status]
        assert it.marks == ("" if it.fault == "tool.during@file" else "x")

    await walk(tmp_path, FILE, just_run(ON_HOST), steps, check)


# ---- a person

APPROVAL = [
    *commits("approval.required"),
    "run.parking@{s}",
    "approval.resolving@{s}",
    *commits("approval.resolved"),
    "run.beginning@{s}",
    # The last two lose the command's result, and the second has no session: it comes after one that runs nothing again.
    "tool.recorded@{s}:2",
    "tool.during@command",
]


async def approve(client: Client) -> None:
    await client.ask("policy", "policy.update", patch=ASKING)
    run_id = await client.run()
    asked = (await client.event("approval.required"))["payload"]
    # The person takes her time: the run has been left to her when she decides.
    async with asyncio.timeout(60):
        while await _goes_on(client, run_id):  # noqa: ASYNC110 - the run tells nobody that it is left
            await asyncio.sleep(0.02)
    await client.ask("approve", "approval.resolve", approvalId=asked["approvalId"], decision="approve")


async def _goes_on(client: Client, run_id: str) -> bool:
    """Whether the run has not come yet to where nothing is left to do but wait."""
    run = (await client.wire.request("runs.get", {"runId": run_id}))["run"]
    waiting = (await client.wire.request("approval.queue", {"sessionId": client.session}))["items"]
    return run["status"] == "running" and bool(waiting)


async def test_a_call_that_a_person_approves_is_asked_about_and_run_once(tmp_path: Path) -> None:
    def steps(session: str) -> list[Any]:
        return [CallTools([("file_list", {}), command(session)]), HELLO]

    def check(it: Taken) -> None:
        assert it.names.count("approval.required") == it.names.count("approval.resolved") == 1
        end = next(
            at
            for at, item in enumerate(it.items)
            if item["event"] == "agent.tool_result" and item["payload"]["toolName"] == "bash.exec"
        )
        assert it.names.index("approval.resolved") < end
        status = it.items[end]["payload"]["status"]
        if it.fault in APPROVAL[-2:]:
            assert (status, it.marks) == ("interrupted", "" if it.fault.startswith("tool.recorded") else "x")
        else:
            assert (status, it.marks) == ("success", "x")

    await walk(tmp_path, APPROVAL, approve, steps, check)


# ---- abort


def abort_at(event: str, patch: Json, **payload: Any) -> Acts:
    async def acts(client: Client) -> None:
        await client.ask("policy", "policy.update", patch=patch)
        run_id = await client.run()
        await client.event(event, **payload)
        answer = await client.ask("abort", "agent.abort", runId=run_id)
        assert answer == {"runId": run_id, "status": "aborted"}

    return acts


ABORT = ["abort.noted", "abort.killed", *commits("agent.failed")]


async def test_an_abort_in_the_middle_of_a_stream_is_carried_out_by_the_next_gateway(tmp_path: Path) -> None:
    def check(it: Taken) -> None:
        assert it.items[-1]["payload"]["code"] == "ABORTED"

    await walk(tmp_path, ABORT, abort_at("agent.delta", {}), lambda _session: [Hang(after=2)], check)


@pytest.mark.parametrize("mode", ["host", "sandbox"])
async def test_so_is_one_in_the_middle_of_a_command(tmp_path: Path, mode: str) -> None:
    needs.bubblewrap()
    patch = ON_HOST if mode == "host" else SANDBOXED

    def steps(session: str) -> list[Any]:
        name, args = command(session)
        return [CallTools([(name, {"command": f"{args['command']}; sleep 86399"})])]

    async def acts(client: Client) -> None:
        await abort_at("agent.tool_call", patch)(client)

    def check(it: Taken) -> None:
        assert it.items[-1]["payload"]["code"] == "ABORTED"
        assert it.statuses == ["interrupted"]
        assert it.marks in ("", "x")

    await walk(tmp_path, ABORT[:2], acts, steps, check)


async def test_so_is_one_of_a_run_that_waits_for_a_person(tmp_path: Path) -> None:
    def check(it: Taken) -> None:
        assert it.items[-1]["payload"]["code"] == "ABORTED"
        assert (it.statuses, it.marks) == (["interrupted"], "")
        assert it.results[0]["output"].startswith("The call was not started")

    def steps(session: str) -> list[Any]:
        return [CallTools([command(session)]), HELLO]

    points = ["abort.noted", *commits("agent.failed")[:2]]
    await walk(tmp_path, points, abort_at("approval.required", ASKING), steps, check)


# ---- a mode that waits for the run's end


async def queue_mode(client: Client) -> None:
    await client.run()
    await client.event("agent.delta")
    await client.ask("mode", "runtime.setMode", sessionId=client.session, runtimeMode="cloud")


MODE = ["mode.applying@{s}", *commits("runtime.mode_changed")]


async def test_a_queued_mode_is_applied_once_when_the_run_ends(tmp_path: Path) -> None:
    slow = Say("A long story, told slowly.", chunks=12, delay=0.1)

    def check(it: Taken) -> None:
        assert it.names.count("runtime.mode_changed") == 1
        session = next(item["payload"]["session"] for item in reversed(it.items) if item["event"] == "session.updated")
        assert session["runtimeMode"] == "cloud"
        assert "queuedRuntimeMode" not in session

    await walk(tmp_path, MODE, queue_mode, lambda _session: [slow], check)


# ---- a budget

BUDGET = ["model.reserved@{s}", "model.delta@{s}"]


async def test_what_a_step_had_set_aside_of_a_budget_is_let_go(tmp_path: Path) -> None:
    def check(it: Taken) -> None:
        assert it.names[-1] == "agent.completed"
        with closing(sqlite3.connect(it.victim.gateway.data_dir / "corral.db")) as database:
            (reserved,) = database.execute("SELECT count(*) FROM reservations").fetchone()
        assert reserved == 0

    patch = {"limits": {"perDay": {"tokens": 1_000_000}}}
    await walk(tmp_path, BUDGET, just_run(patch), lambda _session: [HELLO], check)


# ---- the recovery itself

RECOVERY = ["recover.taking@{s}", *commits("agent.resumed")]


async def test_the_gateway_that_takes_a_run_up_dies_of_it_too(tmp_path: Path) -> None:
    client = Client("s1")
    acts = just_run(ON_HOST)
    async with ModelServer(conversation([CallTools([command("s1")]), HELLO])) as model:
        victim = Victim(tmp_path, model)
        try:
            await victim.gateway.start(fault="tool.during@command")
            await victim.die(client, acts)
            for fault in RECOVERY[:4]:
                await victim.gateway.start(fault=fault.format(s="s1"))
                await victim.die(client, acts)
            await victim.gateway.start()
            await victim.act(client, acts)
            items = await victim.examine(client)
        finally:
            await victim.gateway.kill()
    names = [item["event"] for item in items]
    assert [item["payload"]["status"] for item in items if item["event"] == "agent.tool_result"] == ["interrupted"]
    # Two of the four died with it on the disk, and the last one lived.
    assert names.count("agent.resumed") == 3
    assert victim.marks("s1") == "x"


# ---- frozen

FROZEN = "publish.before@agent.completed"


async def test_a_frozen_gateway_goes_on_where_it_stood(tmp_path: Path) -> None:
    client = Client("s1")
    async with ModelServer([HELLO]) as model:
        victim = Victim(tmp_path, model)
        await victim.gateway.start(fault=f"{FROZEN}:freeze")
        process = victim.gateway.process
        acting = asyncio.create_task(victim.act(client, just_run()))
        try:
            await _state(process.pid, "T")
            assert not acting.done()
            os.kill(process.pid, signal.SIGCONT)
            await acting
            await victim.examine(client)
        finally:
            acting.cancel()
            process.send_signal(signal.SIGCONT)
            await victim.gateway.kill()


async def _state(pid: int, wanted: str) -> None:
    async with asyncio.timeout(60):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# ---- all of them


def test_every_point_that_there_is_is_walked() -> None:
    walks = (TEXT, READ, COMMAND, FILE, APPROVAL, ABORT, MODE, BUDGET, RECOVERY, COMPACTION)
    assert {fault.split("@")[0].split(":")[0] for walked in walks for fault in walked} == set(faults.POINTS)
